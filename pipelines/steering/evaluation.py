"""From the stored embeddings of a steering run to its results: every condition on every metric, beside its nulls.

An effect is a condition's value less the unsteered one. Intervals are 95 % of the effect: over subsamples of the cells
of each donor, cell type and label for a single variant, Student's t over the draws of a null. `p_<null>` is the share
of the null's draws whose effect is at least as good, counting the condition itself; it is given for what was done at
the point where the nulls were drawn.
Cells without a label or a token are left out.

Beside the variants stand, on `test` cells, what needs no model: `floor` (what sampling noise alone leaves of a
distance), the mean difference of embeddings learned on the other splits' cells, and, for mix, centring and Harmony,
which see the test cells' batches. `trend` rows say whether a metric follows the dose and the number of features.

Cost: .3 s a variant for 1,000 test cells; scIB's scores (`scib`) 10 s and more, so they are asked of what was chosen,
the reconstruction, the baselines and 3 draws of each null.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from feature_store.query.metrics import HEADLINE_OF_TASK, Direction, metric_of
from feature_store.storage import schemas
from pipelines.steering import embedding_baselines
from pipelines.steering.evaluation_cells import ALL, MIN_CELLS, Edit, Judged, Mix, Move, Reading
from pipelines.steering.metrics import distances, mixing
from pipelines.steering.metrics.dose_response import dose_response
from pipelines.steering.metrics.intervals import Floats, rank_p, student
from pipelines.steering.plan import NULLS, Question, Variant
from pipelines.steering.selection import Labels

MAX_LOSS = 0.02
"""Share of the conservation of cell types that a mixing may cost."""
N_COSTLY = 3
"""Draws of a null that scIB's scores are asked of."""
FLOOR, EMBEDDING_DIFFERENCE = "floor", "mean difference of embeddings"
CENTRING, CENTRING_WITHIN, HARMONY = "centring", "centring within types", "Harmony"

Readings = dict[tuple[str, str], Reading]


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """The embeddings of a run, variant by variant.

    Attributes:
        cell_idx: cells that have a label and an embedding, ascending [n_cells].
        labels: of these.
        unsteered: embeddings [n_cells width].
        moved: by variant, rows of the cells that it steers and their embeddings.
    """

    cell_idx: np.ndarray
    labels: Labels
    unsteered: Floats
    moved: Mapping[int, tuple[np.ndarray, Floats]]

    @classmethod
    def of(cls, stored: pl.DataFrame, cells: pl.DataFrame, kind: str) -> "Embedded":
        """From the rows cell_idx, variant, embedding of a run, and the cell table."""
        known = stored.filter(pl.col("embedding").arr.first().is_not_nan())
        known = known.join(cells.filter(pl.col(kind).is_not_null()).select("cell_idx"), on="cell_idx", how="semi")
        by_variant = {
            int(variant): frame.sort("cell_idx")
            for (variant,), frame in known.partition_by("variant", as_dict=True).items()
        }
        first = by_variant.pop(0)
        cell_idx = first["cell_idx"].to_numpy()
        own = cells.filter(pl.col("cell_idx").is_in(first["cell_idx"].implode())).sort("cell_idx")
        moved = {
            variant: (np.searchsorted(cell_idx, frame["cell_idx"].to_numpy()), frame["embedding"].to_numpy())
            for variant, frame in by_variant.items()
        }
        return cls(cell_idx=cell_idx, labels=Labels.of(own, kind), unsteered=first["embedding"].to_numpy(), moved=moved)

    def under(self, variant: int) -> Floats:
        """Embeddings of all cells under a variant [n_cells width]."""
        if variant not in self.moved:
            return self.unsteered
        out = self.unsteered.copy()
        rows, values = self.moved[variant]
        out[rows] = values
        return out


def best_variant(question: Question, variants: Sequence[Variant], embedded: Embedded) -> Variant:
    """The point of the grid that does best on these (select) cells; the first, of the fewest features, of equals.

    Move: the least share of the distance remains. Mix: the best mixing at a loss of at most MAX_LOSS of the
    conservation of cell types, and where every point loses more, the one that loses least.
    """
    grid = [variant for variant in variants if variant.role == "grid"]
    if question.name == "move":
        left = {variant.id: _remaining(question, embedded, variant.id) for variant in grid}
        return min(grid, key=lambda v: left[v.id])
    batch, types = (own.astype(str).tolist() for own in (embedded.labels.label, embedded.labels.cell_type))
    found = {v.id: mixing.quick_mixing(embedded.under(v.id), batch, types) for v in [variants[0], *grid]}
    kept = {i: 1.0 if score.conservation is None else score.conservation for i, score in found.items()}
    allowed = [v for v in grid if kept[v.id] >= (1 - MAX_LOSS) * kept[variants[0].id]]
    if not allowed:
        return max(grid, key=lambda v: kept[v.id])
    return max(allowed, key=lambda v: found[v.id].mixing or 0.0)


@dataclass(frozen=True, kw_only=True)
class _Condition:
    """One condition and the readings of its draws."""

    name: str
    role: str
    intervention: str | None = None
    n_features: int | None = None
    dose: float | None = None
    chosen: bool = False
    draws: list[Readings] = field(default_factory=list)


def evaluate(
    question: Question,
    variants: Sequence[Variant],
    embedded: Embedded,
    *,
    split: str,
    seed: int,
    scib: bool = False,
    n_samples: int | None = None,
) -> pl.DataFrame:
    """The rows of `results` of one split: what its cells, and unsteered `train` cells, say of every condition.

    Args:
        question: what was asked.
        variants: unsteered first.
        embedded: their embeddings, and those of unsteered `train` cells.
        split: the cells that are judged.
        seed: of subsamples, halves and Harmony.
        scib: whether to ask scIB's scores too (mix alone; needs the extra `evaluate`).
        n_samples: subsamples behind an interval; default: 500.
    """
    own = embedded.labels.split == split
    cells = _judged(embedded, own, seed, n_samples)
    asked = _ASKED[question.name](question, cells)
    under = {variant.id: embedded.under(variant.id)[own] for variant in variants}
    baselines = _baselines(question, embedded, own, seed) if split == "test" else {}
    conditions: dict[tuple[object, ...], _Condition] = {}
    for variant in variants:
        condition = _condition(variant)
        key = (
            condition.name,
            condition.role,
            condition.n_features if condition.role == "grid" else None,
            condition.dose,
        )
        kept = conditions.setdefault(key, condition)
        readings = asked.readings(under[variant.id])
        if scib and isinstance(asked, Mix) and _is_costly(variant):
            readings += asked.costly(under[variant.id])
        kept.draws.append(_by_key(readings))
    for name, embedding in baselines.items():
        readings = asked.readings(embedding) + (asked.costly(embedding) if scib and isinstance(asked, Mix) else [])
        conditions[name,] = _Condition(name=name, role="baseline", draws=[_by_key(readings)])
    if isinstance(asked, Move) and split == "test":
        conditions[FLOOR,] = _Condition(name=FLOOR, role="floor", draws=[_by_key(asked.floor())])
    rows = _rows(list(conditions.values()), cells, split)
    rows += _trends(asked, variants, under, split) if split == "test" else []
    return schemas.conform("steering", pl.DataFrame(rows, infer_schema_length=None))


def _judged(embedded: Embedded, own: np.ndarray, seed: int, n_samples: int | None) -> Judged:
    labels, train = embedded.labels, embedded.labels.split == "train"
    more = {} if n_samples is None else {"n_samples": n_samples}
    return Judged(
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


_ASKED: Mapping[str, Callable[[Question, Judged], Edit | Mix]] = {
    "edit": lambda question, cells: Edit(cells, question.target),
    "move": lambda question, cells: Move(cells, question.target, question.toward or ""),
    "mix": lambda _question, cells: Mix(cells),
}


def _condition(variant: Variant) -> _Condition:
    return _Condition(
        name=variant.name,
        role=variant.role,
        intervention=variant.intervention,
        n_features=len(variant.features) if variant.role not in ("unsteered", "baseline") else None,
        dose=variant.dose,
        chosen=variant.chosen,
    )


def _by_key(readings: Iterable[Reading]) -> Readings:
    return {(reading.metric, reading.group): reading for reading in readings}


def _is_costly(variant: Variant) -> bool:
    """Whether scIB's scores are asked of it."""
    return (
        variant.chosen or variant.role not in ("grid", "null") or (variant.role == "null" and variant.draw < N_COSTLY)
    )


def _baselines(question: Question, embedded: Embedded, own: np.ndarray, seed: int) -> dict[str, Floats]:
    """What needs no model: embeddings of the judged cells by name."""
    unsteered, labels = embedded.unsteered[own], embedded.labels.at(own)
    label, types = labels.label.astype(str), labels.cell_type.astype(str)
    if question.name == "move":
        rest = embedded.labels.at(~own)
        vector = embedding_baselines.MeanDifference(
            embedded.unsteered[~own],
            (rest.label == question.target).astype(bool),
            (rest.label == question.toward).astype(bool),
            rest.cell_type.astype(str).tolist(),
        )
        moved = vector.applied(unsteered, (labels.label == question.target).astype(bool), types.tolist())
        return {EMBEDDING_DIFFERENCE: moved} if vector.vectors else {}
    if question.name == "edit" or len(np.unique(label)) < 2:
        return {}
    found = {
        CENTRING: embedding_baselines.centre(unsteered, label.tolist()),
        CENTRING_WITHIN: embedding_baselines.centre_within(unsteered, label.tolist(), types.tolist()),
    }
    if embedding_baselines.has_harmony() and len(unsteered) >= embedding_baselines.MIN_HARMONY:
        found[HARMONY] = embedding_baselines.harmony(unsteered, label.tolist(), seed=seed)
    return found


def _rows(conditions: Sequence[_Condition], cells: Judged, split: str) -> list[dict[str, Any]]:
    """A row for every condition, metric and group that was measured; the first condition is the unsteered one."""
    (base,) = conditions[0].draws
    nulls = {name: next((own.draws for own in conditions if own.name == name), []) for name in NULLS}
    rows = []
    for condition in conditions:
        compared = condition.chosen or condition.role in ("replace", "reconstruction", "baseline")
        for key in base:
            draws = [draw[key] for draw in condition.draws if key in draw]
            if not draws:
                continue
            effects = [_less(draw.value, base[key].value) for draw in draws]
            known = [effect for effect in effects if effect is not None]
            values = [draw.value for draw in draws if draw.value is not None]
            effect = float(np.mean(known)) if known else None
            low, high = student(known) if condition.role == "null" else cells.interval(effect, draws[0], base[key])
            rows.append(
                {
                    "split": split,
                    "condition": condition.name,
                    "role": condition.role,
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
                        f"p_{null.replace(' ', '_')}": _p(key, effect, drawn, base[key]) if compared else None
                        for null, drawn in nulls.items()
                    },
                    "chosen": condition.chosen,
                }
            )
    return rows


def _p(key: tuple[str, str], effect: float | None, draws: Sequence[Readings], unsteered: Reading) -> float | None:
    drawn = [_less(draw[key].value, unsteered.value) for draw in draws if key in draw]
    values = [np.nan if value is None else value for value in drawn]
    return rank_p(effect, values, metric_of(key[0]).direction)


def _less(value: float | None, unsteered: float | None) -> float | None:
    return None if value is None or unsteered is None else value - unsteered


def _trends(
    asked: Edit | Mix, variants: Sequence[Variant], under: Mapping[int, Floats], split: str
) -> list[dict[str, Any]]:
    """Spearman's correlation and Page's p of the headline metric with the dose and with the number of features.

    Units are donors by types where donors have cells of both labels, else types (move); one for mix, hence no p. Of
    features, the unsteered cells are the 0.
    """
    chosen = next((variant for variant in variants if variant.chosen), None)
    if chosen is None or not isinstance(asked, Move | Mix):
        return []
    grid = [variant for variant in variants if variant.role == "grid"]
    curves: dict[str, dict[float, int]] = {
        "dose": {v.dose or 0.0: v.id for v in grid if len(v.features) == len(chosen.features)},
        "n_features": {0.0: 0} | {float(len(v.features)): v.id for v in grid if v.dose == chosen.dose},
    }
    direction = metric_of(HEADLINE_OF_TASK["mix" if isinstance(asked, Mix) else "move"]).direction
    rows = []
    for axis, points in curves.items():
        if len(points) < 3:
            continue
        found = [_units(asked, under[variant]) for variant in points.values()]
        shared = [unit for unit in found[0] if all(unit in other for other in found)]
        values = np.array([[own[unit] for own in found] for unit in shared]).reshape(len(shared), len(points))
        trend = dose_response(list(points), values, increasing=direction is Direction.HIGHER)
        rows += [
            {
                "split": split, "condition": chosen.name, "role": "trend", "intervention": chosen.intervention,
                "n_features": len(chosen.features), "dose": chosen.dose, "metric": f"{axis}_{name}", "group": ALL,
                "n_draws": trend.n_units, "n_cells": None, "value": value, "effect": None, "low": None, "high": None,
                **{f"p_{null.replace(' ', '_')}": None for null in NULLS}, "chosen": False,
            }
            for name, value in (("spearman", trend.spearman), ("page_p", trend.p))
        ]  # fmt: skip
    return rows


def _units(asked: Move | Mix, embedding: Floats) -> Mapping[tuple[str, str], float]:
    if isinstance(asked, Move):
        return asked.units(embedding)
    mixed = next(reading.value for reading in asked.readings(embedding) if reading.metric == "batch_mixing")
    return {} if mixed is None else {("", ""): mixed}


def _remaining(question: Question, embedded: Embedded, variant: int) -> float:
    """The share of the distance that remains under a variant, of all cells; infinite where it cannot be said."""
    labels = embedded.labels
    table = distances.distance_table(
        embedded.unsteered,
        embedded.under(variant),
        (labels.label == question.target).astype(bool),
        (labels.label == question.toward).astype(bool),
        labels.cell_type.astype(str).tolist(),
        kinds=("mean",),
        n_splits=0,
        min_cells=MIN_CELLS,
    )
    remaining = table.filter(pl.col("group") == ALL)["remaining"][0]
    return np.inf if remaining is None else float(remaining)
