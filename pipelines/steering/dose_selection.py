"""The choice of the number of features and the dose: the best point of the grid on `select` cells."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import polars as pl

from feature_store.query.steering import Role
from pipelines.errors import UsageError
from pipelines.steering import evaluators
from pipelines.steering.embeddings import SteeredEmbeddings
from pipelines.steering.evaluation_cells import ALL
from pipelines.steering.metrics import distances, mixing
from pipelines.steering.plan import SteeringTask, Task, Variant

T = TypeVar("T")
MAX_LOSS = 0.02
"""Largest share of the conservation of cell types that a mixing may lose."""


def choose_dose(task: SteeringTask, variants: Sequence[Variant], embedded: SteeredEmbeddings) -> Variant:
    """The best point of the grid, a number of features and a dose, on these (select) cells.

    For move it is the point with the smallest remaining share of the distance of the steered cells. For mix it is the
    point that mixes best among those that lose at most MAX_LOSS of the conservation of cell types, or, if every point
    loses more, the point that loses least. Of equal points it is the first, which has the fewest features.

    Raises:
        UsageError: the cells that a move steers are too few, or have no cells of their type to be moved toward.
    """
    grid = [variant for variant in variants if variant.role is Role.GRID]
    if task.type is Task.MOVE:
        left = {variant.id: _remaining(task, embedded, variant.id) for variant in grid}
        if np.isinf(min(left.values())):
            raise UsageError(
                f"no cell type has {evaluators.MIN_CELLS} select cells that are steered and as many of "
                f"{task.toward!r}, on which number of features and dose are chosen; give one --n-features and one "
                "--dose, or leave --cells out and give --by other_types"
            )
        return min(grid, key=lambda v: left[v.id])
    found = mixing_of_grid(variants, embedded)
    return best_mixing([(v, found[v.id]) for v in grid], found[variants[0].id])


def mixing_of_grid(variants: Sequence[Variant], embedded: SteeredEmbeddings) -> dict[int, mixing.QuickMixing]:
    """The mixing and conservation of these cells, unsteered and under each point of the grid, by variant."""
    batch, types = (own.astype(str).tolist() for own in (embedded.labels.label, embedded.labels.cell_type))
    grid = [variant for variant in variants if variant.role is Role.GRID]
    return {v.id: mixing.quick_mixing(embedded.under(v.id), batch, types) for v in [variants[0], *grid]}


def best_mixing(found: Sequence[tuple[T, mixing.QuickMixing]], unsteered: mixing.QuickMixing) -> T:
    """What mixes best among those that lose at most MAX_LOSS of the conservation; if all lose more, what loses least.

    Of equal ones it is the first.
    """
    allowed = [(one, score) for one, score in found if keeps_types(score, unsteered)]
    if not allowed:
        return max(found, key=lambda pair: _kept(pair[1]))[0]
    return max(allowed, key=lambda pair: pair[1].mixing or 0.0)[0]


def keeps_types(score: mixing.QuickMixing, unsteered: mixing.QuickMixing) -> bool:
    """Whether a mixing loses at most MAX_LOSS of the conservation of cell types."""
    return _kept(score) >= (1 - MAX_LOSS) * _kept(unsteered)


def _kept(score: mixing.QuickMixing) -> float:
    return 1.0 if score.conservation is None else score.conservation


def _remaining(task: SteeringTask, embedded: SteeredEmbeddings, variant: int) -> float:
    """The share of the distance that remains under a variant, over all cells; infinite if it is not defined."""
    labels = embedded.labels
    is_steered = (labels.label == task.target) & ~embedded.is_left(task)
    table = distances.distance_table(
        embedded.unsteered,
        embedded.under(variant),
        is_steered.astype(bool),
        (labels.label == task.toward).astype(bool),
        labels.cell_type.astype(str).tolist(),
        kinds=("mean",),
        n_splits=0,
        min_cells=evaluators.MIN_CELLS,
    )
    remaining = table.filter(pl.col("group") == ALL)["remaining"][0]
    return np.inf if remaining is None else float(remaining)
