"""The results of a steering run from its stored embeddings: every metric of every condition, compared with nulls.

An effect is the value of a condition minus the unsteered value. Intervals are 95 % intervals of the effect: for a
single variant over subsamples of the cells of each donor, cell type and label, for a null Student's t over its draws.
`p_<null>` is the share of the null's draws whose effect is at least as good, counting the condition itself; it is given
for the conditions at the point where the nulls were drawn. Cells without a label or a token are left out.

On `test` cells the table also holds conditions that need no model: `floor` (the distance that sampling noise alone
leaves), the mean difference of embeddings learned on the cells of the other splits, and, for mix, centring and Harmony,
which use the batches of the test cells. Rows of role `trend` say whether a metric follows the dose and the number of
features.

Cost: .3 s per variant for 1,000 test cells. scIB's scores (`scib`) take 10 s and more, so they are computed only for
the chosen variant, the reconstruction, the baselines and 3 draws of each null.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from feature_store.query.metrics import HEADLINE_OF_TASK, Direction, metric_of
from feature_store.query.steering import Role
from feature_store.storage import schemas
from pipelines.steering import embedding_baselines
from pipelines.steering.embeddings import SteeredEmbeddings
from pipelines.steering.evaluation_cells import ALL, EvaluationCells, MetricValue
from pipelines.steering.evaluators import Evaluator, MixEvaluator, MoveEvaluator, evaluator_of
from pipelines.steering.group_means import By
from pipelines.steering.metrics.dose_response import dose_response
from pipelines.steering.metrics.intervals import Floats, rank_p, student
from pipelines.steering.plan import Null, SteeringTask, Task, Variant

N_COSTLY = 3
"""Number of draws of each null for which scIB's scores are computed."""
FLOOR, EMBEDDING_DIFFERENCE = "floor", "mean difference of embeddings"
_COMPARED = (Role.REPLACE, Role.RECONSTRUCTION, Role.BASELINE)
"""The roles, besides the chosen variant, whose effects are ranked among the draws of the nulls."""
_BASELINES = (Role.BASELINE, Role.BASELINE_DOSE)
CENTRING, CENTRING_WITHIN, HARMONY = "centring", "centring within types", "Harmony"

Values = dict[tuple[str, str], MetricValue]
"""The metrics of one condition by (metric, group)."""


@dataclass(frozen=True, kw_only=True)
class _Condition:
    """One condition and the metrics of its draws."""

    name: str
    role: Role
    intervention: str | None = None
    n_features: int | None = None
    dose: float | None = None
    chosen: bool = False
    draws: list[Values] = field(default_factory=list)


def evaluate(
    task: SteeringTask,
    variants: Sequence[Variant],
    embedded: SteeredEmbeddings,
    *,
    split: str,
    seed: int,
    scib: bool = False,
    by: By | None = None,
    n_samples: int | None = None,
) -> pl.DataFrame:
    """The rows of `results` of one split, every metric of every condition, from its cells and unsteered `train` cells.

    Args:
        task: the steering task.
        variants: the variants, unsteered first.
        embedded: their embeddings, and those of unsteered `train` cells.
        split: the split whose cells are evaluated.
        seed: the seed of subsamples, halves and Harmony.
        scib: whether to compute scIB's scores too (mix alone; needs the extra `evaluate`).
        by: the grouping of the group means; with other_types, the mean difference of embeddings is of the other types.
        n_samples: the number of subsamples behind an interval; default: 500.
    """
    own = (embedded.labels.split == split) & ~embedded.is_left(task)
    cells = _evaluation_cells(embedded, own, seed, n_samples)
    evaluator = evaluator_of(task, cells)
    under = {variant.id: embedded.under(variant.id)[own] for variant in variants}
    baselines = _baselines(task, embedded, own, seed, by) if split == "test" else {}
    conditions: dict[tuple[object, ...], _Condition] = {}
    for variant in variants:
        condition = _condition(variant)
        key = (
            condition.name,
            condition.role,
            condition.n_features if condition.role is Role.GRID else None,
            condition.dose,
        )
        kept = conditions.setdefault(key, condition)
        values = evaluator.metrics(under[variant.id])
        if scib and isinstance(evaluator, MixEvaluator) and _is_costly(variant):
            values += evaluator.scib_metrics(under[variant.id])
        kept.draws.append(_by_key(values))
    for name, embedding in baselines.items():
        values = evaluator.metrics(embedding)
        if scib and isinstance(evaluator, MixEvaluator):
            values += evaluator.scib_metrics(embedding)
        conditions[name,] = _Condition(name=name, role=Role.BASELINE, draws=[_by_key(values)])
    if isinstance(evaluator, MoveEvaluator) and split == "test":
        conditions[FLOOR,] = _Condition(name=FLOOR, role=Role.FLOOR, draws=[_by_key(evaluator.floor())])
    rows = _rows(list(conditions.values()), cells, split)
    rows += _dose_responses(task, evaluator, variants, under, split) if split == "test" else []
    return schemas.conform("steering", pl.DataFrame(rows, infer_schema_length=None))


def _evaluation_cells(
    embedded: SteeredEmbeddings, own: np.ndarray, seed: int, n_samples: int | None
) -> EvaluationCells:
    labels, train = embedded.labels, embedded.labels.split == "train"
    more = {} if n_samples is None else {"n_samples": n_samples}
    return EvaluationCells(
        unsteered=embedded.unsteered[own],
        label=labels.label[own].astype(str),
        cell_type=labels.cell_type[own].astype(str),
        donor=labels.donor[own].astype(str),
        train=embedded.unsteered[train],
        train_label=labels.label[train].astype(str),
        train_type=labels.cell_type[train].astype(str),
        seed=seed,
        **more,
    )


def _condition(variant: Variant) -> _Condition:
    return _Condition(
        name=variant.name,
        role=variant.role,
        intervention=variant.intervention,
        n_features=None if variant.role in (Role.UNSTEERED, *_BASELINES) else len(variant.features),
        dose=variant.dose,
        chosen=variant.chosen,
    )


def _by_key(values: Iterable[MetricValue]) -> Values:
    return {(value.metric, value.group): value for value in values}


def _is_costly(variant: Variant) -> bool:
    """Whether scIB's scores are computed for a variant."""
    if variant.role is Role.NULL:
        return variant.draw < N_COSTLY
    return variant.chosen or variant.role not in (Role.GRID, Role.BASELINE_DOSE)


def _baselines(
    task: SteeringTask, embedded: SteeredEmbeddings, own: np.ndarray, seed: int, by: By | None
) -> dict[str, Floats]:
    """The embeddings of the evaluated cells under each baseline that needs no model, by name."""
    unsteered, labels = embedded.unsteered[own], embedded.labels.at(own)
    label, types = labels.label.astype(str), labels.cell_type.astype(str)
    if task.type is Task.MOVE:
        known = embedded.labels.split != "test"
        rest = embedded.labels.at(known)
        vector = embedding_baselines.MeanDifference(
            embedded.unsteered[known],
            (rest.label == task.target).astype(bool),
            (rest.label == task.toward).astype(bool),
            rest.cell_type.astype(str).tolist(),
            of_other_groups=by == "other_types",
        )
        moved = vector.applied(unsteered, (labels.label == task.target).astype(bool), types.tolist())
        return {EMBEDDING_DIFFERENCE: moved} if vector.vectors else {}
    if task.type is Task.EDIT or len(np.unique(label)) < 2:
        return {}
    found = {
        CENTRING: embedding_baselines.centre(unsteered, label.tolist()),
        CENTRING_WITHIN: embedding_baselines.centre_within(unsteered, label.tolist(), types.tolist()),
    }
    if embedding_baselines.has_harmony() and len(unsteered) >= embedding_baselines.MIN_HARMONY:
        found[HARMONY] = embedding_baselines.harmony(unsteered, label.tolist(), seed=seed)
    return found


def _rows(conditions: Sequence[_Condition], cells: EvaluationCells, split: str) -> list[dict[str, Any]]:
    """One row for each condition, metric and group that was measured; the first condition is the unsteered one."""
    (base,) = conditions[0].draws
    nulls = {null: next((own.draws for own in conditions if own.name == null), []) for null in Null}
    rows = []
    for condition in conditions:
        compared = condition.chosen or condition.role in _COMPARED
        for key in base:
            draws = [draw[key] for draw in condition.draws if key in draw]
            if not draws:
                continue
            effects = [_less(draw.value, base[key].value) for draw in draws]
            known = [effect for effect in effects if effect is not None]
            values = [draw.value for draw in draws if draw.value is not None]
            effect = float(np.mean(known)) if known else None
            low, high = student(known) if condition.role is Role.NULL else cells.interval(effect, draws[0], base[key])
            rows.append(
                {
                    "split": split,
                    "condition": condition.name,
                    "role": condition.role.value,
                    "intervention": condition.intervention,
                    "n_features": condition.n_features,
                    "dose": condition.dose,
                    "metric": key[0],
                    "group": key[1],
                    "n_draws": len(draws),
                    "n_cells": base[key].n_cells,
                    "value": float(np.mean(values)) if values else None,
                    "effect": effect,
                    "low": low,
                    "high": high,
                    **{
                        null.column: _p(key, effect, drawn, base[key]) if compared else None
                        for null, drawn in nulls.items()
                    },
                    "chosen": condition.chosen,
                }
            )
    return rows


def _p(key: tuple[str, str], effect: float | None, draws: Sequence[Values], unsteered: MetricValue) -> float | None:
    drawn = [_less(draw[key].value, unsteered.value) for draw in draws if key in draw]
    values = [np.nan if value is None else value for value in drawn]
    return rank_p(effect, values, metric_of(key[0]).direction)


def _less(value: float | None, unsteered: float | None) -> float | None:
    return None if value is None or unsteered is None else value - unsteered


def _dose_responses(
    task: SteeringTask,
    evaluator: Evaluator,
    variants: Sequence[Variant],
    under: Mapping[int, Floats],
    split: str,
) -> list[dict[str, Any]]:
    """Spearman's correlation and Page's p of the headline metric with the dose and with the number of features.

    For move, the units are donors by types if donors have cells of both labels, else types. Mix has one unit, hence no
    p. The unsteered cells are the point of 0 features.
    """
    chosen = next((variant for variant in variants if variant.chosen), None)
    if chosen is None or not isinstance(evaluator, MoveEvaluator | MixEvaluator):
        return []
    grid = [variant for variant in variants if variant.role is Role.GRID]
    curves: dict[str, dict[float, int]] = {
        "dose": {v.dose or 0.0: v.id for v in grid if len(v.features) == len(chosen.features)},
        "n_features": {0.0: 0} | {float(len(v.features)): v.id for v in grid if v.dose == chosen.dose},
    }
    direction = metric_of(HEADLINE_OF_TASK[task.type]).direction
    rows = []
    for axis, points in curves.items():
        if len(points) < 3:
            continue
        found = [_units(evaluator, under[variant]) for variant in points.values()]
        shared = [unit for unit in found[0] if all(unit in other for other in found)]
        values = np.array([[own[unit] for own in found] for unit in shared]).reshape(len(shared), len(points))
        response = dose_response(list(points), values, increasing=direction is Direction.HIGHER)
        rows += [
            {
                "split": split, "condition": chosen.name, "role": Role.TREND.value, "intervention": chosen.intervention,
                "n_features": len(chosen.features), "dose": chosen.dose, "metric": f"{axis}_{name}", "group": ALL,
                "n_draws": response.n_units, "n_cells": None, "value": value, "effect": None, "low": None, "high": None,
                **{null.column: None for null in Null}, "chosen": False,
            }
            for name, value in (("spearman", response.spearman), ("page_p", response.p))
        ]  # fmt: skip
    return rows


def _units(evaluator: MoveEvaluator | MixEvaluator, embedding: Floats) -> Mapping[tuple[str, str], float]:
    if isinstance(evaluator, MoveEvaluator):
        return evaluator.units(embedding)
    mixed = next(own.value for own in evaluator.metrics(embedding) if own.metric == "batch_mixing")
    return {} if mixed is None else {("", ""): mixed}
