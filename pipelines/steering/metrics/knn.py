"""Classification by nearest neighbours: the labels of a cell's neighbours, and the distance that the cell moved.

A classifier of k = 5 nearest neighbours is fitted once, on the unsteered embeddings of `train` cells, and applied to
the same cells under every variant. For the cells that carry the target label and for the others it gives the share of
neighbours that carry the target label (`votes`), whether the most frequent label is right (`accuracy`), and how far the
embedding moved (`shift`, in units of the cells' RMS distance from their mean).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.neighbors import KNeighborsClassifier

from pipelines.steering.metrics.intervals import Bools, Floats, Names

N_NEIGHBORS = 5
"""Number of neighbours of a cell among `train` cells."""


def knn_labels(train: Floats, labels: Names) -> Callable[[Floats], npt.NDArray[Any]]:
    """A function of embeddings [n_cells width] that returns the most frequent label of their neighbours [n_cells]."""
    predict: Callable[[Floats], npt.NDArray[Any]] = _fitted(train, labels).predict
    return predict


class KNNClassifier:
    """Classifies the same cells under any variant."""

    def __init__(
        self, train: Floats, train_labels: Sequence[str], test: Floats, test_labels: Sequence[str], target: str
    ) -> None:
        """Fit on train [n_train width] and keep the unsteered test [n_test width] embeddings."""
        self._knn = _fitted(train, train_labels)
        self._unsteered = np.asarray(test, dtype=np.float64)
        self._labels = np.asarray(test_labels, dtype=str)
        self._target = target
        self._spread = float(np.sqrt(((self._unsteered - self._unsteered.mean(0)) ** 2).sum(1).mean())) or 1.0
        self.is_target: Bools = self._labels == target

    def columns(self, steered: Floats) -> dict[str, Floats]:
        """The values behind each metric under one variant, one for each cell that the metric averages over."""
        share = self._knn.predict_proba(steered)
        classes = self._knn.classes_
        column = np.flatnonzero(classes == self._target)
        share_of_target = share[:, column[0]] if len(column) else np.zeros(len(steered))
        is_right = (classes[share.argmax(1)] == self._labels).astype(np.float64)
        shift = np.linalg.norm(np.asarray(steered, dtype=np.float64) - self._unsteered, axis=1) / self._spread
        own, other = self.is_target, ~self.is_target
        return {
            "target_votes": share_of_target[own],
            "other_votes": share_of_target[other],
            "other_accuracy": is_right[other],
            "target_shift": shift[own],
            "other_shift": shift[other],
        }


def _fitted(train: Floats, labels: Names) -> KNeighborsClassifier:
    return KNeighborsClassifier(min(N_NEIGHBORS, len(train))).fit(train, np.asarray(labels, dtype=str))
