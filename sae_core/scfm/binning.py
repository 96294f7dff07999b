"""The per-cell value binning of scGPT and Tahoe-x1, by ranks.

Upstream: edges = quantile(nonzero values, linspace(0, 1, m)), m = n_bins - 1, lo = edges below x, hi = edges not above
x. scGPT draws the digit of x uniformly from lo + 1 ... hi (lo if they are equal); that of Tahoe-x1 is lo + 1. Edge j is
at the fractional rank j (n - 1) / (m - 1) of the sorted values; if x holds ranks first ... last, then

    lo = ceil(first (m - 1) / (n - 1)),    hi = floor(last (m - 1) / (n - 1)) + 1

exactly, in integers. So a digit depends on ranks only: counts and log-normalised values give equal digits, and all
cells are binned in one vectorised pass. Paper: Cui et al. 2024, scGPT, 10.1038/s41592-024-02201-0 ("value binning").
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int64

TieBreak = Literal["random", "midpoint"]


class EdgeCounts(NamedTuple):
    """Number of quantile edges below each value, and of those that are not above it."""

    below: Int64[np.ndarray, " value"]
    not_above: Int64[np.ndarray, " value"]


class DigitRange(NamedTuple):
    """Smallest and largest digit that each value may take (equal where there is no tie)."""

    low: Int64[np.ndarray, " value"]
    high: Int64[np.ndarray, " value"]


def digit_ranges(
    values: Float[np.ndarray, " value"], cell: Int64[np.ndarray, " value"], *, n_cells: int, n_bins: int
) -> DigitRange:
    """Digits 1 ... n_bins - 1 that the nonzero `values` of each cell may take in scGPT."""
    below, not_above = edge_counts(values, cell, n_cells=n_cells, n_bins=n_bins)
    return DigitRange(np.where(below == not_above, below, below + 1), not_above)


def edge_counts(
    values: Float[np.ndarray, " value"], cell: Int64[np.ndarray, " value"], *, n_cells: int, n_bins: int
) -> EdgeCounts:
    """Edges below and not above the nonzero `values` of each cell; `cell` says whose value it is."""
    n_edges = n_bins - 1
    order = np.lexsort((values, cell))
    n_of_cell = np.bincount(cell, minlength=n_cells)
    start_of_cell = np.cumsum(n_of_cell) - n_of_cell
    sorted_value, sorted_cell = values[order], cell[order]
    new_run = np.ones(len(values), dtype=bool)
    new_run[1:] = (sorted_value[1:] != sorted_value[:-1]) | (sorted_cell[1:] != sorted_cell[:-1])
    run = np.cumsum(new_run) - 1
    run_start = np.flatnonzero(new_run)
    run_end = np.append(run_start[1:], len(values)) - 1
    offset = start_of_cell[sorted_cell]
    first, last = run_start[run] - offset, run_end[run] - offset
    n_gaps = np.maximum(n_of_cell[sorted_cell] - 1, 1)
    lo = -(-first * (n_edges - 1) // n_gaps)
    hi = np.where(n_of_cell[sorted_cell] == 1, n_edges, last * (n_edges - 1) // n_gaps + 1)
    below, not_above = np.empty_like(cell), np.empty_like(cell)
    below[order], not_above[order] = lo, hi
    return EdgeCounts(below, not_above)
