"""The table `feature_label`: a row a feature, label and split."""

import polars as pl

from feature_store.associations.batch_statistics import associate_batch
from feature_store.associations.familywise import Replicates, family_wise, merge_minima
from feature_store.associations.label_statistics import LabelRows, associate_labels
from feature_store.associations.multiple_testing import q_within
from feature_store.associations.range_inputs import CellInputs, FeatureRange
from feature_store.associations.ranges import MeasuredRun


def measure_labels(features: FeatureRange, cells: CellInputs, replicates: Replicates) -> LabelRows:
    """The rows of all kinds of labels for one range of features, and the smallest p under permuted labels."""
    codes, masks, first = features.codes, cells.masks(), features.first
    found = []
    for labels in cells.labels:
        if labels.kind == "batch":
            cell_type = cells.label("cell_type")
            rows = associate_batch(
                codes, labels, masks, cell_type, units=cells.units, first_feature=first, replicates=replicates
            )
        else:
            rows = associate_labels(codes, labels, masks, cells.units, first_feature=first, replicates=replicates)
        found += [rows] if rows.table.height else []
    if not found:
        return LabelRows(pl.DataFrame(), pl.DataFrame())
    return LabelRows(pl.concat(rows.table for rows in found), merge_minima([rows.minima for rows in found]))


def label_table(measured: MeasuredRun) -> pl.DataFrame:
    """The table with p_max and q, from all ranges; no columns where there are no labels."""
    table = measured.read_all("labels")
    if not table.width:
        return table
    table = family_wise(table, merge_minima(measured.read_parts("minima")))
    return table.with_columns(q=q_within("p", "label_kind")).sort("feature_id", "label_kind", "label", "split")
