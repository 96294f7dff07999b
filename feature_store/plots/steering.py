"""An intervention beside its nulls."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from feature_store.commit import Run
from feature_store.errors import InputError
from feature_store.hints import did_you_mean
from feature_store.plots.canvas import BLUE, GREY, canvas, finish, head, key, plain, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from feature_store.query import FeatureStore

_UNSTEERED = "unsteered"
_P = "p_"
"""A column p_NAME holds the p of every condition against the null NAME."""
_MEANING = {
    "target_votes": "change in the share of target-type neighbours",
    "other_votes": "change in the other cells' share of target-type neighbours",
    "other_accuracy": "change in the kNN accuracy of the other cells",
    "target_shift": "mean shift of the target cells' embedding",
    "other_shift": "mean shift of the other cells' embedding",
}


def steering_bars(
    store: "FeatureStore",
    run: str | None = None,
    *,
    metric: str = "target_votes",
    show: bool | None = None,
    save: str | Path | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """The effect of each condition of a steering run on a metric, less the unsteered value, with its 95 % interval.

    `run` names one (or the beginning of its id), None takes the newest. Nulls are grey. InputError for an unknown
    run or metric.
    """
    table = store.frame("steering").collect()
    runs = list(dict.fromkeys(store.lineage.steering))
    chosen = [known for known in runs if known.startswith(run or "")]
    if not chosen or (run is not None and len(chosen) > 1):
        raise InputError(f"{run!r} names {len(chosen) or 'none'} of the steering runs {', '.join(runs)}")
    mine = table.filter(pl.col("run") == chosen[0])
    rows = mine.filter((pl.col("metric") == metric) & (pl.col("condition") != _UNSTEERED))
    if rows.is_empty():
        known = sorted(mine["metric"].unique().to_list())
        raise InputError(f"no metric {metric!r}{did_you_mean(metric, known)}; metrics are {', '.join(known)}")
    nulls = [name.removeprefix(_P) for name in table.columns if name.startswith(_P)]
    value = rows["effect"].to_numpy()
    low, high = (rows[name].fill_null(rows["effect"]).to_numpy() for name in ("low", "high"))
    colours = np.where(rows["condition"].is_in(nulls).to_numpy(), GREY, BLUE).tolist()
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
    drawn.ax.set_xlabel(_MEANING.get(metric, words(metric)), fontsize=9)
    head(drawn.ax, _title(store, chosen[0]))
    key(drawn.ax, {"intervention": BLUE, "null": GREY}, set(colours))
    finish(drawn, show, save)
    return drawn.ax


def _title(store: "FeatureStore", run: str) -> str:
    plan = Run.open(store.layout.steering_dir(run) / "results").plan
    if not {"kind", "target", "features"} <= plan.keys():
        return "Steering against its nulls, test cells"
    return f"Steering {len(plan['features'])} features of {words(plan['kind'])} {plain(plan['target'])}, test cells"
