"""Whether batches mix and cell types stay, by nearest neighbours and without a further library.

`predict_left_out` measures what matters to a user who maps new data onto old: the classifier is fitted on all batches
but one, with k = 5 neighbours, and predicts the cell types of that one.

`quick_mixing` is a score for searches, much cheaper than scIB's (`metrics.scib`), of two parts:

- mixing: of a cell's nearest neighbours of its own type, the share that comes from other batches, over what chance
  gives, (n_type - n_type_in_batch) / (n_type - 1); averaged over the cells of each type and batch, cut at 1, then over
  batches and types, each weighing the same. 1: batches cannot be told; 0: none is next to another.
- conservation: macro-F1 of the cell type as its nearest neighbours see it, the cell itself left out.

Over 11 embeddings of 1,021 sc_mixology cells (layers of the mini model, three corrected) they rank as scIB's batch
correction and bio-conservation do, Spearman .95 and .82 (.94 for .4 mixing + .6 conservation and scIB's total), in
30 ms instead of seconds.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from pipelines.errors import UsageError
from pipelines.steering.metrics.intervals import Floats, Ints, Names, blocks
from pipelines.steering.metrics.type_preservation import macro_f1

N_NEIGHBORS = 5
"""Neighbours of a cell in the other batches."""
MIXING_NEIGHBORS = 15
"""Neighbours of a cell in the score for searches."""
MIN_TYPE_CELLS = 4
"""Cells of a type whose mixing is scored, at least."""


class QuickMixing(NamedTuple):
    """The parts of the score for searches, 0 to 1; None where a part is not defined."""

    mixing: float | None
    """None where no type of at least 4 cells is in two batches."""
    conservation: float | None
    """None for fewer than 2 types or 3 cells."""


def predict_left_out(embedding: Floats, batch: Names, label: Names, *, k: int = N_NEIGHBORS) -> npt.NDArray[Any]:
    """Label of every cell as its nearest neighbours in the other batches see it [n_cells].

    Args:
        embedding: [n_cells width].
        batch: of every cell [n_cells].
        label: cell type of every cell [n_cells].
        k: neighbours.

    Raises:
        UsageError: fewer than two batches, or arrays of different lengths.
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
    """Score batch mixing inside cell types, and cell types, of an embedding [n_cells width].

    A type of few cells takes at most a third of them as neighbours.
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
    """Share of neighbours of other batches over chance, for the cells of one type; None where it is not defined."""
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
    """The k nearest other cells of each cell [n_cells k], exactly."""
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
