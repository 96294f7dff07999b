"""The stored embeddings of a steering run, as arrays in the order of its cells."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from pipelines.steering.labels import CellLabels
from pipelines.steering.metrics.intervals import Floats
from pipelines.steering.plan import SteeringTask, Task


@dataclass(frozen=True, kw_only=True)
class SteeredEmbeddings:
    """The embeddings of a run, by variant.

    Attributes:
        cell_idx: the cells that have a label and an embedding, ascending [n_cells].
        labels: the labels of these cells.
        unsteered: their unsteered embeddings [n_cells width].
        moved: for each variant, the rows of the cells that it steers and their embeddings.
    """

    cell_idx: np.ndarray
    labels: CellLabels
    unsteered: Floats
    moved: Mapping[int, tuple[np.ndarray, Floats]]

    @classmethod
    def of(cls, stored: pl.DataFrame, cells: pl.DataFrame, kind: str) -> "SteeredEmbeddings":
        """Make it from the rows cell_idx, variant, embedding of a run, and from the cell table."""
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
        return cls(
            cell_idx=cell_idx, labels=CellLabels.of(own, kind), unsteered=first["embedding"].to_numpy(), moved=moved
        )

    def is_left(self, task: SteeringTask) -> npt.NDArray[np.bool_]:
        """The cells of the moved label that no variant steers, such as those that `--cells` leaves out [n_cells].

        They are neither moved cells nor those that cells are moved toward. No cell is left if nothing is steered.
        """
        left = np.zeros(len(self.cell_idx), dtype=bool)
        if task.type is Task.MOVE and self.moved:
            left |= self.labels.label == task.target
            for rows, _ in self.moved.values():
                left[rows] = False
        return left

    def under(self, variant: int) -> Floats:
        """The embeddings of all cells under a variant [n_cells width]."""
        if variant not in self.moved:
            return self.unsteered
        out = self.unsteered.copy()
        rows, values = self.moved[variant]
        out[rows] = values
        return out
