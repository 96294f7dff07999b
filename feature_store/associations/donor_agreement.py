"""Agreement of donors: the rank-biserial of each donor, the number with the same sign, p_donor, and an interval.

The blocked test of `rank_tests` takes the donors as given; the statistics of this module take them as a sample.
- If the label varies within donors, the rank-biserial r_d of feature and label is computed inside each donor that has
  cells on both sides, and each donor counts once. n_agree is the number of donors whose r_d has the sign of the effect
  of all cells. p_donor flips the signs of the r_d in every combination (Fisher 1935, The Design of Experiments). It is
  exact up to MAX_FLIPPED donors; beyond, it is approximated by Student's t and never below 2^(1 - n). The interval is
  the mean of the r_d +- t s / sqrt(n).
- If the label is constant within donors, the interval is that of the AUROC of all cells with the variance of clustered
  placements (Obuchowski 1997, doi:10.2307/2533958), where donors are the clusters, and t with Satterthwaite's degrees
  of freedom as in Brunner & Munzel (2000, Biometrical Journal 42:17). With one cell per donor it equals their interval.
  p_donor is the p of the test by unit.

Limits. With n donors p_donor is never below 2^(1 - n): 8 donors are needed for .01. A donor with one cell of the label
counts as much as one with hundreds. Intervals are pointwise 95 % intervals, and have no width if donors do not differ
at all. The interval of a mean needs three donors, that of placements two on each side; the coverage of the latter was
.93 to .97 with 3 and 3, 4 and 4, or 8 and 8 simulated donors, and .87 with 2 and 6.
"""

from itertools import product
from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.special import stdtr, stdtrit

from feature_store.associations.inputs import Bools, Floats, Sparse, Strata
from feature_store.associations.moments import cross_product, sum_rows
from feature_store.associations.ranks import column_ranks
from feature_store.associations.sorted_columns import Codes, SortedColumns

MAX_FLIPPED = 12
MIN_DONORS = 3
LEVEL = 0.95
_CHUNK_VALUES = 4_000_000


class DonorEffects(NamedTuple):
    """Statistics of the donors with cells on both sides of a label: their number [n_labels], and the number that agree
    in sign with the effect of all cells, the sign-flip p, and the interval of the mean rank-biserial, each [n_features
    n_labels]; NaN if there are too few donors.
    """

    n_donors: Floats
    n_agree: Floats
    p_donor: Floats
    low: Floats
    high: Floats


class Interval(NamedTuple):
    """The ends of the interval of a rank-biserial [n_features n_labels], NaN if there are too few donors."""

    low: Floats
    high: Floats


def across_donors(codes: Codes, indicator: Sparse, donors: Strata, effect: Floats) -> DonorEffects:
    """The agreement of donors on the effects of labels that vary within donors.

    codes: CSR [n_cells n_features]; indicator: CSR one-hot [n_cells n_labels]; effect: the rank-biserial of all cells
    [n_features n_labels].
    """
    n_features, n_labels = codes.shape[1], indicator.shape[1]
    both = _both_sides(indicator, donors)
    n_agree, p, low, high = (np.full((n_features, n_labels), np.nan) for _ in range(4))
    columns = SortedColumns.of(codes)
    widest = max(donors.n_strata * n_labels, 2 ** (MAX_FLIPPED - 1))
    step = max(1, _CHUNK_VALUES // widest)
    for start in range(0, n_features, step):
        rows = slice(start, start + step)
        by_donor = donor_effects(columns.columns(start, min(start + step, n_features)), indicator, donors)
        for label in np.flatnonzero(both.any(axis=0)):
            mine = by_donor[both[:, label], :, label]
            agrees = (np.sign(mine) == np.sign(effect[rows, label])) & (mine != 0)
            n_agree[rows, label] = agrees.sum(axis=0)
            p[rows, label] = sign_flip_p(mine)
            low[rows, label], high[rows, label] = interval_of_mean(mine)
    return DonorEffects(both.sum(axis=0).astype(np.float64), n_agree, p, low, high)


def donor_effects(codes: Codes, indicator: Sparse, donors: Strata) -> Floats:
    """The rank-biserial inside each donor [n_donors n_features n_labels], NaN if a donor has cells on one side only."""
    n_labels, size = indicator.shape[1], donors.sizes()[:, None]
    scores, zero_rank = column_ranks(codes, donors)
    rows, columns = indicator.nonzero()
    place = (rows, donors.codes[rows] * n_labels + columns)
    crossed = sparse.csr_array((np.ones(rows.size), place), shape=(codes.shape[0], donors.n_strata * n_labels))
    sums = cross_product(scores, crossed).reshape(-1, donors.n_strata, n_labels).transpose(1, 0, 2)
    n_label = np.asarray((donors.indicator() @ indicator).toarray())
    pairs = (n_label * (size - n_label))[:, None]
    u = sums + zero_rank[:, :, None] * n_label[:, None] - (n_label * (n_label + 1) / 2)[:, None]
    effect: Floats = 2 * np.divide(u, pairs, out=np.full_like(u, np.nan), where=pairs > 0) - 1
    return effect


def sign_flip_p(effects: Floats) -> Floats:
    """The two-sided p of the sum of effects [n_donors] or [n_donors n_columns] under random flips of each sign."""
    n = effects.shape[0]
    observed = np.abs(sum_rows(effects))
    if n <= MAX_FLIPPED:
        # flipping all signs changes no distance, so the first one stays
        signs = np.array([(1, *rest) for rest in product((1, -1), repeat=n - 1)], dtype=np.float64)
        exact: Floats = (np.abs(signs @ effects) >= observed - 1e-9).mean(axis=0)
        return exact
    mean, error = _mean_and_error(effects)
    t = np.divide(np.abs(mean), error, out=np.where(mean == 0, 0.0, np.inf), where=error > 0)
    p: Floats = np.maximum(2 * stdtr(n - 1, -t), 0.5 ** (n - 1))
    return p


def between_donors(codes: Codes, indicator: Sparse, donors: Strata) -> Interval:
    """The interval of the rank-biserial of all cells for labels that are (nearly) constant within donors; the shapes
    are those of `across_donors`.
    """
    n_cells, n_features = codes.shape
    low, high = (np.full((n_features, indicator.shape[1]), np.nan) for _ in range(2))
    columns = SortedColumns.of(codes)
    pooled = column_ranks(columns, Strata.single(n_cells))
    for label in range(indicator.shape[1]):
        side = np.zeros(n_cells, dtype=np.int64)
        side[indicator[:, [label]].nonzero()[0]] = 1
        place = (np.arange(n_cells), donors.codes * 2 + side)
        crossed = sparse.csr_array((np.ones(n_cells), place), shape=(n_cells, donors.n_strata * 2))
        size = np.bincount(place[1], minlength=donors.n_strata * 2).reshape(-1, 2).astype(np.float64)
        if ((size > 0).sum(axis=0) < 2).any():
            continue
        own = column_ranks(columns, Strata(codes=side, n_strata=2))
        # the number of cells of the other side below: the rank among all cells minus the rank within the own side
        difference = own.scores.copy()
        difference.data = pooled.scores.data - own.scores.data
        sums = cross_product(difference, crossed).reshape(n_features, -1, 2)
        below = sums + size * (pooled.zero_rank.T[:, :, None] - own.zero_rank.T[:, None])
        n_rest, n_label = size.sum(axis=0)
        above_rest, above_label = below[:, :, 1] / n_rest, size[:, 0] - below[:, :, 0] / n_label
        low[:, label], high[:, label] = _placement_interval(above_rest, above_label, size[:, 1], size[:, 0])
    return Interval(low, high)


def _placement_interval(label: Floats, rest: Floats, n_label: Floats, n_rest: Floats) -> Interval:
    """The interval [n_features] from sums of placements by donor [n_features n_donors] and cells a side [n_donors]."""
    n, m = n_label.sum(), n_rest.sum()
    area = sum_rows(label.T) / n
    of_label, of_rest = (label - n_label * area[:, None]).T, (rest - n_rest * area[:, None]).T
    d_label, d_rest, d = ((count > 0).sum() for count in (n_label, n_rest, n_label + n_rest))
    variance_label = d_label / (d_label - 1) * sum_rows(of_label**2) / n**2
    variance_rest = d_rest / (d_rest - 1) * sum_rows(of_rest**2) / m**2
    shared = d / (d - 1) * sum_rows(of_label * of_rest) / (n * m)
    error = np.sqrt(np.maximum(variance_label + variance_rest + 2 * shared, 0.0))
    weight = variance_label**2 / (d_label - 1) + variance_rest**2 / (d_rest - 1)
    total = (variance_label + variance_rest) ** 2
    df = np.divide(total, weight, out=np.ones_like(total), where=weight > 0)
    half = 2 * stdtrit(df, (1 + LEVEL) / 2) * error
    return Interval(np.maximum(2 * area - 1 - half, -1.0), np.minimum(2 * area - 1 + half, 1.0))


def interval_of_mean(effects: Floats) -> Interval:
    """The interval of the mean over donors of effects [n_donors n_columns]."""
    n = effects.shape[0]
    if n < MIN_DONORS:
        nothing = np.full(effects.shape[1], np.nan)
        return Interval(nothing, nothing)
    mean, error = _mean_and_error(effects)
    half = stdtrit(n - 1, (1 + LEVEL) / 2) * error
    return Interval(np.maximum(mean - half, -1.0), np.minimum(mean + half, 1.0))


def _mean_and_error(effects: Floats) -> tuple[Floats, Floats]:
    """The mean over donors and its standard error, each [n_columns]."""
    n = effects.shape[0]
    mean = sum_rows(effects) / n
    error: Floats = np.sqrt(sum_rows((effects - mean) ** 2) / max(n - 1, 1) / n)
    return mean, error


def _both_sides(indicator: Sparse, donors: Strata) -> Bools:
    """Whether each donor has cells both with and without each label [n_donors n_labels]."""
    n_label = np.asarray((donors.indicator() @ indicator).toarray())
    answer: Bools = (n_label > 0) & (n_label < donors.sizes()[:, None])
    return answer
