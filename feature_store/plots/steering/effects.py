"""The effect of each condition of a steering run, beside its nulls and baselines."""

import textwrap
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from feature_store.associations.claims import least_p, too_few_draws
from feature_store.errors import InputError
from feature_store.plots.canvas import BLUE, DARK_GREY, GREY, INTERVAL, ORANGE, canvas, finish, head, key, plain
from feature_store.plots.steering.rows import check_columns, measured_metric, metric_words, title_of
from feature_store.query.metrics import HEADLINES
from feature_store.query.steering import (
    Role,
    SteeringResults,
    of_all_cells,
    of_role,
    p_column,
    steering_results,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from feature_store.plots.canvas import Save
    from feature_store.query.store import FeatureStore

GREEN = "#009E73"
_HATCH = "////"
_ROUNDING = 1e-9


class Verdict(Enum):
    """Why the p of a condition against one of the nulls is above alpha."""

    BEHIND = "some draws do at least as well"
    AHEAD = "no draw does as well, but they are too few for a smaller p"


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
    one of the nulls is above alpha, and hatched if that is so only because the draws are too few for any p <= alpha: it
    is ahead of every draw, and the key says which p is the best.

    Raises InputError for an unknown run or metric.
    """
    from matplotlib.patches import Patch

    results = steering_results(store, run)
    rows = bar_rows(results, metric)
    value = rows["effect"].to_numpy()
    low, high = (rows[name].fill_null(rows["effect"]).to_numpy() for name in ("low", "high"))
    colours = [_colour(row["role"]) for row in rows.iter_rows(named=True)]
    verdicts = against_nulls(rows, alpha)
    y = np.arange(rows.height)
    drawn = canvas(ax, (6.6, 1.3 + 0.4 * rows.height), show=show, save=save)
    faces = [colour if verdict is None else "none" for colour, verdict in zip(colours, verdicts, strict=True)]
    hatches = [_HATCH if verdict is Verdict.AHEAD else "" for verdict in verdicts]
    drawn.ax.barh(y, value, color=faces, edgecolor=colours, hatch=hatches, height=0.65)
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
    more: dict[str, Any] = {}
    if Verdict.AHEAD in verdicts:
        few = too_few_draws(of_role(rows, Role.NULL)["n_draws"].min(), alpha)  # type: ignore[arg-type]
        more[textwrap.fill(f"ahead of every draw; {few}", 26)] = Patch(fill=False, hatch=_HATCH)
    if Verdict.BEHIND in verdicts:
        more[f"p > {alpha:g} against a null"] = Patch(fill=False)
    more |= {INTERVAL: whiskers} if known_spread.any() else {}
    colours_of = {
        "intervention": BLUE,
        "baseline": ORANGE,
        "null": GREY,
        "reconstruction": DARK_GREY,
        "sampling noise": GREEN,
    }
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
    """Grey for a null, dark grey for a reconstruction, green for the floor that sampling noise leaves, orange for a
    baseline, blue for the intervention.
    """
    baseline = dict.fromkeys((Role.BASELINE, Role.BASELINE_DOSE), ORANGE)
    return {Role.NULL: GREY, Role.RECONSTRUCTION: DARK_GREY, Role.FLOOR: GREEN, **baseline}.get(role, BLUE)  # type: ignore[call-overload,no-any-return]


def against_nulls(rows: pl.DataFrame, alpha: float) -> list[Verdict | None]:
    """What p > alpha means for each row; None where no p of it against a null is above alpha."""
    nulls = of_role(rows, Role.NULL).group_by("condition").agg(pl.col("n_draws").max())
    least = {p_column(name): least_p(n_draws) for name, n_draws in nulls.drop_nulls().iter_rows()}
    against = [name for name in rows.columns if name.startswith("p_")]
    verdicts: list[Verdict | None] = []
    for row in rows.select(against).iter_rows(named=True):
        above = {name: p for name, p in row.items() if p is not None and p > alpha}
        is_ahead = all(p <= least.get(name, 0) + _ROUNDING for name, p in above.items())
        verdicts.append((Verdict.AHEAD if is_ahead else Verdict.BEHIND) if above else None)
    return verdicts
