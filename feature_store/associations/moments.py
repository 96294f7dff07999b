"""Sums by stratum from which every correlation and every blocked permutation test of this package follows.

For two sparse matrices A [n_cells n_a], B [n_cells n_b] and strata s of n_s cells, kept are the power sums of A and B
by stratum and the cross product A'B: additive over shards of cells, in float64. With centring inside strata,
    T      = sum_s sum_i (a_i - mean_s a)(b_i - mean_s b)
    var T  = sum_s m2_s(a) m2_s(b) / (n_s - 1)
    mu3 T  = sum_s n_s m3_s(a) m3_s(b) / ((n_s - 1)(n_s - 2))
are the exact moments of the linear statistic when B is permuted within strata (m_k: centred sums of k-th powers;
Hoeffding 1951, Ann. Math. Stat. 22:558; Mielke & Berry, Permutation Methods, 2007). With rank scores for A and a
label's indicator for B this is the van Elteren test; with rank scores for both, the blocked Spearman test.
Sums over strata are taken one stratum after the other, not by BLAS, whose rounding depends on the shapes: what is said
of a column is bitwise the same whatever other columns are in the call.
Cost: one product of the matrices, sparse or dense: 160 million products of nonzeros a second, or 50 Gflop/s, on one
core; the strata add dense products of rank n_strata only.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import sparse

from feature_store.associations.inputs import Floats, Sparse, Strata
from feature_store.errors import InputError

DENSE_ABOVE = 0.008
"""Share of nonzeros of A times that of B from which on a dense product is faster than a sparse one."""
DENSE_CELLS = 1024
_TILE = 64
_BLOCK = 32_768


class PermutationMoments(NamedTuple):
    """Statistic minus its null mean, null variance and null third central moment, each [n_a n_b]."""

    statistic: Floats
    variance: Floats
    third: Floats


def sum_rows(matrix: Floats) -> Floats:
    """Column sums of a dense matrix, row after row: numpy's own sum takes another order where there is one column."""
    total: Floats = np.add.accumulate(matrix, axis=0)[-1] if len(matrix) else np.zeros(matrix.shape[1:])
    return total


def power_sums(matrix: Sparse, strata: Strata) -> Floats:
    """Sums of the first three powers by stratum, float64 [3 n_strata n_columns]; cells are added in their order."""
    by_column = sparse.csc_array(matrix)
    n_columns = by_column.shape[1]
    column = np.repeat(np.arange(n_columns), np.diff(by_column.indptr))
    place = column * strata.n_strata + strata.codes[by_column.indices]
    x = by_column.data.astype(np.float64)
    sums = [np.bincount(place, weights=power, minlength=n_columns * strata.n_strata) for power in (x, x * x, x * x * x)]
    return np.stack([one.reshape(n_columns, strata.n_strata).T for one in sums])


def cross_product(a: Sparse, b: Sparse) -> Floats:
    """A'B float64 [n_a n_b] of sparse [n_cells n_a] and [n_cells n_b], CSC and CSR being the cheapest.

    Columns of A that are so full that a sparse product costs more than a dense one (cell codes by max pooling fire in
    most cells) are multiplied dense, a block of cells at a time. Which they are is decided column by column.
    """
    a, b = sparse.csc_array(a), sparse.csr_array(b)
    n_cells, n_b = b.shape
    out = np.zeros((a.shape[1], n_b))
    full = np.diff(a.indptr) * float(b.nnz) > DENSE_ABOVE * n_cells * n_cells * n_b
    if not full.any():
        return np.asarray((a.T.astype(np.float64) @ b.astype(np.float64)).toarray())
    thin = np.flatnonzero(~full)
    if thin.size:
        out[thin] = (a[:, thin].T.astype(np.float64) @ b.astype(np.float64)).toarray()
    columns = np.flatnonzero(full)
    out[columns] = _dense_product(sparse.csr_array(a[:, columns]), b)
    return out


def _dense_product(a: Sparse, b: Sparse) -> Floats:
    """A'B of CSR matrices by BLAS, DENSE_CELLS cells at a time."""
    # careful: whole tiles of BLAS's kernels, so that a column's rounding does not depend on how many others there are
    n_a, n_b = (-(-matrix.shape[1] // _TILE) * _TILE for matrix in (a, b))
    total = np.zeros((n_a, n_b))
    left, right = np.zeros((DENSE_CELLS, n_a)), np.zeros((DENSE_CELLS, n_b))
    for start in range(0, a.shape[0], DENSE_CELLS):
        for dense, rows in ((left, a[start : start + DENSE_CELLS]), (right, b[start : start + DENSE_CELLS])):
            dense[:] = 0
            dense[np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr)), rows.indices] = rows.data
        total += left.T @ right
    return total[: a.shape[1], : b.shape[1]]


@dataclass(frozen=True, kw_only=True)
class BlockMoments:
    """n: cells [n_strata]; a [3 n_strata n_a] and b [3 n_strata n_b]: power sums; cross: A'B [n_a n_b]."""

    n: Floats
    a: Floats
    b: Floats
    cross: Floats

    @classmethod
    def of(
        cls, a: Sparse, b: Sparse, strata: Strata, *, a_sums: Floats | None = None, b_sums: Floats | None = None
    ) -> "BlockMoments":
        """The sums over all cells; power sums that are known already can be given as a_sums and b_sums."""
        if a.shape[0] != b.shape[0] or a.shape[0] != strata.codes.size:
            raise InputError(f"moments: {a.shape[0]} and {b.shape[0]} rows and {strata.codes.size} strata codes differ")
        return cls(
            n=strata.sizes(),
            a=power_sums(a, strata) if a_sums is None else a_sums,
            b=power_sums(b, strata) if b_sums is None else b_sums,
            cross=cross_product(a, b),
        )

    def permutation(self) -> PermutationMoments:
        """Exact moments of the statistic when B is permuted within strata."""
        n = self.n[:, None]
        two, three = np.maximum(n - 1, 1), np.maximum((n - 1) * (n - 2), 1)
        (_, a2, a3), (_, b2, b3) = _centred(self.a, n), _centred(self.b, n)
        return PermutationMoments(
            statistic=self.cross - _product(self.a[0], self.b[0] / np.maximum(n, 1)),
            variance=_product(a2, b2 / two * (n > 1)),
            third=_product(a3, b3 * n / three * (n > 2)),
        )

    def correlation(self) -> Floats:
        """Pearson correlation [n_a n_b] after centring within strata; 0 where A or B is constant."""
        n = self.n[:, None]
        a2, b2 = sum_rows(_centred(self.a, n)[1]), sum_rows(_centred(self.b, n)[1])
        scale = np.sqrt(np.outer(a2, b2))
        covariance = self.cross - _product(self.a[0], self.b[0] / np.maximum(n, 1))
        raw = np.divide(covariance, scale, out=np.zeros_like(scale), where=scale > 0)
        clipped: Floats = np.clip(raw, -1.0, 1.0)
        return clipped


def _product(a: Floats, b: Floats) -> Floats:
    """A'B [n_a n_b] of [n_strata n_a] and [n_strata n_b], a stratum at a time."""
    out = np.zeros((a.shape[1], b.shape[1]))
    step = max(1, _BLOCK // max(b.shape[1], 1))
    for start in range(0, a.shape[1], step):
        block = out[start : start + step]
        for left, right in zip(a[:, start : start + step], b, strict=True):
            block += left[:, None] * right
    return out


def _centred(sums: Floats, n: Floats) -> tuple[Floats, Floats, Floats]:
    """Mean and centred sums of squares and cubes from power sums; rounding noise of a constant column is set to
    zero.
    """
    mean = sums[0] / np.maximum(n, 1)
    second = sums[1] - mean * sums[0]
    flat = second <= 1e-12 * sums[1]
    third = sums[2] - 3 * mean * sums[1] + 2 * mean**2 * sums[0]
    return mean, np.where(flat, 0.0, second), np.where(flat, 0.0, third)
