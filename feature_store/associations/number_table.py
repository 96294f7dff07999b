"""The table `feature_number`: a row a feature, number of the cells and split."""

import polars as pl

from feature_store.associations.multiple_testing import q_within
from feature_store.associations.number_statistics import associate_number
from feature_store.associations.range_inputs import CellInputs, FeatureRange
from feature_store.associations.ranges import MeasuredRun


def measure_numbers(features: FeatureRange, cells: CellInputs) -> pl.DataFrame:
    """The rows of all numbers for one range of features, without q; no columns where there are no numbers."""
    masks = cells.masks()
    found = [
        associate_number(features.codes, number, masks, cells.units, first_feature=features.first)
        for number in cells.numbers
    ]
    known = [rows for rows in found if rows.width]
    return pl.concat(known) if known else pl.DataFrame()


def number_table(measured: MeasuredRun) -> pl.DataFrame:
    """The table with q, from all ranges; no columns where there are no numbers."""
    table = measured.read_all("numbers")
    if not table.width:
        return table
    return table.with_columns(q=q_within("p", "number")).sort("feature_id", "number", "split")
