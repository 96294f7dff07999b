"""Steering from its results: an intervention beside its nulls, along its doses, against what it costs, type by type.

What is drawn is of `test` cells. Intervals are 95 %; a null's is that of its mean over draws, and nulls and baselines
stand at the point where they were measured. `steering_all` draws every plot that a run has the tables for.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import polars as pl

from feature_store.errors import InputError
from feature_store.plots.canvas import (
    BLUE,
    GREY,
    OKABE_ITO,
    ORANGE,
    beside,
    canvas,
    finish,
    head,
    key,
    plain,
    words,
)
from feature_store.query.metrics import HEADLINES, metric_of
from feature_store.query.suggestions import did_you_mean
from feature_store.storage.commit import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from feature_store.query.store import FeatureStore

UNSTEERED, ALL = "unsteered", "all"
_P = "p_"
"""A column p_NAME holds the p of every condition against the null NAME."""
TRADES = (("scib_bio", "scib_batch"), ("label_conservation", "batch_mixing"), ("type_accuracy", "remaining"))
DISTANCES = ("distance_corrected", "distance")
_MARKERS = "sD^vPX*p"
_NOTHING_AT_ZERO = ("add", "shift", "toward")
_KEYS = ("condition", "role", "n_features", "dose")
_NULL_ROLE, _POINT_ROLES = "null", ("null", "baseline", "floor", "reconstruction", "replace")


class Steered(NamedTuple):
    """One steering run: its id, its plan, and its results on `test` cells."""

    run: str
    plan: dict[str, Any]
    rows: pl.DataFrame


def steered_run(store: "FeatureStore", run: str | None) -> Steered:
    """The run named (or the beginning of its id; None: the newest). InputError for an unknown one."""
    table = store.frame("steering").collect()
    runs = list(store.lineage.steering)
    chosen = [known for known in runs if known.startswith(run or "")]
    if not chosen or (run is not None and len(chosen) > 1):
        raise InputError(f"{run!r} names {len(chosen) or 'none'} of the steering runs {', '.join(runs)}")
    rows = table.filter(pl.col("run") == chosen[0])
    # columns of other runs, which this one has no value in
    rows = rows.drop(name for name in ("split", "group", "role", "chosen") if _is_foreign(rows, name))
    if "split" in rows.columns:
        rows = rows.filter(pl.col("split") == "test")
    if "value" in rows.columns:
        # what could not be measured, of too few cells
        rows = rows.filter(pl.col("value").is_not_null())
    return Steered(chosen[0], Run.open(store.layout.steering_dir(chosen[0]) / "results").plan, rows)


def steering_bars(
    store: "FeatureStore",
    run: str | None = None,
    *,
    metric: str | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """The effect of each condition of a steering run on a metric, less the unsteered value, with its 95 % interval.

    `run` names one (or the beginning of its id), None takes the newest; `metric` None takes the headline of the run's
    question. Of the grid the chosen point is drawn. Nulls are grey. InputError for an unknown run or metric.
    """
    of = steered_run(store, run)
    rows = bars_of(of, metric)
    value = rows["effect"].to_numpy()
    low, high = (rows[name].fill_null(rows["effect"]).to_numpy() for name in ("low", "high"))
    colours = [_colour(row) for row in rows.iter_rows(named=True)]
    y = np.arange(rows.height)
    drawn = canvas(ax, (6.6, 1.3 + 0.4 * rows.height), show=show, save=save)
    drawn.ax.barh(y, value, color=colours, height=0.65)
    spread = np.stack([np.maximum(value - low, 0), np.maximum(high - value, 0)])
    known_spread = spread.sum(axis=0) > 0
    drawn.ax.errorbar(
        value[known_spread],
        y[known_spread],
        xerr=spread[:, known_spread],
        fmt="none",
        ecolor="black",
        capsize=3,
        lw=1.2,
    )
    drawn.ax.axvline(0, color="black", lw=0.8)
    drawn.ax.set_yticks(y, [plain(name) for name in rows["condition"]], fontsize=9)
    drawn.ax.set_ylim(rows.height - 0.4, -0.6)
    drawn.ax.set_xlabel(f"change in the {_said(rows['metric'][0])}", fontsize=9)
    head(drawn.ax, title_of(of))
    key(drawn.ax, {"intervention": BLUE, "baseline": ORANGE, "null": GREY}, set(colours))
    finish(drawn, show, save)
    return drawn.ax


def steering_curve(
    store: "FeatureStore",
    run: str | None = None,
    *,
    metric: str | None = None,
    over: Literal["dose", "n_features"] | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
    ax: "Axes | None" = None,
) -> "list[Axes]":
    """A metric along the doses and along the numbers of features, a panel each, with its 95 % interval.

    Each panel is the cross-section of the grid through the point that was chosen on `select` cells (ringed). Nulls and
    baselines stand where they were measured, at the chosen point; a null of several doses is a band.
    InputError for a run of one point.
    """
    of = steered_run(store, run)
    rows, point, panels = curve_of(of, metric, over)
    drawn = canvas(ax, (1.6 + 3.2 * len(panels), 3.6), show=show, save=save, n_panels=len(panels))
    for panel, (axis, section) in zip(drawn.axes, panels.items(), strict=True):
        handles, names = _draw_section(panel, section, axis, point)
        more = _draw_points(panel, rows, axis, point)
        panel.set_xlabel("dose" if axis == "dose" else "features edited", fontsize=9)
        panel.set_ylabel(_said(rows["metric"][0]), fontsize=9)
        panel.set_title(_held(axis, point), fontsize=9)
    handles, names = [*handles, *more[0]], [*names, *more[1]]
    beside(drawn.axes[-1], handles, [plain(name) for name in names])
    if drawn.own:
        drawn.figure.suptitle(title_of(of), fontsize=10)
    finish(drawn, show, save)
    return drawn.axes


def steering_pareto(
    store: "FeatureStore",
    run: str | None = None,
    *,
    x: str | None = None,
    y: str | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """What is gained against what it costs: two metrics, a line through the numbers of features and one through the
    doses at the chosen point, nulls and baselines as points with their 95 % intervals.

    Default: batch mixing against conservation of labels where these were measured (scIB's first), else the distance
    that remains against the steered cells' type accuracy. InputError where a metric is missing.
    """
    of = steered_run(store, run)
    first, second, points, point = trade_of(of, x, y)
    drawn = canvas(ax, (6.2, 4.2), show=show, save=save)
    handles: list[Any] = []
    names: list[str] = []
    for axis, colour, style in (("n_features", BLUE, "-"), ("dose", "#56B4E9", "--")):
        section = _section(points, point, axis)
        if section.height < 2:
            continue
        (line,) = drawn.ax.plot(section["value"], section["value_y"], style, marker="o", ms=4, color=colour, lw=1.4)
        handles.append(line)
        names.append("by number of features" if axis == "n_features" else "by dose")
        for row in section.iter_rows(named=True):
            # the ring says which point both lines share, and zero is that of both
            if axis == "dose" and (row[axis] == point[axis] or not row[axis]):
                continue
            text = f"{'dose ' if axis == 'dose' else ''}{row[axis]:g}"
            drawn.ax.annotate(
                text, (row["value"], row["value_y"]), xytext=(3, 3), textcoords="offset points", fontsize=7
            )
    ring = drawn.ax.scatter(point["value"], point["value_y"], s=90, facecolors="none", edgecolors="black", zorder=4)
    handles, names = [*handles, ring], [*names, "chosen on select cells"]
    others = points.filter(pl.col("role").is_in([*_POINT_ROLES, UNSTEERED]) & (pl.col("role") != "floor"))
    for i, row in enumerate(others.iter_rows(named=True)):
        handles.append(_cross(drawn.ax, row, i))
        names.append(row["condition"])
    drawn.ax.set_xlabel(_said(first), fontsize=9)
    drawn.ax.set_ylabel(_said(second), fontsize=9)
    beside(drawn.ax, handles, [plain(name) for name in names])
    head(drawn.ax, title_of(of), least=64)
    finish(drawn, show, save)
    return drawn.ax


def steering_distances(
    store: "FeatureStore",
    run: str | None = None,
    *,
    metric: str | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """The distance to the label that cells are moved toward, per cell type: before, after, and under each null.

    Types with the largest distance come first; the line runs from before to after. InputError for a run that moved
    nothing (`scsae steer --toward`).
    """
    of = steered_run(store, run)
    name, rows, before = types_of(of, metric)
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
    others = rows.filter(pl.col("role").is_in([_NULL_ROLE, "baseline", "floor"]))
    for i, condition in enumerate(others["condition"].unique(maintain_order=True)):
        part = others.filter((pl.col("condition") == condition) & pl.col("group").is_in(groups))
        colour = _mark_colour(part["role"][0], i)
        at = [place[group] for group in part["group"]]
        handles.append(
            drawn.ax.scatter(
                part["value"], at, s=26, marker=_MARKERS[i % len(_MARKERS)], color=colour, zorder=2, alpha=0.9
            )
        )
        names.append(condition)
    drawn.ax.set_yticks(y, [plain(group) for group in groups], fontsize=9)
    drawn.ax.set_ylim(len(groups) - 0.5, -0.5)
    drawn.ax.set_xlim(left=0)
    drawn.ax.set_xlabel(f"{_said(name)}; to {plain(of.plan.get('toward') or 'the reference')}", fontsize=9)
    beside(drawn.ax, handles, [plain(text) for text in names])
    head(drawn.ax, title_of(of), least=64)
    finish(drawn, show, save)
    return drawn.ax


def bars_of(of: Steered, metric: str | None = None) -> pl.DataFrame:
    """Rows that are drawn as bars. InputError if there are none."""
    rows = _of_all(of, _metric(of, metric, HEADLINES)).filter(pl.col("condition") != UNSTEERED)
    if "role" in rows.columns:
        rows = rows.filter((pl.col("role") != "grid") | pl.col("chosen")).sort(~pl.col("chosen"), maintain_order=True)
    if rows.is_empty():
        raise InputError(f"steering run {of.run} has no condition but the unsteered one; run `scsae steer` anew")
    return rows


def curve_of(
    of: Steered, metric: str | None = None, over: str | None = None
) -> tuple[pl.DataFrame, dict[str, Any], dict[str, pl.DataFrame]]:
    """Rows of a metric, the chosen point, and the cross-sections through it of several points. InputError if none."""
    rows = _of_all(of, _metric(of, metric, HEADLINES))
    _refuse_without(rows, _KEYS, of)
    point = _chosen(rows, of)
    panels = {axis: _section(rows, point, axis) for axis in ("dose", "n_features") if over in (None, axis)}
    panels = {axis: section for axis, section in panels.items() if section.height > 1}
    if not panels:
        raise InputError(
            f"steering run {of.run} measured one point on test cells; give `scsae steer` several --dose or --n-features"
        )
    return rows, point, panels


def trade_of(of: Steered, x: str | None = None, y: str | None = None) -> tuple[str, str, pl.DataFrame, dict[str, Any]]:
    """Two metrics, their rows side by side (`value`, `value_y`), and the chosen point. InputError without a pair."""
    known = set(of.rows["metric"])
    default = next(((a, b) for a, b in TRADES if {a, b} <= known), None)
    if default is None and (x is None or y is None):
        raise InputError(f"steering run {of.run} has no pair to trade; give x= and y= of {', '.join(sorted(known))}")
    first, second = (_metric(of, given, (taken,)) for given, taken in zip((x, y), default or ("", ""), strict=True))
    both = [_of_all(of, name) for name in (first, second)]
    for rows in both:
        _refuse_without(rows, _KEYS, of)
    points = both[0].join(both[1], on=[*_KEYS, "chosen"], suffix="_y", nulls_equal=True, maintain_order="left")
    return first, second, points, _chosen(points, of)


def types_of(of: Steered, metric: str | None = None) -> tuple[str, pl.DataFrame, pl.DataFrame]:
    """A distance, its rows by cell type, and those of unsteered cells, the largest first. InputError without types."""
    name = _metric(of, metric, DISTANCES)
    rows = of.rows.filter((pl.col("metric") == name) & (pl.col("group") != ALL))
    _refuse_without(rows, _KEYS, of)
    before = rows.filter(pl.col("condition") == UNSTEERED).sort("value", descending=True)
    if before.is_empty():
        raise InputError(f"steering run {of.run} has no {name} by cell type; see `SELECT * FROM steering`")
    return name, rows, before


def title_of(of: Steered) -> str:
    """What was done, in words."""
    plan = of.plan
    if not {"kind", "target"} <= plan.keys():
        return "Steering against its nulls, test cells"
    features = of.plan.get("features")
    point = of.rows.filter(pl.col("chosen")) if "chosen" in of.rows.columns else of.rows.clear()
    n = point["n_features"][0] if point.height else len(features) if features is not None else None
    counted = "" if n is None else f"{n} feature{'' if n == 1 else 's'} of "
    toward = f" toward {plain(plan['toward'])}" if plan.get("toward") else ""
    return f"Steering {counted}{words(plan['kind'])} {plain(plan['target'])}{toward}, test cells"


def _is_foreign(rows: pl.DataFrame, name: str) -> bool:
    return name in rows.columns and rows[name].null_count() == rows.height


def _metric(of: Steered, given: str | None, defaults: Sequence[str]) -> str:
    """The metric asked for, or the first default that was measured. InputError with the near one."""
    known = sorted(of.rows["metric"].unique().to_list())
    wanted = next((name for name in defaults if name in known), defaults[0]) if given is None else given
    if wanted not in known:
        raise InputError(f"no metric {wanted!r}{did_you_mean(wanted, known)}; metrics are {', '.join(known)}")
    return wanted


def _of_all(of: Steered, metric: str) -> pl.DataFrame:
    """Rows of a metric over all cells, not by group."""
    rows = of.rows.filter(pl.col("metric") == metric)
    return rows.filter(pl.col("group") == ALL) if "group" in rows.columns else rows


def _refuse_without(rows: pl.DataFrame, columns: Sequence[str], of: Steered) -> None:
    if missing := [name for name in columns if name not in rows.columns]:
        raise InputError(f"steering run {of.run} has no column {', '.join(missing)}; run `scsae steer` anew")


def _chosen(rows: pl.DataFrame, of: Steered) -> dict[str, Any]:
    chosen = rows.filter(pl.col("chosen"))
    if chosen.is_empty():
        raise InputError(f"steering run {of.run} has no chosen point; run `scsae steer` anew")
    return chosen.row(0, named=True)


def _section(rows: pl.DataFrame, point: Mapping[str, Any], axis: str) -> pl.DataFrame:
    """Points of the grid that differ from the chosen one along `axis` alone; the unsteered cells are its zero, but
    where a dose of 0 is not nothing (clamped or scaled to 0, a code is ablated).
    """
    other = "n_features" if axis == "dose" else "dose"
    grid = rows.filter((pl.col("role") == "grid") & pl.col(other).eq_missing(pl.lit(point[other])))
    changes_at_zero = axis == "dose" and not grid["intervention"].is_in(_NOTHING_AT_ZERO).all()
    if not changes_at_zero and grid.filter(pl.col(axis) == 0).is_empty():
        zero = rows.filter(pl.col("condition") == UNSTEERED).with_columns(pl.lit(0).cast(rows.schema[axis]).alias(axis))
        grid = pl.concat([zero, grid]) if grid.height > 1 else grid
    return grid.unique(axis, keep="last", maintain_order=True).sort(axis)


def _bounds(rows: pl.DataFrame, suffix: str = "") -> tuple[pl.Series, pl.Series]:
    """The interval of the value itself, from that of the effect; the value where there is none."""
    value, effect = (rows[f"{name}{suffix}"] for name in ("value", "effect"))
    low, high = ((rows[f"{name}{suffix}"] + value - effect).fill_null(value) for name in ("low", "high"))
    return low, high


def _draw_section(
    panel: "Axes", section: pl.DataFrame, axis: str, point: Mapping[str, Any]
) -> tuple[list[Any], list[str]]:
    x, (low, high) = section[axis].to_numpy(), _bounds(section)
    panel.fill_between(x, low, high, color=BLUE, alpha=0.18, lw=0)
    (line,) = panel.plot(x, section["value"], marker="o", ms=4, color=BLUE, lw=1.6)
    ring = panel.scatter([point[axis]], [point["value"]], s=90, facecolors="none", edgecolors="black", zorder=4)
    return [line, ring], [str(point["condition"]), "chosen on select cells"]


def _draw_points(panel: "Axes", rows: pl.DataFrame, axis: str, point: Mapping[str, Any]) -> tuple[list[Any], list[str]]:
    """Nulls and baselines: an error bar at their point beside the chosen one, a band where there are several."""
    others = rows.filter(pl.col("role").is_in(_POINT_ROLES))
    handles: list[Any] = []
    names = others["condition"].unique(maintain_order=True).to_list()
    step = 0.02 * (panel.get_xlim()[1] - panel.get_xlim()[0])
    for i, condition in enumerate(names):
        part = others.filter(pl.col("condition") == condition)
        colour = _mark_colour(part["role"][0], i)
        low, high = _bounds(part)
        if part["role"][0] in ("baseline", "floor"):
            handles.append(panel.axhline(part["value"][0], color=colour, ls=("--", ":", "-.")[i % 3], lw=1.3))
        elif part.height > 1 and part[axis].n_unique() > 1:
            part = part.sort(axis)
            handles.append(panel.fill_between(part[axis], *_bounds(part), color=colour, alpha=0.3, lw=0))
        else:
            at = point[axis] + step * (i + 1)
            value = part["value"][0]
            error = [[max(value - low[0], 0)], [max(high[0] - value, 0)]]
            marker = _MARKERS[i % len(_MARKERS)]
            handles.append(panel.errorbar([at], [value], yerr=error, fmt=marker, ms=5, color=colour, capsize=2, lw=1.1))
    return handles, names


def _cross(ax: "Axes", row: Mapping[str, Any], place: int) -> Any:
    """A point with the intervals of both its metrics."""
    frame = pl.DataFrame([row], infer_schema_length=None)
    errors = []
    for suffix in ("", "_y"):
        low, high = _bounds(frame, suffix)
        value = row[f"value{suffix}"]
        errors.append([[max(value - low[0], 0)], [max(high[0] - value, 0)]])
    colour = "black" if row["role"] == UNSTEERED else _mark_colour(row["role"], place)
    return ax.errorbar(
        [row["value"]],
        [row["value_y"]],
        xerr=errors[0],
        yerr=errors[1],
        fmt=_MARKERS[place % len(_MARKERS)],
        ms=6,
        color=colour,
        lw=0.9,
        capsize=2,
    )


def _mark_colour(role: str, place: int) -> str:
    """Grey for nulls and reconstruction, which the marker tells apart; a colour each for baselines."""
    if role == _NULL_ROLE:
        return GREY
    if role in ("reconstruction", "replace", "floor"):
        return "#555555"
    return [colour for colour in OKABE_ITO if colour not in (BLUE, "#000000", "#F0E442", "#56B4E9")][place % 4]


def _colour(row: Mapping[str, Any]) -> str:
    """Grey for a null, orange for a baseline, blue for what was done."""
    if "role" not in row:
        # of results without roles, a null is what a column of p is named after
        return GREY if f"{_P}{row['condition']}" in row else BLUE
    return {_NULL_ROLE: GREY, "baseline": ORANGE, "floor": ORANGE}.get(row["role"], BLUE)


def _held(axis: str, point: Mapping[str, Any]) -> str:
    """What the panel keeps fixed."""
    if axis == "dose":
        return f"{point['n_features']} features"
    return "" if point["dose"] is None else f"dose {point['dose']:g}"


def _said(metric: str) -> str:
    return plain(metric_of(metric).description)
