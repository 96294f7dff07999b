"""Metrics of a steering run along its doses and its numbers of features, and one metric against another."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import polars as pl

from feature_store.errors import InputError
from feature_store.plots.canvas import BLUE, INTERVAL, ORANGE, beside, canvas, finish, head, head_all, name_dots, plain
from feature_store.plots.steering.rows import (
    BESIDE,
    KEYS,
    MARKERS,
    check_columns,
    chosen_point,
    interval,
    mark_colour,
    measured_metric,
    metric_words,
    section,
    title_of,
)
from feature_store.query.metrics import HEADLINES
from feature_store.query.steering import ALL, Role, SteeringResults, of_all_cells, of_role, steering_results
from feature_store.query.suggestions import did_you_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from feature_store.plots.canvas import Save
    from feature_store.query.store import FeatureStore

TRADES = (("scib_bio", "scib_batch"), ("label_conservation", "batch_mixing"), ("type_accuracy", "remaining"))
"""Pairs of metrics that are drawn against each other, the first pair that was measured."""


def steering_curve(
    store: "FeatureStore",
    run: str | None = None,
    *,
    metric: str | None = None,
    over: Literal["dose", "n_features"] | None = None,
    show: bool | None = None,
    save: "Save | None" = None,
    ax: "Axes | None" = None,
) -> "list[Axes]":
    """A metric along the doses and along the numbers of features, a panel each, with its 95 % interval.

    Each panel is the cross-section of the grid through the point that was chosen on `select` cells (ringed). Nulls and
    baselines stand where they were measured, at the chosen point; a null of several doses is a band. Raises InputError
    for a run of one point.
    """
    results = steering_results(store, run)
    rows, point, panels = curve_rows(results, metric, over)
    drawn = canvas(ax, (4.2, 3.8), show=show, save=save, n_panels=len(panels))
    for panel, (axis, part) in zip(drawn.axes, panels.items(), strict=True):
        handles, names = _draw_section(panel, part, axis, point)
        more = _draw_points(panel, rows, axis, point)
        panel.set_xlabel("dose" if axis == "dose" else "features edited", fontsize=9)
        panel.set_ylabel(metric_words(rows["metric"][0]), fontsize=9)
        panel.set_title(_held(axis, point), fontsize=9, loc="left")
    handles, names = [*handles, *more[0]], [*names, *more[1]]
    beside(drawn.axes[-1], handles, [plain(name) for name in names])
    head_all(drawn, title_of(results))
    finish(drawn, store, show, save, ("steering", results.run))
    return drawn.axes


def steering_pareto(
    store: "FeatureStore",
    run: str | None = None,
    *,
    x: str | None = None,
    y: str | None = None,
    group: str = ALL,
    show: bool | None = None,
    save: "Save | None" = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """The gain of a run against its cost: two metrics, a line through the numbers of features and one through the doses
    at the chosen point, one through the doses of the mean difference, nulls and baselines as points with their 95 %
    intervals.

    By default batch mixing is drawn against conservation of labels where both were measured (scIB's first), else the
    distance that remains against the steered cells' type accuracy. `group` is the cell type whose values are drawn;
    default: all cells. Raises InputError where a metric or group is missing.
    """
    results = steering_results(store, run)
    first, second, points, point = trade_rows(results, x, y, group)
    drawn = canvas(ax, (6.2, 4.2), show=show, save=save)
    handles: list[Any] = []
    names: list[str] = []
    named: list[tuple[float, float, list[str]]] = []
    for axis, colour, style in (("n_features", BLUE, "-"), ("dose", "#56B4E9", "--")):
        part = section(points, point, axis)
        if part.height < 2:
            continue
        (line,) = drawn.ax.plot(part["value"], part["value_y"], style, marker="o", ms=4, color=colour, lw=1.4)
        handles.append(line)
        names.append("by number of features" if axis == "n_features" else "by dose")
        for row in part.iter_rows(named=True):
            # careful: the ring marks the point that both lines share, and zero is the same point on both
            if axis == "dose" and (row[axis] == point[axis] or not row[axis]):
                continue
            named.append((row["value"], row["value_y"], [f"{'dose ' if axis == 'dose' else ''}{row[axis]:g}"]))
    baseline = _baseline_doses(points)
    if baseline.height > 1:
        (line,) = drawn.ax.plot(baseline["value"], baseline["value_y"], "-.", marker="o", ms=4, color=ORANGE, lw=1.2)
        handles, names = [*handles, line], [*names, f"{baseline['condition'][-1]}, by dose"]
        for row in baseline.filter(role=Role.BASELINE_DOSE.value).iter_rows(named=True):
            named.append((row["value"], row["value_y"], [f"{row['dose']:g}"]))
    ring = drawn.ax.scatter(point["value"], point["value_y"], s=90, facecolors="none", edgecolors="black", zorder=4)
    handles, names = [*handles, ring], [*names, "chosen on select cells"]
    others = of_role(points, Role.UNSTEERED, *(role for role in BESIDE if role != Role.FLOOR))
    for i, row in enumerate(others.iter_rows(named=True)):
        handles.append(_cross(drawn.ax, row, i))
        names.append(row["condition"])
    drawn.ax.set_xlabel(metric_words(first), fontsize=9)
    drawn.ax.set_ylabel(metric_words(second), fontsize=9)
    beside(drawn.ax, handles, [plain(name) for name in names])
    head(drawn.ax, title_of(results) + ("" if group == ALL else f", {plain(group)}"), least=64)
    name_dots(drawn.ax, named)
    finish(drawn, store, show, save, ("steering", results.run))
    return drawn.ax


def curve_rows(
    results: SteeringResults, metric: str | None = None, over: str | None = None
) -> tuple[pl.DataFrame, dict[str, Any], dict[str, pl.DataFrame]]:
    """The rows of a metric, the chosen point, and by axis the cross-sections through it that have several points.

    Raises InputError where no cross-section has several points.
    """
    rows = of_all_cells(results.rows, measured_metric(results, metric, HEADLINES))
    check_columns(rows, results)
    point = chosen_point(rows, results)
    panels = {axis: section(rows, point, axis) for axis in ("dose", "n_features") if over in (None, axis)}
    panels = {axis: part for axis, part in panels.items() if part.height > 1}
    if not panels:
        raise InputError(
            f"steering run {results.run} measured one point on test cells, which is no curve; give `scsae steer` "
            "several --dose or --n-features"
        )
    return rows, point, panels


def trade_rows(
    results: SteeringResults, x: str | None = None, y: str | None = None, group: str = ALL
) -> tuple[str, str, pl.DataFrame, dict[str, Any]]:
    """Two metrics of a group, their rows side by side (`value`, `value_y`), and the chosen point.

    Raises InputError where no pair of TRADES was measured and none is named, or where the group has no values of both.
    """
    known = set(results.rows["metric"])
    default = next(((a, b) for a, b in TRADES if {a, b} <= known), None)
    if default is None and (x is None or y is None):
        raise InputError(
            f"steering run {results.run} measured no pair of metrics that is drawn by default; "
            f"name two with x= and y=: {', '.join(sorted(known))}"
        )
    pairs = zip((x, y), default or ("", ""), strict=True)
    first, second = (measured_metric(results, given, (taken,)) for given, taken in pairs)
    both = [_of_group(results, name, group) for name in (first, second)]
    for rows in both:
        check_columns(rows, results)
    points = both[0].join(both[1], on=[*KEYS, "chosen"], suffix="_y", nulls_equal=True, maintain_order="left")
    return first, second, points, chosen_point(points, results)


def _of_group(results: SteeringResults, metric: str, group: str) -> pl.DataFrame:
    """The rows of a metric of a cell type, or of all cells. Raises InputError where there are none."""
    if group == ALL:
        return of_all_cells(results.rows, metric)
    check_columns(results.rows, results, ("group",))
    of_metric = results.rows.filter(metric=metric)
    if (rows := of_metric.filter(group=group)).is_empty():
        known = sorted(of_metric["group"].unique())
        raise InputError(
            f"steering run {results.run} has no {metric} of {group!r}{did_you_mean(group, known)}; it has that of "
            f"{', '.join(known)}"
        )
    return rows


def _baseline_doses(points: pl.DataFrame) -> pl.DataFrame:
    """The unsteered cells and a baseline at each of its doses, ascending; the unsteered cells alone if it has one."""
    doses = of_role(points, Role.BASELINE_DOSE)
    one = of_role(points, Role.BASELINE).filter(pl.col("condition").is_in(doses["condition"].implode()))
    zero = of_role(points, Role.UNSTEERED).with_columns(dose=pl.lit(0.0))
    return pl.concat([zero, one, doses]).sort("dose")


def _draw_section(
    panel: "Axes", part: pl.DataFrame, axis: str, point: Mapping[str, Any]
) -> tuple[list[Any], list[str]]:
    x, (low, high) = part[axis].to_numpy(), interval(part)
    band = panel.fill_between(x, low, high, color=BLUE, alpha=0.18, lw=0)
    (line,) = panel.plot(x, part["value"], marker="o", ms=4, color=BLUE, lw=1.6)
    ring = panel.scatter([point[axis]], [point["value"]], s=90, facecolors="none", edgecolors="black", zorder=4)
    return [line, band, ring], [str(point["condition"]), f"its {INTERVAL}", "chosen on select cells"]


def _draw_points(panel: "Axes", rows: pl.DataFrame, axis: str, point: Mapping[str, Any]) -> tuple[list[Any], list[str]]:
    """Draw nulls as error bars beside the chosen point, or as bands over several doses, and baselines as lines."""
    others = of_role(rows, *BESIDE)
    handles: list[Any] = []
    names = others["condition"].unique(maintain_order=True).to_list()
    step = 0.02 * (panel.get_xlim()[1] - panel.get_xlim()[0])
    for i, condition in enumerate(names):
        part = others.filter(pl.col("condition") == condition)
        colour = mark_colour(part["role"][0], i)
        low, high = interval(part)
        if part["role"][0] in (Role.BASELINE, Role.FLOOR):
            handles.append(panel.axhline(part["value"][0], color=colour, ls=("--", ":", "-.")[i % 3], lw=1.3))
        elif part.height > 1 and part[axis].n_unique() > 1:
            part = part.sort(axis)
            handles.append(panel.fill_between(part[axis], *interval(part), color=colour, alpha=0.3, lw=0))
        else:
            at = point[axis] + step * (i + 1)
            value = part["value"][0]
            error = [[max(value - low[0], 0)], [max(high[0] - value, 0)]]
            marker = MARKERS[i % len(MARKERS)]
            handles.append(panel.errorbar([at], [value], yerr=error, fmt=marker, ms=5, color=colour, capsize=2, lw=1.1))
    return handles, names


def _cross(ax: "Axes", row: Mapping[str, Any], place: int) -> Any:
    """Draw a point with the intervals of both its metrics."""
    frame = pl.DataFrame([row], infer_schema_length=None)
    errors = []
    for suffix in ("", "_y"):
        low, high = interval(frame, suffix)
        value = row[f"value{suffix}"]
        errors.append([[max(value - low[0], 0)], [max(high[0] - value, 0)]])
    colour = "black" if row["role"] == Role.UNSTEERED else mark_colour(row["role"], place)
    return ax.errorbar(
        [row["value"]],
        [row["value_y"]],
        xerr=errors[0],
        yerr=errors[1],
        fmt=MARKERS[place % len(MARKERS)],
        ms=6,
        color=colour,
        lw=0.9,
        capsize=2,
    )


def _held(axis: str, point: Mapping[str, Any]) -> str:
    """What stays the same along a panel, in words."""
    if axis == "dose":
        return f"{point['n_features']} features"
    return "" if point["dose"] is None else f"dose {point['dose']:g}"
