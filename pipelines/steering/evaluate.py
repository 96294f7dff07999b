"""From the stored embeddings of a steering run to its results: every condition on every metric, beside its nulls.

An effect is a condition's value less the unsteered one. Intervals are 95 %: over resampled cells for a single variant,
Student's t over the draws of a null. `p_<null>` is the share of the null's draws whose effect is at least as good,
counting the condition itself. Cells without a label or a token are left out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import polars as pl

from feature_store import schemas
from pipelines.steering import distances, mixing, votes
from pipelines.steering.choose import Labels
from pipelines.steering.intervals import UNKNOWN, Floats, Interval, Metric, bootstrap_mean, rank_p, student
from pipelines.steering.plan import ALL, NULLS, Question, Variant

MAX_LOSS = 0.02
"""Share of the conservation of cell types that a mixing may cost."""
MOVED = {
    "mean": ("remaining", "distance"),
    "corrected": ("remaining_corrected", "distance_corrected"),
    "energy": ("energy_remaining", "energy_distance"),
}
"""Names of what is left of a distance, and of the distance, by its kind."""
METRICS: Mapping[str, Metric] = {
    **{metric.name: metric for metric in votes.METRICS},
    **{name: Metric(name=name, higher_is_better=False, low=0.0) for names in MOVED.values() for name in names},
    **{
        name: Metric(name=name, higher_is_better=True, low=0.0, high=1.0)
        for name in ("batch_mixing", "label_conservation")
    },
}


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


class Score(NamedTuple):
    """One number; `cells`: what it is the mean of, where it is one."""

    metric: str
    group: str
    n_cells: int
    value: float | None
    cells: Floats | None = None


def best_variant(question: Question, variants: Sequence[Variant], embedded: Embedded) -> Variant:
    """The point of the grid that does best on these (select) cells; the first, of the fewest features, of equals.

    Move: the least share of the distance remains. Mix: the best mixing at a loss of at most MAX_LOSS of the
    conservation of cell types, and where every point loses more, the one that loses least.
    """
    grid = [variant for variant in variants if variant.role == "grid"]
    if question.name == "move":
        score = _mover(question, embedded, kinds=("mean",), n_splits=0)
        left = {v.id: _value(score(embedded.under(v.id)), "remaining") for v in grid}
        return min(grid, key=lambda v: left[v.id])
    score = _mixer(embedded)
    found = {v.id: score(embedded.under(v.id)) for v in [variants[0], *grid]}
    before = _value(found[variants[0].id], "label_conservation", missing=1.0)
    kept = {v.id: _value(found[v.id], "label_conservation", missing=1.0) for v in grid}
    allowed = [v for v in grid if kept[v.id] >= (1 - MAX_LOSS) * before]
    if not allowed:
        return max(grid, key=lambda v: kept[v.id])
    return max(allowed, key=lambda v: _value(found[v.id], "batch_mixing", missing=0.0))


def evaluate(
    question: Question, variants: Sequence[Variant], embedded: Embedded, *, split: str, seed: int
) -> pl.DataFrame:
    """The rows of `results` of one split: what its cells, and unsteered `train` cells, say of every condition."""
    scorer = _SCORERS[question.name](question, embedded, split)
    scored = {variant.id: {(s.metric, s.group): s for s in scorer(variant.id)} for variant in variants}
    base = scored[variants[0].id]
    conditions: dict[tuple[object, ...], list[Variant]] = {}
    for variant in variants:
        condition = (variant.name, variant.role, len(variant.features) if variant.role != "null" else -1, variant.dose)
        conditions.setdefault(condition, []).append(variant)
    nulls = {null: [v.id for v in variants if v.null == null] for null in NULLS}
    rows = []
    for own in conditions.values():
        first = own[0]
        for key, unsteered in base.items():
            draws = [scored[variant.id][key] for variant in own]
            effects = [_less(draw.value, unsteered.value) for draw in draws]
            known = [effect for effect in effects if effect is not None]
            effect = float(np.mean(known)) if known else None
            values = [draw.value for draw in draws if draw.value is not None]
            low, high = _interval(draws, unsteered, known, seed)
            p = {
                f"p_{null.replace(' ', '_')}": _p(effect, [scored[i][key] for i in ids], unsteered)
                if first.role in ("grid", "replace", "reconstruction", "baseline")
                else None
                for null, ids in nulls.items()
            }
            rows.append(
                {
                    "split": split,
                    "condition": first.name,
                    "role": first.role,
                    "intervention": first.intervention,
                    "n_features": len(first.features),
                    "dose": first.dose,
                    "metric": key[0],
                    "group": key[1],
                    "n_draws": len(own),
                    "n_cells": unsteered.n_cells,
                    "value": float(np.mean(values)) if values else None,
                    "effect": effect,
                    "low": low,
                    "high": high,
                    **p,
                    "chosen": first.chosen,
                }
            )
    return schemas.conform("steering", pl.DataFrame(rows, infer_schema_length=None))


def _voter(question: Question, embedded: Embedded, split: str) -> Callable[[int], list[Score]]:
    label, own = embedded.labels.label, embedded.labels.split == split
    train = embedded.labels.split == "train"
    judge = votes.Judge(
        embedded.unsteered[train], label[train].tolist(), embedded.unsteered[own], label[own].tolist(), question.target
    )

    def score(variant: int) -> list[Score]:
        columns = judge.columns(embedded.under(variant)[own])
        return [
            Score(name, ALL, len(values), float(values.mean()) if len(values) else None, values)
            for name, values in columns.items()
        ]

    return score


def _mover(
    question: Question, embedded: Embedded, *, kinds: Sequence[str], n_splits: int, own: np.ndarray | None = None
) -> Callable[[Floats], list[Score]]:
    labels = embedded.labels
    own = np.ones(len(embedded.cell_idx), dtype=bool) if own is None else own

    def score(steered: Floats) -> list[Score]:
        table = distances.distance_table(
            embedded.unsteered,
            steered,
            own & (labels.label == question.target),
            own & (labels.label == question.toward),
            labels.cell_type.astype(str),
            kinds=kinds,
            n_splits=n_splits,
            min_cells=2,
        )
        return [
            Score(name, row["group"], row["n_target"], row[column])
            for row in table.iter_rows(named=True)
            for name, column in zip(MOVED[row["distance"]], ("remaining", "steered_toward"), strict=True)
        ]

    return score


def _mixer(embedded: Embedded, own: np.ndarray | None = None) -> Callable[[Floats], list[Score]]:
    own = np.ones(len(embedded.cell_idx), dtype=bool) if own is None else own
    batch, kind = embedded.labels.label[own].astype(str), embedded.labels.cell_type[own].astype(str)

    def score(steered: Floats) -> list[Score]:
        found = mixing.quick_mixing(steered[own], batch, kind)
        n = int(own.sum())
        return [
            Score("batch_mixing", ALL, n, found.mixing),
            Score("label_conservation", ALL, n, found.conservation),
        ]

    return score


def _of_move(question: Question, embedded: Embedded, split: str) -> Callable[[int], list[Score]]:
    own = embedded.labels.split == split
    score = _mover(question, embedded, kinds=tuple(MOVED), n_splits=0, own=own)
    return lambda variant: score(embedded.under(variant))


def _of_mix(_question: Question, embedded: Embedded, split: str) -> Callable[[int], list[Score]]:
    score = _mixer(embedded, embedded.labels.split == split)
    return lambda variant: score(embedded.under(variant))


_SCORERS: Mapping[str, Callable[[Question, Embedded, str], Callable[[int], list[Score]]]] = {
    "edit": _voter,
    "move": _of_move,
    "mix": _of_mix,
}


def _value(found: Sequence[Score], metric: str, *, missing: float = np.inf) -> float:
    values = [s.value for s in found if s.metric == metric and s.group == ALL]
    return missing if not values or values[0] is None else values[0]


def _less(value: float | None, unsteered: float | None) -> float | None:
    return None if value is None or unsteered is None else value - unsteered


def _interval(draws: Sequence[Score], unsteered: Score, effects: Sequence[float], seed: int) -> Interval:
    if len(draws) > 1:
        return student(effects)
    if draws[0].cells is None or unsteered.cells is None:
        return UNKNOWN
    return bootstrap_mean(draws[0].cells - unsteered.cells, seed=seed)


def _p(effect: float | None, draws: Sequence[Score], unsteered: Score) -> float | None:
    drawn = [_less(draw.value, unsteered.value) for draw in draws]
    values = [np.nan if value is None else value for value in drawn]
    return rank_p(effect, values, higher_is_better=METRICS[unsteered.metric].higher_is_better)
