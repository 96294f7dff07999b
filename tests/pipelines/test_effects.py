"""Effects of steering, against numbers worked out by hand."""

import numpy as np
import pytest
from scipy import stats

from pipelines.effects import METRICS, Judge, effects


@pytest.fixture
def judge():
    """Ten train cells and four test cells of two types, far apart on a line."""
    train = np.array([[0.0], [0.1], [0.2], [0.3], [0.4], [10.0], [10.1], [10.2], [10.3], [10.4]])
    test = np.array([[0.0], [0.2], [10.0], [10.2]])
    return Judge(train, ["A"] * 5 + ["B"] * 5, test, ["A", "A", "B", "B"], "A")


def rows_of(frame, condition):
    return {row["metric"]: row for row in frame.filter(condition=condition).iter_rows(named=True)}


def test_doing_nothing_has_no_effect_on_any_metric(judge):
    same = np.array([[0.0], [0.2], [10.0], [10.2]])
    frame = effects(judge, {"unsteered": [same], "ablate": [same], "random": [same, same]}, nulls=["random"], seed=0)
    assert frame.filter(condition="ablate")["effect"].to_list() == [0.0] * len(METRICS)
    assert frame.filter(condition="ablate")["p_random"].to_list() == [1.0] * len(METRICS)


def test_moving_the_target_cells_onto_the_others_is_seen_as_such(judge):
    same = np.array([[0.0], [0.2], [10.0], [10.2]])
    moved = np.array([[10.0], [10.2], [10.0], [10.2]])
    rows = rows_of(effects(judge, {"unsteered": [same], "ablate": [moved]}, nulls=[], seed=0), "ablate")
    spread = np.sqrt(((same - same.mean()) ** 2).mean())
    assert rows["target_votes"]["value"] == 0.0
    assert rows["target_votes"]["effect"] == -1.0
    assert rows["other_votes"]["effect"] == 0.0
    assert rows["other_accuracy"]["value"] == 1.0
    assert rows["target_shift"]["value"] == pytest.approx(10.0 / spread)
    assert rows["other_shift"]["value"] == 0.0


def test_p_of_a_null_counts_draws_at_least_as_large_and_the_condition_itself(judge):
    same = np.array([[0.0], [0.2], [10.0], [10.2]])
    draws = [same + shift for shift in (0.01, 0.02, 0.3)]
    frame = effects(judge, {"unsteered": [same], "ablate": [same + 0.1], "random": draws}, nulls=["random"], seed=0)
    assert rows_of(frame, "ablate")["target_shift"]["p_random"] == pytest.approx((1 + 1) / (1 + 3))


def test_interval_over_null_draws_is_students(judge):
    same = np.array([[0.0], [0.2], [10.0], [10.2]])
    shifts = np.array([0.01, 0.02, 0.3])
    frame = effects(judge, {"unsteered": [same], "random": [same + s for s in shifts]}, nulls=["random"], seed=0)
    row = rows_of(frame, "random")["other_shift"]
    values = shifts / np.sqrt(((same - same.mean()) ** 2).mean())
    low, high = stats.t.interval(0.95, 2, loc=values.mean(), scale=stats.sem(values))
    assert (row["low"], row["high"]) == (pytest.approx(low), pytest.approx(high))
    assert row["n_draws"] == 3


def test_a_target_that_no_train_cell_has_gets_no_votes():
    train, test = np.array([[0.0], [1.0]]), np.array([[0.0], [5.0]])
    judge = Judge(train, ["B", "B"], test, ["A", "B"], "A")
    assert judge.per_cell(test)["votes"].tolist() == [0.0, 0.0]
