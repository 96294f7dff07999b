"""Numbers of cells are correlated by ranks within donors, and never made labels of single cells."""

import numpy as np
import polars as pl
import pytest
from scipy import sparse
from scipy.stats import spearmanr

from feature_store.associations import Labels
from feature_store.associations.inputs import Numbers
from feature_store.associations.number_statistics import associate_number
from feature_store.cells.label_columns import LabelKind, label_kind


def rows_of(codes, values, units=None):
    everything = {"test": np.ones(len(values), dtype=bool)}
    return associate_number(sparse.csr_array(codes), Numbers.from_values("x", values), everything, units)


@pytest.fixture
def cells(rng):
    """Codes of three features, a number, and the donor of 120 cells; donors differ in both."""
    donor = np.repeat(np.arange(4), 30)
    number = rng.normal(size=120) + 5 * donor
    up = np.maximum(number - 5 * donor + rng.normal(0, 0.3, 120), 0)
    between = rng.random(120) * 0.1 + donor
    noise = np.where(rng.random(120) < 0.3, rng.random(120), 0)
    return np.stack([up, between, noise], axis=1), number, Labels.from_values("donor", donor)


def test_without_donors_it_is_scipys_spearman_with_ties_and_negative_numbers(cells):
    codes, number, _ = cells
    found = rows_of(codes, np.round(number - 7))
    expected = [spearmanr(codes[:, i], np.round(number - 7)).statistic for i in range(3)]
    np.testing.assert_allclose(found["spearman"], expected, rtol=1e-12)
    np.testing.assert_allclose(found["spearman_all"], expected, rtol=1e-12)
    assert found["n_donors"].null_count() == 3
    assert found["p_donor"].null_count() == 3


def test_within_donors_a_difference_between_donors_counts_for_nothing(cells):
    codes, number, donor = cells
    found = rows_of(codes, number, donor)
    own = np.array(
        [[spearmanr(codes[d, i], number[d]).statistic for i in range(3)] for d in np.split(np.arange(120), 4)]
    )
    # donors of one size weigh the same
    np.testing.assert_allclose(found["spearman"][0], own[:, 0].mean(), atol=0.02)
    assert found["spearman_all"][1] > 0.8
    assert abs(found["spearman"][1]) < 0.3
    assert (found["p"][0], found["p"][1] > 1e-3) == (pytest.approx(0, abs=1e-8), True)
    assert found["low"][0] <= own[:, 0].mean() <= found["high"][0]
    assert (found["n_agree"][0], found["p_donor"][0], found["n_donors"][0]) == (4, 2 / 16, 4)


def test_a_number_that_donors_carry_as_a_whole_is_tested_by_donor(rng):
    donor = np.repeat(np.arange(5), 20)
    age = np.array([30.0, 41, 52, 63, 74])[donor]
    codes = np.stack([donor + rng.random(100) * 0.1, rng.random(100)], axis=1)
    found = rows_of(codes, age, Labels.from_values("donor", donor))
    # of the 120 orders of five donors two are as extreme as the sorted one
    assert (found["spearman"][0], found["p"][0]) == (1.0, pytest.approx(2 / 120))
    assert found["p_donor"].to_list() == found["p"].to_list()
    assert found["method"][0] == "unit-spearman/1 units=donor"


def test_p_of_a_number_holds_its_level_under_the_null(rng):
    donor = Labels.from_values("donor", np.repeat(np.arange(3), 40))
    codes = np.where(rng.random((120, 400)) < 0.2, rng.random((120, 400)), 0)
    p = rows_of(codes, rng.normal(size=120), donor)["p"].to_numpy()
    assert 0.01 <= (p <= 0.05).mean() <= 0.09


def test_unknown_numbers_are_left_out_and_a_constant_has_no_rows(cells):
    codes, number, donor = cells
    known = number.copy()
    known[::2] = np.nan
    few = rows_of(codes, known, donor)
    expected = rows_of(codes[1::2], number[1::2], donor.take(np.arange(120) % 2 == 1))
    assert few.equals(expected)
    assert rows_of(codes, np.full(120, 3.0), donor).width == 0


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.random.default_rng(0).random(300), LabelKind.NUMBERS),
        (np.random.default_rng(0).integers(200, 4000, 300), LabelKind.NUMBERS),
        (np.random.default_rng(0).random(30), LabelKind.NUMBERS),
        (np.arange(300) % 30, LabelKind.GROUPS),
        (np.arange(300) % 5 / 10, LabelKind.GROUPS),
        (np.arange(300) % 2 == 0, LabelKind.GROUPS),
        ([f"type {i % 60}" for i in range(300)], LabelKind.GROUPS),
        ([f"cell {i}" for i in range(300)], LabelKind.NAMES),
        ([f"{i / 300:.4f}" for i in range(300)], LabelKind.NAMES),
        ([*"abcdefgh"], LabelKind.GROUPS),
        ([None] * 300, LabelKind.GROUPS),
    ],
)
def test_a_column_is_groups_numbers_or_names_by_its_type_and_its_number_of_values(values, kind):
    assert label_kind(pl.Series("x", values)) is kind
