"""What steering moved that it should not have: the cells' types, and the part of the movement that leads elsewhere.

`type_drift` asks a classifier of k = 5 nearest neighbours, fitted on unsteered reference cells, for the type of the
same cells before and after. `off_axis` splits the movement inside each type into a part along the line from target to
toward cells and the rest, in units of that line's length. Noise counts as movement in `off_axis_cells`, which averages
the cells' own departures, and hardly in `off_axis`, which is of the mean movement.
"""

from typing import NamedTuple

import numpy as np
import polars as pl
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier

from pipelines.errors import UsageError
from pipelines.steering.metrics.intervals import Bools, Floats, Metric, Names

N_NEIGHBORS = 5
MIN_CELLS = 10

METRICS = (
    Metric(name="type_accuracy", higher_is_better=True, low=0.0, high=1.0),
    Metric(name="type_macro_f1", higher_is_better=True, low=0.0, high=1.0),
    Metric(name="type_changed", higher_is_better=False, low=0.0, high=1.0),
    Metric(name="along", higher_is_better=True),
    Metric(name="off_axis", higher_is_better=False, low=0.0),
)


class TypeDrift(NamedTuple):
    """Cell types as nearest neighbours see them before and after; None where there are no cells."""

    accuracy_before: float | None
    accuracy_after: float | None
    macro_f1_before: float | None
    """Mean over the types that the cells have."""
    macro_f1_after: float | None
    changed: float | None
    """Share of cells whose predicted type changed."""
    n_cells: int


class TypeJudge:
    """Nearest neighbours among unsteered reference cells; fitted once, asked for every condition."""

    def __init__(self, reference: Floats, cell_type: Names) -> None:
        """Remember reference cells [n_reference width] and their types [n_reference]."""
        if not len(reference) or len(reference) != len(cell_type):
            raise UsageError(
                f"{len(reference)} reference cells and {len(cell_type)} types; expected at least one cell, each with a "
                "type"
            )
        self._knn = KNeighborsClassifier(min(N_NEIGHBORS, len(reference))).fit(reference, np.asarray(cell_type, str))

    def drift(self, unsteered: Floats, steered: Floats, cell_type: Names) -> TypeDrift:
        """Drift of cells, unsteered and steered [n_cells width], of known types [n_cells]."""
        truth = np.asarray(cell_type, dtype=str)
        if not len(truth):
            return TypeDrift(None, None, None, None, None, 0)
        before, after = self._knn.predict(unsteered), self._knn.predict(steered)
        return TypeDrift(
            accuracy_before=float((before == truth).mean()),
            accuracy_after=float((after == truth).mean()),
            macro_f1_before=macro_f1(truth, before),
            macro_f1_after=macro_f1(truth, after),
            changed=float((before != after).mean()),
            n_cells=len(truth),
        )


def macro_f1(truth: Names, predicted: Names) -> float:
    """F1 averaged over the labels in `truth`; a label never predicted scores 0."""
    return float(f1_score(truth, predicted, labels=np.unique(truth), average="macro", zero_division=0.0))


def off_axis(
    unsteered: Floats,
    steered: Floats,
    is_target: Bools,
    is_toward: Bools,
    group: Names,
    *,
    min_cells: int = MIN_CELLS,
) -> pl.DataFrame:
    """Movement of target cells along and beside the line from their group's mean to that of the toward cells.

    Args: as `distances.distance_table`.

    Returns:
        group, n_cells, axis (the line's length, in the embedding's unit), along (1: the whole way, beyond 1: too far,
        below 0: backward), off_axis (of the mean movement) and off_axis_cells (mean over cells of their own), in units
        of the axis; groups too small are missing. The row "all", there if any group is: lengths averaged over groups,
        divided by the mean axis.
    """
    names = np.asarray(group, dtype=str)
    rows: list[dict[str, object]] = []
    for name in np.unique(names[is_target]):
        target, toward = is_target & (names == name), is_toward & (names == name)
        if min(target.sum(), toward.sum()) < min_cells:
            continue
        origin = np.asarray(unsteered[target], dtype=np.float64)
        line = np.asarray(unsteered[toward], dtype=np.float64).mean(0) - origin.mean(0)
        moved = np.asarray(steered[target], dtype=np.float64) - origin
        axis = float(np.linalg.norm(line))
        if axis > 0:
            along = moved @ (line / axis)
            beside = moved - along[:, None] * (line / axis)
            lengths = (along.mean(), np.linalg.norm(beside.mean(0)), np.linalg.norm(beside, axis=1).mean())
            rows.append({"group": str(name), "n_cells": len(moved), "axis": axis, **_named(lengths)})
    frame = pl.DataFrame(rows, schema=SCHEMA)
    if rows:
        total = frame.select(pl.lit("all").alias("group"), pl.col("n_cells").sum(), pl.col(*_LENGTHS, "axis").mean())
        frame = pl.concat([frame, total.select(*SCHEMA)])
    return frame.with_columns(pl.col(*_LENGTHS) / pl.col("axis"))


_LENGTHS = ("along", "off_axis", "off_axis_cells")
SCHEMA = {"group": pl.String, "n_cells": pl.Int64, "axis": pl.Float64} | dict.fromkeys(_LENGTHS, pl.Float64)


def _named(lengths: tuple[np.floating, ...]) -> dict[str, float]:
    return {name: float(length) for name, length in zip(_LENGTHS, lengths, strict=True)}
