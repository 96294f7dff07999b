"""The choice of the number of features and the dose: the best point of the grid on `select` cells."""

from collections.abc import Sequence

import numpy as np
import polars as pl

from feature_store.query.steering import Role
from pipelines.steering.embeddings import SteeredEmbeddings
from pipelines.steering.evaluation_cells import ALL
from pipelines.steering.evaluators import MIN_CELLS
from pipelines.steering.metrics import distances, mixing
from pipelines.steering.plan import SteeringTask, Task, Variant

MAX_LOSS = 0.02
"""Largest share of the conservation of cell types that a mixing may lose."""


def choose_dose(task: SteeringTask, variants: Sequence[Variant], embedded: SteeredEmbeddings) -> Variant:
    """The best point of the grid, a number of features and a dose, on these (select) cells.

    For move it is the point with the smallest remaining share of the distance. For mix it is the point that mixes best
    among those that lose at most MAX_LOSS of the conservation of cell types, or, if every point loses more, the point
    that loses least. Of equal points it is the first, which has the fewest features.
    """
    grid = [variant for variant in variants if variant.role is Role.GRID]
    if task.type is Task.MOVE:
        left = {variant.id: _remaining(task, embedded, variant.id) for variant in grid}
        return min(grid, key=lambda v: left[v.id])
    batch, types = (own.astype(str).tolist() for own in (embedded.labels.label, embedded.labels.cell_type))
    found = {v.id: mixing.quick_mixing(embedded.under(v.id), batch, types) for v in [variants[0], *grid]}
    kept = {i: 1.0 if score.conservation is None else score.conservation for i, score in found.items()}
    allowed = [v for v in grid if kept[v.id] >= (1 - MAX_LOSS) * kept[variants[0].id]]
    if not allowed:
        return max(grid, key=lambda v: kept[v.id])
    return max(allowed, key=lambda v: found[v.id].mixing or 0.0)


def _remaining(task: SteeringTask, embedded: SteeredEmbeddings, variant: int) -> float:
    """The share of the distance that remains under a variant, over all cells; infinite if it is not defined."""
    labels = embedded.labels
    table = distances.distance_table(
        embedded.unsteered,
        embedded.under(variant),
        (labels.label == task.target).astype(bool),
        (labels.label == task.toward).astype(bool),
        labels.cell_type.astype(str).tolist(),
        kinds=("mean",),
        n_splits=0,
        min_cells=MIN_CELLS,
    )
    remaining = table.filter(pl.col("group") == ALL)["remaining"][0]
    return np.inf if remaining is None else float(remaining)
