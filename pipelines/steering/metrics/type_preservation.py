"""Side effects of steering: changes of the cells' types, and movement in other directions than the intended one.

`macro_f1` scores the types that nearest neighbours predict. `off_axis` splits the movement inside each type into a part
along the line from target to toward cells and the rest, in units of that line's length. Noise counts as movement in
`off_axis_cells`, the mean over single cells, and hardly in `off_axis`, which is that of the mean movement.
"""

import numpy as np
import polars as pl
from sklearn.metrics import f1_score

from pipelines.steering.metrics.intervals import Bools, Floats, Names

MIN_CELLS = 10
"""Least number of cells of a type on each side."""


def macro_f1(truth: Names, predicted: Names) -> float:
    """The mean F1 over the labels in `truth`; a label that is never predicted scores 0."""
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
    """The movement of target cells along and off the line from their group's mean to that of the toward cells.

    The arguments are those of `distances.distance_table`.

    Returns:
        group, n_cells, axis (the line's length, in the embedding's unit), along (1: the whole way, above 1: too far,
        below 0: backward), off_axis (of the mean movement) and off_axis_cells (the mean over single cells), in units of
        the axis. Groups that are too small are missing. If there is any group, the row "all" holds the mean lengths
        over groups, divided by the mean axis.
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
