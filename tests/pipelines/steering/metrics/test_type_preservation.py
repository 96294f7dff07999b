import numpy as np
import pytest

from pipelines.steering.metrics.type_preservation import macro_f1, off_axis


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
