"""Midranks of a sparse matrix that stay sparse: the zeros of a column are one block of ties and become the origin.

For a column and a stratum with n cells, n_neg values below zero and n_zero zeros, every zero has midrank r0 = n_neg +
(n_zero + 1)/2. The score stored is (midrank - r0), so a zero stays a zero and rank statistics become sparse products:
a rank sum is the sum of scores plus n_label * r0, a Spearman correlation is the Pearson correlation of the scores.
Exact with ties everywhere.
Cost: one sort of the values (`sorted_columns`), and for each strata a counting sort.
"""

from typing import NamedTuple

import numpy as np
from scipy import sparse

from feature_store.associations.inputs import Floats, Sparse, Strata
from feature_store.associations.sorted_columns import Codes, SortedColumns, csc, stable_order

_EXACT_CELLS = 1 << 22


class RankScores(NamedTuple):
    """`scores` sparse [n_cells n_columns] with the pattern of the input; `zero_rank` [n_strata n_columns]."""

    scores: Sparse
    zero_rank: Floats


def rank_scores(matrix: Sparse, strata: Strata) -> RankScores:
    """Midranks within strata, measured from the midrank of the zeros, as CSR float64.

    matrix: CSR [n_cells n_columns] without stored zeros (`as_csr`). Ranks start at 1 in every stratum, as in
    scipy.stats.rankdata.
    """
    found = column_ranks(matrix, strata)
    return RankScores(sparse.csr_array(found.scores.astype(np.float64)), found.zero_rank)


def column_ranks(codes: Codes, strata: Strata) -> RankScores:
    """The same as CSC that shares the index arrays of the sorted columns, in float32 if that is exact; sorted columns
    remember it, 4 bytes a value.
    """
    columns = SortedColumns.of(codes)
    return columns.remember(b"ranks" + strata.codes.tobytes(), lambda: _column_ranks(columns, strata))


def _column_ranks(columns: SortedColumns, strata: Strata) -> RankScores:
    matrix, n_columns, n_strata = columns.matrix, columns.shape[1], strata.n_strata
    # a score is a multiple of 1/2 of at most n_cells
    scores = np.empty(matrix.nnz, dtype=np.float32 if columns.shape[0] <= _EXACT_CELLS else np.float64)
    zero_rank, sizes = np.empty((n_columns, n_strata)), strata.sizes()
    for start, stop in columns.chunks():
        span = slice(matrix.indptr[start], matrix.indptr[stop])
        group = np.repeat(np.arange(stop - start), np.diff(matrix.indptr[start : stop + 1]))
        value, order, n_groups = matrix.data[span], None, (stop - start) * n_strata
        if n_strata > 1:
            group = group * n_strata + strata.codes[matrix.indices[span]]
            order = stable_order(group, n_groups)
            group, value = group[order], value[order]
        stored = np.bincount(group, minlength=n_groups)
        is_negative = value < 0
        negative = np.bincount(group[is_negative], minlength=n_groups) if is_negative.any() else np.zeros(n_groups)
        n_zero = np.tile(sizes, stop - start) - stored
        origin = negative + (n_zero + 1) / 2
        zero_rank[start:stop] = origin.reshape(-1, n_strata)
        head = np.flatnonzero(np.r_[True, (group[1:] != group[:-1]) | (value[1:] != value[:-1])][: value.size])
        length, of_run = np.diff(np.r_[head, value.size]), group[head]
        first = (np.cumsum(stored) - stored)[of_run]
        midrank = head - first + (length + 1) / 2 + np.where(value[head] > 0, n_zero[of_run], 0.0) - origin[of_run]
        scores[span][slice(None) if order is None else order] = np.repeat(midrank.astype(scores.dtype), length)
    return RankScores(csc(scores, matrix.indices, matrix.indptr, matrix.shape), zero_rank.T.copy())


def scale_rows(matrix: Sparse, weight: Floats) -> Sparse:
    """Each row of a CSC matrix times its weight [n_cells], in float64."""
    return csc(matrix.data * weight[matrix.indices], matrix.indices, matrix.indptr, matrix.shape)
