"""Midranks of a sparse matrix that stay sparse: the zeros of a column are one block of ties and become the origin.

For a column and a stratum with n cells, n_neg values below zero and n_zero zeros, every zero has midrank r0 = n_neg +
(n_zero + 1)/2. The score stored is (midrank - r0), so a zero stays a zero and rank statistics become sparse products:
a rank sum is the sum of scores plus n_label * r0, a Spearman correlation is the Pearson correlation of the scores.
Exact with ties everywhere.
Cost: one sort of the stored values by value and a counting sort by column and stratum: 10 million in 4 s on one core.
"""

from typing import NamedTuple

import numpy as np
from scipy import sparse

from feature_store.associations.inputs import Floats, Ints, Sparse, Strata


class RankScores(NamedTuple):
    """`scores` CSR float64 [n_cells n_columns] with the pattern of the input; `zero_rank` [n_strata n_columns]."""

    scores: Sparse
    zero_rank: Floats


def rank_scores(matrix: Sparse, strata: Strata) -> RankScores:
    """Midranks within strata, measured from the midrank of the zeros.

    matrix: CSR [n_cells n_columns] without stored zeros (`as_csr`). Ranks start at 1 in every stratum, as in
    scipy.stats.rankdata.
    """
    found = column_ranks(sparse.csc_array(matrix), strata)
    return RankScores(sparse.csr_array(found.scores), found.zero_rank)


def column_ranks(by_column: Sparse, strata: Strata) -> RankScores:
    """The same from CSC to CSC, which shares its index arrays."""
    n_columns = by_column.shape[1]
    column = np.repeat(np.arange(n_columns), np.diff(by_column.indptr))
    group = column * strata.n_strata + strata.codes[by_column.indices]
    n_groups = n_columns * strata.n_strata
    order = _by_group_and_value(group, by_column.data, n_groups)
    value, group = by_column.data[order], group[order]

    stored = np.bincount(group, minlength=n_groups)
    negative = np.bincount(group, weights=value < 0, minlength=n_groups)
    n_zero = np.tile(strata.sizes(), n_columns) - stored
    zero_rank = negative + (n_zero + 1) / 2

    scores = np.empty(value.size, dtype=np.float64)
    if value.size:
        position = np.arange(value.size) - (np.cumsum(stored) - stored)[group]
        new_run = np.flatnonzero(np.r_[True, (group[1:] != group[:-1]) | (value[1:] != value[:-1])])
        run_length = np.diff(np.r_[new_run, value.size])
        midrank = np.repeat(position[new_run] + (run_length + 1) / 2, run_length)
        scores[order] = midrank + np.where(value > 0, n_zero[group], 0.0) - zero_rank[group]
    result = sparse.csc_array((scores, by_column.indices, by_column.indptr), shape=by_column.shape)
    return RankScores(result, zero_rank.reshape(n_columns, strata.n_strata).T.copy())


def _by_group_and_value(group: Ints, value: Sparse, n_groups: int) -> Ints:
    """The order by group and, in it, by value: 2.5 times as fast as a lexsort."""
    # ties may come in any order: they share a midrank
    order = np.argsort(value)
    for shift in range(0, max(n_groups - 1, 1).bit_length(), 16):
        # numpy sorts 16 bits stably by counting
        digit = ((group[order] >> shift) & 0xFFFF).astype(np.uint16)
        order = order[np.argsort(digit, kind="stable")]
    return order


def scale_rows(matrix: Sparse, weight: Floats) -> Sparse:
    """Each row times its weight [n_cells], as CSR."""
    out = sparse.csr_array(matrix, copy=True)
    out.data *= np.repeat(weight, np.diff(out.indptr))
    return out
