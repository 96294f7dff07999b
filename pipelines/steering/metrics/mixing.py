"""The mixing of batches and the conservation of cell types, by nearest neighbours and without a further library.

`predict_left_out` measures how well new data map onto old: a classifier with k = 5 neighbours is fitted on all batches
but one and predicts the cell types of that batch.

`quick_mixing` is a score for searches, which is much cheaper than scIB's (`metrics.scib`). It has two parts:

- mixing: among a cell's nearest neighbours of its own type, the share from other batches, divided by the share expected
  by chance, (n_type - n_type_in_batch) / (n_type - 1). It is averaged over the cells of each type and batch, limited to
  1, and then averaged over batches and types with equal weights. At 1 batches cannot be distinguished; at 0 no cell is
  next to one of another batch.
- conservation: the macro-F1 of cell types predicted from each cell's nearest neighbours, without the cell itself.

Over 11 embeddings of 1,021 sc_mixology cells (layers of the mini model, three of them corrected) the ranks agree with
scIB's batch correction and bio-conservation, Spearman .95 and .82 (.94 for .4 mixing + .6 conservation and scIB's
total), in 30 ms instead of seconds.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from pipelines.errors import UsageError
from pipelines.steering.metrics.intervals import Floats, Ints, Names, blocks
from pipelines.steering.metrics.type_preservation import macro_f1

N_NEIGHBORS = 5
"""Number of neighbours of a cell in the other batches."""
MIXING_NEIGHBORS = 15
"""Number of neighbours of a cell in the score for searches."""
MIN_TYPE_CELLS = 4
"""Least number of cells of a type whose mixing is scored."""


class QuickMixing(NamedTuple):
    """The two parts of the score for searches, each 0 to 1; None if a part is not defined."""

    mixing: float | None
    """Mixing; None if no type of at least 4 cells is in two batches."""
    conservation: float | None
    """Conservation; None for fewer than 2 types or 3 cells."""


def predict_left_out(embedding: Floats, batch: Names, label: Names, *, k: int = N_NEIGHBORS) -> npt.NDArray[Any]:
    """The label of every cell that its nearest neighbours in the other batches predict [n_cells].

    Args:
        embedding: the embedding [n_cells width].
        batch: the batch of every cell [n_cells].
        label: the cell type of every cell [n_cells].
        k: the number of neighbours.

    Raises:
        UsageError: there are fewer than two batches, or arrays have different lengths.
    """
    values, batches, labels = _checked(embedding, batch, label)
    names = np.unique(batches)
    if len(names) < 2:
        raise UsageError(f"batches {names.tolist()}: leaving one out needs at least two")
    predicted = np.empty_like(labels)
    for name in names:
        own = batches == name
        knn = KNeighborsClassifier(min(k, int((~own).sum())), algorithm="brute").fit(values[~own], labels[~own])
        predicted[own] = knn.predict(values[own])
    return predicted


def quick_mixing(embedding: Floats, batch: Names, label: Names, *, k: int = MIXING_NEIGHBORS) -> QuickMixing:
    """The mixing of batches inside cell types and the conservation of cell types of an embedding [n_cells width].

    In a type of few cells, at most a third of them are neighbours.
    """
    values, batches, labels = _checked(embedding, batch, label)
    mixed = [
        _mixing(values[labels == name], blocks(int((labels == name).sum()), batches[labels == name]), k)
        for name in np.unique(labels)
    ]
    known = [score for score in mixed if score is not None]
    mixing = float(np.mean(known)) if known else None
    return QuickMixing(mixing, _conservation(values, labels, k))


def _mixing(values: Floats, batch: Ints, k: int) -> float | None:
    """The share of neighbours from other batches over chance, for the cells of one type; None if not defined."""
    n, sizes = len(values), np.bincount(batch)
    if n < MIN_TYPE_CELLS or len(sizes) < 2:
        return None
    foreign = (batch[_neighbors(values, min(k, (n - 1) // 3))] != batch[:, None]).mean(1)
    found = np.bincount(batch, weights=foreign) / sizes
    return float(np.minimum(found / ((n - sizes) / (n - 1)), 1.0).mean())


def _conservation(values: Floats, labels: Names, k: int) -> float | None:
    codes = blocks(len(values), labels)
    if len(values) < 3 or codes.max() < 1:
        return None
    near = codes[_neighbors(values, min(k, len(values) - 1))]
    votes = np.stack([(near == code).sum(1) for code in range(codes.max() + 1)], axis=1)
    return macro_f1([*map(str, codes)], [*map(str, votes.argmax(1))])


def _neighbors(values: Floats, k: int) -> Ints:
    """The exact k nearest other cells of each cell [n_cells k]."""
    near: Ints = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(values).kneighbors(return_distance=False)
    return near


def _checked(embedding: Floats, batch: Names, label: Names) -> tuple[Floats, npt.NDArray[Any], npt.NDArray[Any]]:
    values, batches, labels = np.asarray(embedding), np.asarray(batch, dtype=str), np.asarray(label, dtype=str)
    if values.ndim != 2 or not len(values) == len(batches) == len(labels) > 0:
        raise UsageError(
            f"embedding {list(values.shape)}, {len(batches)} batches, {len(labels)} labels; expected a row, a batch "
            "and a label for each of at least one cell"
        )
    return values, batches, labels
