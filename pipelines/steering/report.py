"""The report of a finished steering run: the numbers that the stage prints, and its plots."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from feature_store.associations.claims import ALPHA, ENOUGH_DRAWS, least_p, too_few_draws
from feature_store.query.metrics import HEADLINE_OF_TASK, metric_of
from feature_store.query.steering import Role, of_role
from pipelines.steering.plan import ALL, MEAN_DIFFERENCE, UNSTEERED, Null, Task, Variant
from pipelines.steering.request import SteeringRequest


def drawings_of(request: SteeringRequest, run: str) -> dict[str, Callable[[Path], object]]:
    """The functions that draw the plots of a finished run, by name."""
    from feature_store import FeatureStore
    from feature_store.plots.steering import steering_drawings

    found = FeatureStore.open(request.layout.root, associations=request.chain.run)
    return dict(steering_drawings(found, run))


def facts_of(request: SteeringRequest, chosen: Variant, results: pl.DataFrame) -> dict[str, Any]:
    """The numbers that the stage prints: the headline metric of the task, with its nulls and baseline."""
    metric = HEADLINE_OF_TASK[request.task.type]
    rows = results.filter(split="test", group=ALL, metric=metric)
    own = rows.filter("chosen").row(0, named=True)
    facts: dict[str, Any] = {"target": request.task.text, "features": list(chosen.features)}
    if request.steers_vectors:
        facts["steered"] = (
            f"the given vectors of {request.chain.activations.model} themselves: no model ran behind them"
        )
    if request.task.type is Task.EDIT:
        facts["effect on target_votes"] = own["effect"]
        facts["95 % interval"] = [own["low"], own["high"]]
    else:
        facts["intervention"] = f"{chosen.intervention}, {len(chosen.features)} features, dose {chosen.dose:g}"
        for name in (UNSTEERED, *(null.value for null in Null), MEAN_DIFFERENCE):
            found = rows.filter(condition=name)["value"]
            if len(found) and found[0] is not None:
                facts[f"{metric} of {name}"] = found[0]
        facts[metric] = own["value"]
    for null in Null:
        if (p := own[null.column]) is not None:
            facts[f"p against {null}"] = p
    if few := few_nulls(own, request.options.n_nulls):
        facts["nulls"] = few
    if (rival := best_rival(rows, metric)) is not None and is_better(metric, rival["value"], own["value"]):
        facts["does better"] = f"{rival['condition']}, which needs no features: {metric} {rival['value']:.3g}"
    if still := unmoved_types(results):
        facts["not moved"] = f"{', '.join(still)}: train and select cells show no difference for them" + (
            "" if request.by == "other_types" else "; --by other_types takes that of the other types"
        )
    if worse := worsened(results.filter(pl.col("chosen") & (pl.col("metric") != metric), split="test", group=ALL)):
        facts["became worse"] = worse
    return facts


def few_nulls(own: Mapping[str, Any], n_draws: int) -> str | None:
    """What the p of the chosen point mean where its nulls have too few draws for a p of ALPHA; None where they do not.

    `own`: the row of the chosen point, with a column of p for each null; `n_draws`: draws of each null.
    """
    measured = {null: own[null.column] for null in Null if own[null.column] is not None}
    few = too_few_draws(n_draws)
    if not measured or few is None:
        return None
    beaten = [null for null, p in measured.items() if p <= least_p(n_draws) * (1 + 1e-9)]
    others = [null for null in measured if null not in beaten]
    said = [f"the effect is ahead of every draw of {' and '.join(beaten)}"] if beaten else []
    said += [f"the effect is not ahead of every draw of {' and '.join(others)}"] if others else []
    return f"{few}; {'; '.join(said)}; --n-nulls {ENOUGH_DRAWS} is the fewest with which p can be {ALPHA:g}"


def unmoved_types(results: pl.DataFrame) -> list[str]:
    """The types whose target cells stay where they are at the chosen point of a move, for want of group means."""
    rows = results.filter(pl.col("chosen") & (pl.col("group") != ALL), split="test", metric="target_shift", value=0.0)
    return rows.filter(pl.col("intervention").is_in(["shift", "toward"]) & (pl.col("dose") != 0))["group"].to_list()


def best_rival(rows: pl.DataFrame, metric: str) -> dict[str, Any] | None:
    """The baseline with the best value of a metric, among rows of this metric; None where none was measured."""
    found = list(of_role(rows, Role.BASELINE).drop_nulls("value").iter_rows(named=True))
    gains = [metric_of(metric).gain(row["value"]) for row in found]
    known = [(gain, -place) for place, gain in enumerate(gains) if gain is not None]
    return found[-max(known)[1]] if known else None


def is_better(metric: str, value: float, than: float) -> bool:
    """Whether a value of a metric is better than another; False where it has no better direction."""
    one, other = (metric_of(metric).gain(each) for each in (value, than))
    return one is not None and other is not None and one > other


def worsened(rows: pl.DataFrame) -> list[str]:
    """The metrics that became worse beyond the 95 % interval of their change, with their values before and after."""
    found = []
    for row in rows.drop_nulls(["effect", "low", "high"]).iter_rows(named=True):
        gains = [metric_of(row["metric"]).gain(row[end]) for end in ("low", "high")]
        if all(gain is not None and gain < 0 for gain in gains):
            found.append(f"{row['metric']} {row['value'] - row['effect']:.3g} -> {row['value']:.3g}")
    return found
