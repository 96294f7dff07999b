"""Corrections of embeddings that need no autoencoder, which are the baselines of steering.

- `centre` is x - mean of its batch + mean of all cells. It uses batch labels alone, so it also removes differences
  between batches that come from their cell types.
- `centre_within` does the same inside each cell type. It uses labels that a real correction does not have, so it is an
  upper bound and not a competitor.
- `harmony` is the method of Korsunsky et al. 2019 (doi:10.1038/s41592-019-0619-0) by harmonypy, from the extra
  `evaluate`.
- `MeanDifference` adds the vector from target to toward cells of each group, learned on reference cells, to other
  cells.
"""

from importlib.util import find_spec

import numpy as np

from pipelines.errors import UsageError
from pipelines.steering.metrics.intervals import Bools, Floats, Ints, Names, blocks

EXTRA = "pip install 'scsae[evaluate]'"
HARMONY_VERSION = "2."
MIN_HARMONY = 6
"""Least number of cells that Harmony can cluster."""


def centre(embedding: Floats, batch: Names) -> Floats:
    """Move every batch's mean to the mean of all cells, float64 [n_cells width]."""
    return _centred(np.asarray(embedding, dtype=np.float64), blocks(len(embedding), batch))


def centre_within(embedding: Floats, batch: Names, cell_type: Names) -> Floats:
    """`centre` inside each cell type, float64 [n_cells width]."""
    values, kind = np.asarray(embedding, dtype=np.float64), blocks(len(embedding), cell_type)
    part, out = blocks(len(embedding), batch), np.empty_like(values)
    for code in np.unique(kind):
        own = kind == code
        out[own] = _centred(values[own], part[own])
    return out


def has_harmony() -> bool:
    """Whether harmonypy is installed."""
    return find_spec("harmonypy") is not None


def harmony(embedding: Floats, batch: Names, *, seed: int = 0) -> Floats:
    """Harmony with its defaults, float64 [n_cells width]; one batch is returned as it is.

    Raises:
        UsageError: harmonypy is not installed or is of another major version, or there are too few cells to cluster.
    """
    values, names = np.asarray(embedding, dtype=np.float64), np.asarray(batch, dtype=str)
    if not has_harmony():
        raise UsageError(f"Harmony needs harmonypy, which is not installed; run: {EXTRA}")
    if len(np.unique(names)) < 2:
        return values
    if len(values) < MIN_HARMONY:
        raise UsageError(f"there are {len(values)} cells, and Harmony needs at least {MIN_HARMONY} to cluster them")
    import harmonypy

    # harmonypy's own number of clusters, n / 30 up to 100, is 0 for fewer than 15 cells
    n_clusters = int(min(max(round(len(values) / 30), 2), 100))
    done = harmonypy.run_harmony(
        values, {"batch": names}, "batch", nclust=n_clusters, random_state=seed, verbose=False, ncores=1
    )
    corrected = np.asarray(done.Z_corr, dtype=np.float64)
    if corrected.shape != values.shape:  # version 0 returned cells as columns
        raise UsageError(
            f"harmonypy returned {list(corrected.shape)} for cells {list(values.shape)}, so its version is not "
            f"{HARMONY_VERSION}x; run: {EXTRA}"
        )
    return corrected


class MeanDifference:
    """The mean of toward cells minus the mean of target cells by group, learned on reference cells.

    With `of_other_groups`, the vector of every group, known or not, is the mean over the other groups, weighted by the
    cells of their smaller side.
    """

    def __init__(
        self, reference: Floats, is_target: Bools, is_toward: Bools, group: Names, *, of_other_groups: bool = False
    ) -> None:
        """Learn from reference cells [n_cells width]; a group without target or toward cells gives no vector."""
        values, names = np.asarray(reference, dtype=np.float64), np.asarray(group, dtype=str)
        self.vectors: dict[str, Floats] = {}
        self._n_cells: dict[str, int] = {}
        self._of_other_groups = of_other_groups
        for name in np.unique(names):
            target, toward = is_target & (names == name), is_toward & (names == name)
            if target.any() and toward.any():
                self.vectors[str(name)] = values[toward].mean(0) - values[target].mean(0)
                self._n_cells[str(name)] = int(min(target.sum(), toward.sum()))

    def applied(self, embedding: Floats, is_target: Bools, group: Names, *, amount: float = 1.0) -> Floats:
        """The embedding [n_cells width], float64, with `amount` times their group's vector added to target cells.

        Cells of a group without a vector are unchanged.
        """
        out, names = np.array(embedding, dtype=np.float64), np.asarray(group, dtype=str)
        for name in np.unique(names):
            if (vector := self._vector(str(name))) is not None:
                out[is_target & (names == name)] += amount * vector
        return out

    def _vector(self, name: str) -> Floats | None:
        """The vector of a group; None if it has none."""
        if not self._of_other_groups:
            return self.vectors.get(name)
        others = [other for other in self.vectors if other != name]
        weights = [self._n_cells[other] for other in others]
        return np.average([self.vectors[other] for other in others], axis=0, weights=weights) if others else None


def _centred(values: Floats, batch: Ints) -> Floats:
    out: Floats = values + values.mean(0)
    for code in np.unique(batch):
        out[batch == code] -= values[batch == code].mean(0)
    return out
