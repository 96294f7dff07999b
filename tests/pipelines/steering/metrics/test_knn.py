"""Votes of neighbours, against numbers worked out by hand."""

import numpy as np
import pytest

from pipelines.steering.metrics.knn import KNNClassifier

SAME = np.array([[0.0], [0.2], [10.0], [10.2]])


@pytest.fixture
def classifier():
    """Ten train cells and four test cells of two types, far apart on a line."""
    train = np.array([[0.0], [0.1], [0.2], [0.3], [0.4], [10.0], [10.1], [10.2], [10.3], [10.4]])
    return KNNClassifier(train, ["A"] * 5 + ["B"] * 5, SAME, ["A", "A", "B", "B"], "A")


def test_doing_nothing_moves_no_cell_and_leaves_every_vote(classifier):
    found = classifier.columns(SAME)
    assert {name: values.tolist() for name, values in found.items()} == {
        "target_votes": [1.0, 1.0],
        "other_votes": [0.0, 0.0],
        "other_accuracy": [1.0, 1.0],
        "target_shift": [0.0, 0.0],
        "other_shift": [0.0, 0.0],
    }


def test_moving_the_target_cells_onto_the_others_is_seen_as_such(classifier):
    found = classifier.columns(np.array([[10.0], [10.2], [10.0], [10.2]]))
    spread = np.sqrt(((SAME - SAME.mean()) ** 2).mean())
    assert found["target_votes"].tolist() == [0.0, 0.0]
    assert found["other_votes"].tolist() == [0.0, 0.0]
    assert found["other_accuracy"].tolist() == [1.0, 1.0]
    assert found["target_shift"].tolist() == pytest.approx([10.0 / spread] * 2)
    assert found["other_shift"].tolist() == [0.0, 0.0]


def test_a_target_that_no_train_cell_has_gets_no_votes():
    train, test = np.array([[0.0], [1.0]]), np.array([[0.0], [5.0]])
    classifier = KNNClassifier(train, ["B", "B"], test, ["A", "B"], "A")
    assert classifier.columns(test)["target_votes"].tolist() == [0.0]
