import numpy as np
import pytest
from sklearn.metrics import f1_score
from sklearn.neighbors import NearestNeighbors

from pipelines.errors import UsageError
from pipelines.steering.metrics.type_preservation import TypeJudge, macro_f1, off_axis


@pytest.fixture
def typed():
    rng = np.random.default_rng(0)
    kind = np.repeat(["A", "B", "C"], 20)
    return rng.normal(size=(60, 3)) + 2.0 * np.eye(3)[np.repeat(range(3), 20)], kind


def vote(reference, labels, cells):
    """The most frequent label of the 5 nearest, the first by name among equals."""
    near = NearestNeighbors(n_neighbors=5).fit(reference).kneighbors(cells, return_distance=False)
    names = np.unique(labels)
    return names[[np.argmax([(labels[row] == name).sum() for name in names]) for row in near]]


def test_drift_counts_types_as_five_neighbours_vote(typed):
    embedding, kind = typed
    reference, cells, truth = embedding[::2], embedding[1::2], kind[1::2]
    steered = cells + np.array([1.5, 0, 0])
    drift = TypeJudge(reference, kind[::2]).drift(cells, steered, truth)
    before, after = vote(reference, kind[::2], cells), vote(reference, kind[::2], steered)
    assert drift.accuracy_before == (before == truth).mean()
    assert drift.accuracy_after == (after == truth).mean()
    assert drift.macro_f1_after == pytest.approx(f1_score(truth, after, average="macro"))
    assert drift.changed == (before != after).mean() > 0
    assert drift.n_cells == 30


def test_cells_left_in_place_do_not_drift(typed):
    embedding, kind = typed
    drift = TypeJudge(embedding, kind).drift(embedding, embedding, kind)
    assert drift.changed == 0.0
    assert drift.accuracy_before == drift.accuracy_after


def test_no_cells_have_no_drift_and_no_reference_is_refused(typed):
    embedding, kind = typed
    assert TypeJudge(embedding, kind).drift(embedding[:0], embedding[:0], kind[:0]) == (None,) * 5 + (0,)
    with pytest.raises(UsageError, match="0 reference cells"):
        TypeJudge(embedding[:0], kind[:0])


def test_macro_f1_is_of_the_labels_that_cells_have():
    assert macro_f1(["a", "a", "b"], ["a", "a", "c"]) == 0.5


def test_movement_splits_into_along_and_beside_the_line_by_hand():
    unsteered = np.array([[0.0, 0.0]] * 4 + [[4.0, 0.0]] * 4)
    steered = unsteered.copy()
    steered[:4] = [[2.0, 1.0], [2.0, 1.0], [2.0, 3.0], [2.0, -1.0]]
    target = np.arange(8) < 4
    table = off_axis(unsteered, steered, target, ~target, ["T"] * 8, min_cells=2)
    row = table.row(0, named=True)
    assert row == {"group": "T", "n_cells": 4, "axis": 4.0, "along": 0.5, "off_axis": 0.25, "off_axis_cells": 0.375}
    assert table.row(1, named=True) == row | {"group": "all"}


def test_all_groups_together_are_the_ratio_of_mean_lengths():
    unsteered = np.array([[0.0, 0], [0, 0], [2, 0], [2, 0], [0, 0], [0, 0], [6, 0], [6, 0]])
    steered = unsteered + np.array([[1.0, 0]] * 4 + [[6.0, 0]] * 4)
    target = np.arange(8) % 4 < 2
    table = off_axis(unsteered, steered, target, ~target, [*"AAAABBBB"], min_cells=2)
    assert table["along"].to_list() == [0.5, 1.0, pytest.approx(7 / 8)]


def test_groups_too_small_or_without_an_axis_are_missing():
    still = np.zeros((8, 2))
    target = np.arange(8) < 4
    assert off_axis(still, still, target, ~target, ["T"] * 8, min_cells=2).is_empty()
    assert off_axis(still + target[:, None], still, target, ~target, ["T"] * 8, min_cells=5).is_empty()
