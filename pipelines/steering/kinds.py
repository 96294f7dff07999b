"""The kind of edit of a mixing, where none is named: every kind is searched on `select` cells and reported on `test`.

Each kind is a steering run of its own, with its search, nulls and baselines. The best kind is that of the best point
over all grids by the rule of `dose_selection`: it mixes most among those that keep the cell types. Its run is finished
last, so that it is the newest, which other commands take.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from feature_store.query.steering import ALL
from pipelines.config import SteerOptions
from pipelines.steering.dose_selection import MAX_LOSS, best_mixing, keeps_types
from pipelines.steering.metrics.mixing import QuickMixing
from pipelines.steering.plan import InterventionType

KINDS = (InterventionType.ABLATE, InterventionType.SCALE, InterventionType.TOWARD, InterventionType.SHIFT)
HALF = 0.5
"""The dose of scale where no dose below 1 was given: at 1 it changes nothing."""


@dataclass(frozen=True, kw_only=True)
class KindOnSelect:
    """The scores of the best point of a kind on `select` cells, and those of the unsteered cells."""

    kind: InterventionType
    score: QuickMixing
    unsteered: QuickMixing


def searches_kinds(options: SteerOptions) -> bool:
    """Whether the kind of edit is to be searched."""
    return options.target == ALL and options.intervention is None


def options_of(options: SteerOptions, kind: InterventionType) -> SteerOptions:
    """The options of a run of one kind, with the doses and means that it has."""
    dose = options.dose
    if kind is InterventionType.ABLATE:
        dose = (1.0,)
    elif kind is InterventionType.SCALE:
        dose = tuple(value for value in options.dose if value < 1) or (HALF,)
    by = options.by if kind.needs_group_means else None
    return options.model_copy(update={"intervention": kind.value, "dose": dose, "by": by})


def best_kind(found: Sequence[KindOnSelect]) -> KindOnSelect:
    """The kind whose best point is the best of all; of equal ones the first."""
    return best_mixing([(one, one.score) for one in found], found[0].unsteered)


def facts_of_choice(best: KindOnSelect) -> dict[str, str]:
    """What is wrong with the best kind on `select` cells, so that it was taken for want of a better one."""
    facts = {}
    score, unsteered = best.score, best.unsteered
    if not keeps_types(score, unsteered):
        facts["conservation on select cells"] = (
            f"{score.conservation:.3f} of {unsteered.conservation:.3f}: every point of every kind loses more than "
            f"{MAX_LOSS:.0%}, and the one that loses least was taken; give smaller --n-features or --dose"
        )
    if score.mixing is not None and unsteered.mixing is not None and score.mixing <= unsteered.mixing:
        facts["mixing on select cells"] = (
            f"{score.mixing:.3f}, unsteered {unsteered.mixing:.3f}: no kind of edit that keeps the types mixes better"
        )
    return facts


def facts_of_kinds(results: dict[InterventionType, pl.DataFrame]) -> dict[str, str]:
    """For each kind, what it did on `test` cells: mixing and conservation, and their changes."""
    facts = {}
    for kind, table in results.items():
        own = table.filter(pl.col("chosen"), split="test", group=ALL)
        words = []
        for metric in ("batch_mixing", "label_conservation"):
            for value, effect in own.filter(metric=metric).select("value", "effect").drop_nulls().iter_rows():
                words.append(f"{metric} {value:.3f} ({effect:+.3f})")
        facts[f"{kind.value} on test cells"] = ", ".join(words)
    return facts
