"""The report of a finished steering run: the numbers that the stage prints, and its plots."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from feature_store.query.metrics import HEADLINE_OF_TASK
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
    return facts
