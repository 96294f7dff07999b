import numpy as np
import pytest
from scipy import stats

from pipelines.steering.metrics.intervals import (
    UNKNOWN,
    blocks,
    bootstrap,
    bootstrap_mean,
    percentiles,
    rank_p,
    student,
    subsamples,
)


@pytest.fixture
def values():
    return np.random.default_rng(0).normal(2.0, 1.0, 200)


def test_bootstrap_of_a_mean_agrees_with_scipy(values):
    own = bootstrap_mean(values, seed=1, n_bootstrap=4000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=2).confidence_interval
    np.testing.assert_allclose(own, theirs, atol=0.01)


def test_both_bootstraps_agree_inside_blocks(values):
    block = np.arange(200) % 3
    fast = bootstrap_mean(values, block, seed=1, n_bootstrap=2000)
    general = bootstrap(lambda rows: float(values[rows].mean()), block, seed=2, n_bootstrap=2000)
    np.testing.assert_allclose(fast, general, atol=0.015)


def test_blocks_keep_what_differs_between_donors_out_of_the_interval():
    donor = np.repeat(["a", "b"], 50)
    shifted = np.where(donor == "a", 0.0, 10.0)
    assert bootstrap_mean(shifted, blocks(100, donor), seed=0) == (5.0, 5.0)
    low, high = bootstrap_mean(shifted, seed=0)
    assert low < 5 < high


def test_chunks_of_resamples_change_no_number_of_cells(monkeypatch, values):
    monkeypatch.setattr("pipelines.steering.metrics.intervals._MAX_DRAWN", 1000)
    low, high = bootstrap_mean(values, seed=0)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(200), rel=0.15)


def test_the_same_seed_gives_the_same_interval(values):
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)


def test_blocks_number_the_combinations_of_labels():
    assert blocks(4, ["a", "a", "b", "b"], ["x", "y", "x", "x"]).tolist() == [0, 1, 2, 2]
    assert blocks(3, None).tolist() == [0, 0, 0]


def test_subsamples_of_a_mean_are_as_wide_as_the_bootstrap(values):
    block = np.arange(200) % 3
    halves = subsamples(lambda rows: float(values[rows].mean()), block, seed=1, n_samples=2000)
    np.testing.assert_allclose(halves, bootstrap_mean(values, block, seed=1, n_bootstrap=2000), atol=0.02)


def test_subsamples_repeat_no_cell_and_keep_blocks_whole():
    block, seen = np.repeat([0, 1, 2], [10, 5, 1]), []
    subsamples(lambda rows: float(seen.append(rows) or rows.sum()), block, seed=0, n_samples=20)
    for rows in seen[1:]:
        assert len(np.unique(rows)) == len(rows)
        assert np.bincount(block[rows]).tolist() == [8, 4, 1]


def test_subsamples_of_nothing_or_of_single_cells_have_no_interval():
    assert subsamples(lambda rows: None, np.zeros(4, dtype=np.int64), seed=0) == UNKNOWN
    assert subsamples(lambda rows: 1.0, np.arange(4), seed=0) == UNKNOWN


def test_student_interval_agrees_with_scipy(values):
    theirs = stats.ttest_1samp(values[:7], 0).confidence_interval(0.95)
    np.testing.assert_allclose(student(values[:7]), theirs)


@pytest.mark.parametrize("draws", [[], [1.0], [1.0, float("nan")]])
def test_too_few_draws_have_no_interval(draws):
    assert student(draws) == UNKNOWN


def test_no_cells_have_no_interval():
    assert bootstrap_mean(np.zeros(0), seed=0) == UNKNOWN
    assert bootstrap(lambda rows: 1.0, np.zeros(0, dtype=np.int64), seed=0) == UNKNOWN
    assert percentiles([float("nan")]) == UNKNOWN


def test_rank_p_counts_draws_at_least_as_good_by_hand():
    null = [0.1, 0.2, 0.3, 0.4]
    assert rank_p(0.3, null, higher_is_better=True) == (1 + 2) / 5
    assert rank_p(0.3, null, higher_is_better=False) == (1 + 3) / 5
    assert rank_p(-0.35, null, higher_is_better=None) == (1 + 1) / 5


def test_an_effect_in_the_wrong_direction_is_never_significant():
    null = np.random.default_rng(0).normal(size=99)
    assert rank_p(-50.0, null, higher_is_better=True) == 1.0
    assert rank_p(50.0, null, higher_is_better=True) == 0.01


def test_a_null_draw_that_broke_down_counts_against_the_effect():
    assert rank_p(5.0, [0.0, float("nan")], higher_is_better=True) == 2 / 3


def test_rank_p_without_a_null_or_an_effect_is_none():
    assert rank_p(1.0, [], higher_is_better=True) is None
    assert rank_p(None, [1.0], higher_is_better=True) is None
