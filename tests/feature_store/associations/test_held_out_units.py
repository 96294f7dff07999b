"""What the donors of test cells allow: the number of units by split, and the sentence where there are too few."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from scipy.stats import binomtest

from feature_store.associations.claims import ALPHA
from feature_store.associations.donor_agreement import sign_flip_p
from feature_store.associations.held_out_units import (
    ENOUGH_UNITS,
    confounded_labels,
    labels_within_batches,
    limit_of_claims,
    unit_column,
    units_by_split,
)


def cells(n_test: int, *, column: str = "donor") -> pl.DataFrame:
    names = [f"d{number}" for number in range(n_test)]
    frame = pl.DataFrame({"split": ["train", "train", *["test"] * (n_test + 1)], "unit": ["a", "b", None, *names]})
    other = {"donor": "batch", "batch": "donor"}[column]
    return frame.rename({"unit": column}).with_columns(pl.lit(None, dtype=pl.String).alias(other))


def test_enough_units_are_the_fewest_with_which_a_sign_test_can_be_significant():
    assert binomtest(ENOUGH_UNITS, ENOUGH_UNITS).pvalue <= ALPHA < binomtest(ENOUGH_UNITS - 1, ENOUGH_UNITS - 1).pvalue


def test_units_are_counted_by_split_without_unknown_ones():
    assert units_by_split(cells(3)) == {"test": 3, "train": 2}
    assert units_by_split(cells(3, column="batch")) == {"test": 3, "train": 2}
    assert unit_column(cells(3, column="batch")) == "batch"
    assert units_by_split(cells(3).with_columns(donor=pl.lit(None, dtype=pl.String))) == {}


@pytest.mark.parametrize("n", [1, 2, 5])
def test_few_donors_give_the_least_p_across_them_and_no_claim_about_others(n):
    least = float(sign_flip_p(np.ones(n)))
    said = limit_of_claims(cells(n))
    assert said is not None
    assert f"the test cells are of {n} donor" in said
    assert f"no p across donors can be below {least:.3g}:" in said
    assert "no claim can be generalised to other donors, whatever its q" in said


def test_enough_donors_need_no_sentence_and_batches_are_named_as_such():
    assert limit_of_claims(cells(ENOUGH_UNITS)) is None
    said = limit_of_claims(cells(2, column="batch"))
    assert said is not None
    assert "2 batches (no donor is known, so batches are used)" in said


def test_cells_without_donor_and_batch_are_one_sample():
    said = limit_of_claims(cells(4).with_columns(donor=pl.lit(None, dtype=pl.String)))
    assert said is not None
    assert "--donor COLUMN" in said


def test_a_label_that_no_batch_has_beside_another_is_named():
    frame = pl.DataFrame(
        {
            "batch": ["1", "1", "2", "3", "3", None],
            "condition": ["drug", None, "control", "drug", "drug", "control"],
            "cell_type": ["B", "T", "B", "B", "B", "T"],
            "tissue": ["skin"] * 6,
        }
    )
    assert labels_within_batches(frame, ["cell_type", "condition", "tissue"]) == ["condition"]
    said = confounded_labels(frame, ["cell_type", "condition", "tissue"])
    assert said is not None
    assert said.startswith("every batch has cells of one condition alone")
    assert "--batch" in said
    assert confounded_labels(frame, ["cell_type", "tissue"]) is None
    assert confounded_labels(frame.with_columns(batch=pl.lit(None, dtype=pl.String)), ["condition"]) is None
    both = frame.with_columns(cell_type=pl.Series(["B", "B", "T", "B", "B", "T"]))
    assert "of one cell_type and one condition alone" in str(confounded_labels(both, ["cell_type", "condition"]))
