from __future__ import annotations

import numpy as np
import pytest

from sae_core.scfm.binning import digit_ranges, edge_counts


def by_quantiles(values: np.ndarray, n_bins: int) -> tuple[np.ndarray, np.ndarray]:
    """The published rule with numpy's quantiles: every digit in (edges below x, edges not above x] may be drawn."""
    edges = np.quantile(values.astype(np.float64), np.linspace(0, 1, n_bins - 1))
    below, not_above = np.digitize(values, edges, right=True), np.digitize(values, edges)
    return np.where(below == not_above, below, below + 1), not_above


@pytest.mark.parametrize("n_values", [2, 3, 7, 50, 51, 333])
@pytest.mark.parametrize("n_bins", [3, 5, 51])
def test_digit_ranges_of_distinct_and_tied_values_equal_quantiles_and_digitize(n_values: int, n_bins: int) -> None:
    rng = np.random.default_rng(n_values * n_bins)
    for values in (rng.standard_normal(n_values), rng.geometric(0.6, n_values).astype(float)):
        ranges = digit_ranges(values, np.zeros(n_values, dtype=np.int64), n_cells=1, n_bins=n_bins)
        low, high = by_quantiles(values, n_bins)
        # an edge exactly on a value is a matter of rounding in numpy's quantiles; by ranks it is exact
        exact = np.isclose(np.linspace(0, n_values - 1, n_bins - 1) % 1, 0) | np.isclose(
            np.linspace(0, n_values - 1, n_bins - 1) % 1, 1
        )
        slack = 1 if exact[1:-1].any() else 0
        assert np.abs(ranges.low - low).max() <= slack
        assert np.abs(ranges.high - high).max() <= slack


def test_hand_computed_digits() -> None:
    # n_bins 5: four edges, at ranks 0, 1, 2, 3 of four values 1 1 2 9, so edges 1 1 2 9
    ranges = digit_ranges(np.array([2.0, 1.0, 9.0, 1.0]), np.zeros(4, dtype=np.int64), n_cells=1, n_bins=5)
    np.testing.assert_array_equal(ranges.low, [3, 1, 4, 1])
    np.testing.assert_array_equal(ranges.high, [3, 2, 4, 2])


def test_edges_below_and_not_above_by_hand() -> None:
    # the edges of two cells, 1 1 2 9 and 4, are 1 1 2 9 and four times 4
    values, cell = np.array([2.0, 4.0, 1.0, 9.0, 1.0]), np.array([0, 1, 0, 0, 0])
    edges = edge_counts(values, cell, n_cells=2, n_bins=5)
    np.testing.assert_array_equal(edges.below, [2, 0, 0, 3, 0])
    np.testing.assert_array_equal(edges.not_above, [3, 4, 2, 4, 2])


def test_cells_are_binned_on_their_own() -> None:
    rng = np.random.default_rng(1)
    values, cell = rng.geometric(0.5, 90).astype(float), rng.integers(0, 4, 90)
    together = digit_ranges(values, cell, n_cells=5, n_bins=11)
    for c in range(4):
        here = cell == c
        alone = digit_ranges(values[here], np.zeros(here.sum(), dtype=np.int64), n_cells=1, n_bins=11)
        np.testing.assert_array_equal(together.low[here], alone.low)
        np.testing.assert_array_equal(together.high[here], alone.high)


def test_digits_do_not_change_under_a_strictly_increasing_transform() -> None:
    values = np.random.default_rng(2).geometric(0.3, 200).astype(float)
    cell = np.zeros(200, dtype=np.int64)
    raw = digit_ranges(values, cell, n_cells=1, n_bins=51)
    log = digit_ranges(np.log1p(values * 3.7), cell, n_cells=1, n_bins=51)
    np.testing.assert_array_equal(raw.low, log.low)
    np.testing.assert_array_equal(raw.high, log.high)
