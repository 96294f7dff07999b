"""What several pictures of a steering run share: which rows they draw, in which colours and with which marks."""

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from feature_store.errors import InputError
from feature_store.plots.canvas import BLUE, DARK_GREY, GREY, OKABE_ITO, plain
from feature_store.query.metrics import metric_of
from feature_store.query.steering import Role, SteeringResults, of_role
from feature_store.query.steering import title_of as plain_title_of
from feature_store.query.suggestions import did_you_mean

KEYS = ("condition", "role", "n_features", "dose")
BESIDE = (Role.NULL, Role.BASELINE, Role.FLOOR, Role.RECONSTRUCTION, Role.REPLACE)
"""Roles of the conditions that stand beside the intervention, measured at the chosen point alone."""
MARKERS = "sD^vPX*p"
_BASELINE_COLOURS = [colour for colour in OKABE_ITO if colour not in (BLUE, "#000000", "#F0E442", "#56B4E9")]
_NOTHING_AT_ZERO = ("add", "shift", "toward")


def title_of(results: SteeringResults) -> str:
    """What the run did, for a title."""
    return plain_title_of(results, plain)


def metric_words(metric: str) -> str:
    """A metric in words, for an axis."""
    return plain(metric_of(metric).description, longest=80)


def measured_metric(results: SteeringResults, wanted: str | None, defaults: Sequence[str]) -> str:
    """The metric that is wanted, or the first default that was measured. Raises InputError for one that was not."""
    known = sorted(results.rows["metric"].unique().to_list())
    metric = next((name for name in defaults if name in known), defaults[0]) if wanted is None else wanted
    if metric not in known:
        raise InputError(
            f"steering run {results.run} has no metric {metric!r}{did_you_mean(metric, known)}; "
            f"it has {', '.join(known)}"
        )
    return metric


def check_columns(rows: pl.DataFrame, results: SteeringResults, columns: Sequence[str] = KEYS) -> None:
    """Raise InputError for results of an older version, which lack some of the columns."""
    if missing := [name for name in columns if name not in rows.columns]:
        raise InputError(
            f"the results of steering run {results.run} have no column {', '.join(missing)}; "
            "they are of an older version: run `scsae steer` again"
        )


def chosen_point(rows: pl.DataFrame, results: SteeringResults) -> dict[str, Any]:
    """The row of the point that was chosen on `select` cells. Raises InputError where there is none."""
    chosen = rows.filter(pl.col("chosen"))
    if chosen.is_empty():
        raise InputError(f"steering run {results.run} has no chosen point; run `scsae steer` again")
    return chosen.row(0, named=True)


def section(rows: pl.DataFrame, point: Mapping[str, Any], axis: str) -> pl.DataFrame:
    """The points of the grid that differ from `point` along `axis` alone, ascending.

    The unsteered cells are the point at 0, unless a dose of 0 changes something: a code that is clamped or scaled to 0
    is ablated.
    """
    other = "n_features" if axis == "dose" else "dose"
    grid = of_role(rows, Role.GRID).filter(pl.col(other).eq_missing(pl.lit(point[other])))
    changes_at_zero = axis == "dose" and not grid["intervention"].is_in(_NOTHING_AT_ZERO).all()
    if not changes_at_zero and grid.filter(pl.col(axis) == 0).is_empty():
        zero = of_role(rows, Role.UNSTEERED).with_columns(pl.lit(0).cast(rows.schema[axis]).alias(axis))
        grid = pl.concat([zero, grid]) if grid.height > 1 else grid
    return grid.unique(axis, keep="last", maintain_order=True).sort(axis)


def interval(rows: pl.DataFrame, suffix: str = "") -> tuple[pl.Series, pl.Series]:
    """The ends of the interval of each value, from those of its effect; the value itself where there is no interval."""
    value, effect = (rows[f"{name}{suffix}"] for name in ("value", "effect"))
    low, high = ((rows[f"{name}{suffix}"] + value - effect).fill_null(value) for name in ("low", "high"))
    return low, high


def mark_colour(role: str, place: int) -> str:
    """Grey for nulls and reconstructions, which their markers tell apart, and a colour each for baselines."""
    if role == Role.NULL:
        return GREY
    if role in (Role.RECONSTRUCTION, Role.REPLACE, Role.FLOOR):
        return DARK_GREY
    return _BASELINE_COLOURS[place % len(_BASELINE_COLOURS)]
