"""The distance to the cells that a run moves toward, per cell type, before and after."""

from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from feature_store.errors import InputError
from feature_store.plots.canvas import BLUE, beside, canvas, finish, head, plain
from feature_store.plots.steering.rows import (
    MARKERS,
    check_columns,
    mark_colour,
    measured_metric,
    metric_words,
    title_of,
)
from feature_store.query.steering import ALL, Role, SteeringResults, of_role, steering_results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from feature_store.plots.canvas import Save
    from feature_store.query.store import FeatureStore

DISTANCES = ("distance_corrected", "distance")
"""Metrics that are drawn, the first that was measured."""


def steering_distances(
    store: "FeatureStore",
    run: str | None = None,
    *,
    metric: str | None = None,
    show: bool | None = None,
    save: "Save | None" = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """The distance to the label that cells are moved toward, per cell type: before, after, and under each null.

    Types with the largest distance come first; the line runs from before to after. Raises InputError for a run that
    moves no cells toward others (`scsae steer --toward`).
    """
    results = steering_results(store, run)
    name, rows, before = type_rows(results, metric)
    groups = before["group"].to_list()
    place = {group: i for i, group in enumerate(groups)}
    drawn = canvas(ax, (6.4, 1.6 + 0.36 * len(groups)), show=show, save=save)
    after = rows.filter(pl.col("chosen"))
    y = np.arange(len(groups))
    start = before["value"].to_numpy()
    end = before.select("group").join(after, on="group", how="left", maintain_order="left")["value"].to_numpy()
    drawn.ax.hlines(y, start, end, color=BLUE, lw=1.6, zorder=1)
    handles: list[Any] = [
        drawn.ax.scatter(start, y, s=44, facecolors="white", edgecolors="black", zorder=3),
        drawn.ax.scatter(end, y, s=44, color=BLUE, zorder=4),
    ]
    names = ["before", f"after ({after['condition'][0]})" if after.height else "after"]
    others = of_role(rows, Role.NULL, Role.BASELINE, Role.FLOOR)
    for i, condition in enumerate(others["condition"].unique(maintain_order=True)):
        part = others.filter((pl.col("condition") == condition) & pl.col("group").is_in(groups))
        colour = mark_colour(part["role"][0], i)
        at = [place[group] for group in part["group"]]
        handles.append(
            drawn.ax.scatter(
                part["value"], at, s=26, marker=MARKERS[i % len(MARKERS)], color=colour, zorder=2, alpha=0.9
            )
        )
        names.append(condition)
    drawn.ax.set_yticks(y, [plain(group) or "all cells" for group in groups], fontsize=9)
    drawn.ax.set_ylim(len(groups) - 0.5, -0.5)
    drawn.ax.set_xlim(left=0)
    drawn.ax.set_xlabel(f"{metric_words(name)}; to {plain(results.plan.toward or 'the reference')}", fontsize=9)
    beside(drawn.ax, handles, [plain(text) for text in names])
    head(drawn.ax, title_of(results), least=64)
    finish(drawn, store, show, save, ("steering", results.run))
    return drawn.ax


def type_rows(results: SteeringResults, metric: str | None = None) -> tuple[str, pl.DataFrame, pl.DataFrame]:
    """A distance, its rows by cell type, and those of unsteered cells, the largest first.

    Raises InputError for a run without distances by type.
    """
    name = measured_metric(results, metric, DISTANCES)
    rows = results.rows.filter((pl.col("metric") == name) & (pl.col("group") != ALL))
    check_columns(rows, results)
    before = of_role(rows, Role.UNSTEERED).sort("value", descending=True)
    if before.is_empty():
        raise InputError(
            f"steering run {results.run} has no {name} by cell type; see `scsae sql 'SELECT * FROM steering'`"
        )
    return name, rows, before
