import numpy as np
import pytest
from scipy import stats

from feature_store.query.metrics import Direction
from pipelines.steering.metrics.intervals import UNKNOWN, blocks, percentiles, rank_p, student


@pytest.fixture
def values():
    return np.random.default_rng(0).normal(2.0, 1.0, 200)


def test_blocks_number_the_combinations_of_labels():
    assert blocks(4, ["a", "a", "b", "b"], ["x", "y", "x", "x"]).tolist() == [0, 1, 2, 2]
    assert blocks(3, None).tolist() == [0, 0, 0]


def test_student_interval_agrees_with_scipy(values):
    theirs = stats.ttest_1samp(values[:7], 0).confidence_interval(0.95)
    np.testing.assert_allclose(student(values[:7]), theirs)


@pytest.mark.parametrize("draws", [[], [1.0], [1.0, float("nan")]])
def test_too_few_draws_have_no_interval(draws):
    assert student(draws) == UNKNOWN


def test_no_cells_have_no_interval():
    assert percentiles([]) == UNKNOWN
    assert percentiles([float("nan")]) == UNKNOWN


def test_rank_p_counts_draws_at_least_as_good_by_hand():
    null = [0.1, 0.2, 0.3, 0.4]
    assert rank_p(0.3, null, Direction.HIGHER) == (1 + 2) / 5
    assert rank_p(0.3, null, Direction.LOWER) == (1 + 3) / 5
    for direction in (Direction.NEITHER, Direction.AS_INTENDED):
        assert rank_p(-0.35, null, direction) == (1 + 1) / 5


def test_an_effect_in_the_wrong_direction_is_never_significant():
    null = np.random.default_rng(0).normal(size=99)
    assert rank_p(-50.0, null, Direction.HIGHER) == 1.0
    assert rank_p(50.0, null, Direction.HIGHER) == 0.01


def test_a_null_draw_that_broke_down_counts_against_the_effect():
    assert rank_p(5.0, [0.0, float("nan")], Direction.HIGHER) == 2 / 3


def test_rank_p_without_a_null_or_an_effect_is_none():
    assert rank_p(1.0, [], Direction.HIGHER) is None
    assert rank_p(None, [1.0], Direction.HIGHER) is None
