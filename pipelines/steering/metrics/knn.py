"""Which label the neighbours of a cell vote for, and how far the cell moved: what an edit of a label's features does.

A classifier of k = 5 nearest neighbours is fitted once, on the unsteered embeddings of `train` cells; every variant is
judged by it on the same cells. Of the cells that carry the target label and of the others it asks: how many neighbours
carry the target label (`votes`), is the majority right (`accuracy`), and how far did the embedding move (`shift`, in
units of the cells' RMS distance from their mean).
"""

from collections.abc import Sequence

import numpy as np
from sklearn.neighbors import KNeighborsClassifier

from pipelines.steering.metrics.intervals import Bools, Floats

N_NEIGHBORS = 5


class Judge:
    """Scores the embeddings of the same cells under any variant."""

    def __init__(
        self, train: Floats, train_labels: Sequence[str], test: Floats, test_labels: Sequence[str], target: str
    ) -> None:
        """Fit on train [n_train width] and remember the unsteered test [n_test width] embeddings."""
        self._knn = KNeighborsClassifier(min(N_NEIGHBORS, len(train))).fit(train, np.asarray(train_labels, dtype=str))
        self._unsteered = np.asarray(test, dtype=np.float64)
        self._labels = np.asarray(test_labels, dtype=str)
        self._target = target
        self._spread = float(np.sqrt(((self._unsteered - self._unsteered.mean(0)) ** 2).sum(1).mean())) or 1.0
        self.is_target: Bools = self._labels == target

    def per_cell(self, steered: Floats) -> dict[str, Floats]:
        """Values per cell, float64 [n_test], of `votes`, `correct` and `shift` under one variant."""
        share = self._knn.predict_proba(steered)
        classes = self._knn.classes_
        column = np.flatnonzero(classes == self._target)
        return {
            "votes": share[:, column[0]] if len(column) else np.zeros(len(steered)),
            "correct": (classes[share.argmax(1)] == self._labels).astype(np.float64),
            "shift": np.linalg.norm(np.asarray(steered, dtype=np.float64) - self._unsteered, axis=1) / self._spread,
        }

    def columns(self, steered: Floats) -> dict[str, Floats]:
        """Per-cell values behind each of `METRICS`, restricted to the cells it averages over."""
        cells = self.per_cell(steered)
        own, other = self.is_target, ~self.is_target
        return {
            "target_votes": cells["votes"][own],
            "other_votes": cells["votes"][other],
            "other_accuracy": cells["correct"][other],
            "target_shift": cells["shift"][own],
            "other_shift": cells["shift"][other],
        }
