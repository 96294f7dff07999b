"""The effect of each condition of a steering run, beside its nulls and baselines."""

from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from feature_store.errors import InputError
from feature_store.plots.canvas import BLUE, DARK_GREY, GREY, INTERVAL, ORANGE, canvas, finish, head, key, plain
from feature_store.plots.steering.rows import check_columns, measured_metric, metric_words, title_of
from feature_store.query.metrics import HEADLINES
from feature_store.query.steering import Role, SteeringResults, of_all_cells, steering_results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from feature_store.plots.canvas import Save
    from feature_store.query.store import FeatureStore


def steering_bars(
    store: "FeatureStore",
    run: str | None = None,
    *,
    metric: str | None = None,
    alpha: float = 0.05,
    show: bool | None = None,
    save: "Save | None" = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """The effect of each condition of a steering run on a metric, less the unsteered value, with its 95 % interval.

    `run` is an id or the beginning of one; None takes the newest run. `metric` None takes the metric that answers the
    question of the run. Of the grid only the chosen point is drawn. Nulls are grey. A bar is hollow if its p against
    one of the nulls is above alpha.

    Raises InputError for an unknown run or metric.
    """
    from matplotlib.patches import Patch

    results = steering_results(store, run)
    rows = bar_rows(results, metric)
    value = rows["effect"].to_numpy()
    low, high = (rows[name].fill_null(rows["effect"]).to_numpy() for name in ("low", "high"))
    colours = [_colour(row["role"]) for row in rows.iter_rows(named=True)]
    unsure = _is_unsure(rows, alpha)
    y = np.arange(rows.height)
    drawn = canvas(ax, (6.6, 1.3 + 0.4 * rows.height), show=show, save=save)
    faces = ["none" if is_unsure else colour for colour, is_unsure in zip(colours, unsure, strict=True)]
    drawn.ax.barh(y, value, color=faces, edgecolor=colours, height=0.65)
    spread = np.stack([np.maximum(value - low, 0), np.maximum(high - value, 0)])
    known_spread = spread.sum(axis=0) > 0
    whiskers = drawn.ax.errorbar(
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
    drawn.ax.set_xlabel(f"change in the {metric_words(rows['metric'][0])}", fontsize=9)
    head(drawn.ax, title_of(results))
    more: dict[str, Any] = {f"p > {alpha:g} against a null": Patch(fill=False)} if any(unsure) else {}
    more |= {INTERVAL: whiskers} if known_spread.any() else {}
    colours_of = {"intervention": BLUE, "baseline": ORANGE, "null": GREY, "reconstruction": DARK_GREY}
    key(drawn.ax, colours_of, set(colours), more)
    finish(drawn, store, show, save, ("steering", results.run))
    return drawn.ax


def bar_rows(results: SteeringResults, metric: str | None = None) -> pl.DataFrame:
    """The rows that `steering_bars` draws: the chosen point first, then the other conditions over all cells.

    Raises InputError where there are none.
    """
    rows = of_all_cells(results.rows, measured_metric(results, metric, HEADLINES))
    check_columns(rows, results, ("role", "chosen"))
    points = pl.col("role").is_in([Role.GRID.value, Role.BASELINE_DOSE.value])
    rows = rows.filter((pl.col("role") != Role.UNSTEERED) & (~points | pl.col("chosen")))
    if rows.is_empty():
        raise InputError(f"steering run {results.run} has no condition but the unsteered one; run `scsae steer` again")
    return rows.sort(~pl.col("chosen"), maintain_order=True)


def _colour(role: str) -> str:
    """Grey for a null, dark grey for a reconstruction, orange for a baseline, blue for the intervention."""
    baseline = dict.fromkeys((Role.BASELINE, Role.BASELINE_DOSE, Role.FLOOR), ORANGE)
    return {Role.NULL: GREY, Role.RECONSTRUCTION: DARK_GREY, **baseline}.get(role, BLUE)  # type: ignore[call-overload,no-any-return]


def _is_unsure(rows: pl.DataFrame, alpha: float) -> list[bool]:
    """Whether the largest p of each row, of those against each null, is above alpha; false where there is none."""
    against = [name for name in rows.columns if name.startswith("p_")]
    if not against:
        return [False] * rows.height
    return rows.select((pl.max_horizontal(against) > alpha).fill_null(value=False)).to_series().to_list()
