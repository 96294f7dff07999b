import numpy as np
import polars as pl
import pytest
from scipy.stats import false_discovery_control

from feature_store.associations import benjamini_hochberg
from feature_store.associations.multiple_testing import q_lookup, q_within


def by_definition(p):
    """q of each p by its definition: the smallest level at which the step-up procedure rejects it."""
    every = np.sort(p.ravel())
    levels = every * every.size / np.arange(1, every.size + 1)
    return np.array([min(1.0, levels[every >= value].min()) for value in p.ravel()]).reshape(p.shape)


def test_q_of_four_tests_is_that_of_hand():
    q = benjamini_hochberg(np.array([0.04, 0.01, 0.9, 0.02]))
    np.testing.assert_allclose(q, [0.16 / 3, 0.04, 0.9, 0.04], rtol=1e-15)


def test_q_is_corrected_over_all_tests_of_an_array_of_any_shape(rng):
    p = rng.random((20, 7)) ** 2
    np.testing.assert_array_max_ulp(benjamini_hochberg(p), by_definition(p), maxulp=2)
    assert benjamini_hochberg(np.empty((0, 3))).shape == (0, 3)


@pytest.mark.parametrize("wrong", [np.nan, 1.5])
def test_a_p_that_is_none_is_refused_and_does_not_spoil_the_others(wrong):
    with pytest.raises(ValueError, match="0 and 1"):
        benjamini_hochberg(np.array([0.1, wrong]))


def test_q_is_corrected_by_split_and_question_and_not_over_what_else_was_asked(rng):
    asked = {"split": ["select", "test"] * 30, "kind": ["a"] * 20 + ["b"] * 40, "p": rng.random(60)}
    table = pl.DataFrame(asked).with_columns(q=q_within("p", "kind"))
    for _, part in table.group_by("split", "kind"):
        np.testing.assert_array_max_ulp(part["q"].to_numpy(), by_definition(part["p"].to_numpy()), maxulp=2)


def test_looking_q_up_gives_scipys_q_over_the_tests_of_all_parts_with_ties(rng):
    p = np.round(rng.random(5000) ** 2, 3)
    q = q_lookup([p[:1], p[1:2000], p[2000:]])
    kept = rng.permutation(5000)[:300]
    np.testing.assert_array_max_ulp(q(p[kept]), false_discovery_control(p)[kept], maxulp=4)
    assert q(np.empty(0)).size == 0
