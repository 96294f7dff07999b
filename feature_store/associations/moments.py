"""Sums by stratum from which every correlation and every blocked permutation test of this package follows.

For two sparse matrices A [n_cells n_a], B [n_cells n_b] and strata s of n_s cells, kept are the power sums of A and B
by stratum and the cross product A'B: additive over shards of cells, in float64. With centring inside strata,
    T      = sum_s sum_i (a_i - mean_s a)(b_i - mean_s b)
    var T  = sum_s m2_s(a) m2_s(b) / (n_s - 1)
    mu3 T  = sum_s n_s m3_s(a) m3_s(b) / ((n_s - 1)(n_s - 2))
are the exact moments of the linear statistic when B is permuted within strata (m_k: centred sums of k-th powers;
Hoeffding 1951, Ann. Math. Stat. 22:558; Mielke & Berry, Permutation Methods, 2007). With rank scores for A and a
label's indicator for B this is the van Elteren test; with rank scores for both, the blocked Spearman test.
All sums are taken cell by cell in order, or one stratum after the other, and never by BLAS, whose rounding depends on
the shapes: what is said of a column is bitwise the same whatever other columns are in the call.
Cost: products of thin columns take 6 ns a product of nonzeros. Columns of A that fire in more than _FULL of the cells
are written dense, some at a time, and take .5 ns for each of them and nonzero of B.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import sparse

from feature_store.associations.inputs import Floats, Ints, Sparse, Strata
from feature_store.errors import InputError

_FULL = 0.08
"""Share of nonzeros from which on a dense column is multiplied faster than a sparse one; the sums are the same."""
_TILE_COLUMNS = 64
_TILE_VALUES = 8_000_000
_TRANSPOSED = 512
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


def column_moments(matrix: Sparse) -> tuple[Floats, Floats]:
    """Mean and variance (over n, not n - 1) of each column of a sparse [n_rows n_columns], zeros included."""
    values, n = matrix.astype(np.float64), max(matrix.shape[0], 1)
    mean = np.asarray(values.sum(axis=0)).ravel() / n
    return mean, np.asarray(values.multiply(values).sum(axis=0)).ravel() / n - mean**2


def power_sums(matrix: Sparse, strata: Strata, *, weight: Floats | None = None) -> Floats:
    """Sums of the first three powers by stratum, float64 [3 n_strata n_columns], of values times the weights of the
    cells [n_cells]; cells are added in their order.
    """
    a = sparse.csc_array(matrix)
    by_stratum = strata.indicator()
    sums = np.zeros((3, strata.n_strata, a.shape[1]))
    for columns, part in _tiles(a, weight=weight):
        if isinstance(part, np.ndarray):
            powers = (part, part * part, part * part * part)
            sums[:, :, columns] = np.stack([by_stratum @ power for power in powers])
        else:
            n_groups = columns.size * strata.n_strata
            column = np.repeat(np.arange(columns.size), np.diff(part.indptr))
            place, x = column * strata.n_strata + strata.codes[part.indices], part.data
            found = [np.bincount(place, weights=power, minlength=n_groups) for power in (x, x * x, x * x * x)]
            sums[:, :, columns] = np.stack([one.reshape(-1, strata.n_strata).T for one in found])
    return sums


def cross_product(a: Sparse, b: Sparse, *, dtype: type = np.float64, weight: Floats | None = None) -> Floats:
    """A'B [n_a n_b] of CSC [n_cells n_a] and CSR [n_cells n_b], both times the weights of the cells [n_cells], computed
    in `dtype`; cells are added in their order.

    Columns of A that are so full that a sparse product costs more than a dense one (cell codes by max pooling fire in
    most cells) are multiplied dense. Which they are is decided column by column.
    """
    return cross_products(a, [b], dtype=dtype, weight=weight)[0]


def cross_products(
    a: Sparse, b: Sequence[Sparse], *, dtype: type = np.float64, weight: Floats | None = None
) -> list[Floats]:
    """The `cross_product` of one matrix with each of several."""
    right = [_times(sparse.csr_array(one), weight, dtype) for one in b]
    out = [np.zeros((a.shape[1], one.shape[1])) for one in right]
    for columns, part in _tiles(sparse.csc_array(a), dtype, weight):
        for total, one in zip(out, right, strict=True):
            total[columns] = (one.T @ part).T if isinstance(part, np.ndarray) else (part.T @ one).toarray()
    return out


def _times(matrix: Sparse, weight: Floats | None, dtype: type) -> Sparse:
    """A CSR matrix times the weights of its rows, in this type."""
    if weight is not None:
        data = matrix.data * np.repeat(weight, np.diff(matrix.indptr))
        matrix = sparse.csr_array((data, matrix.indices, matrix.indptr), matrix.shape)
    return matrix if matrix.dtype == dtype else matrix.astype(dtype)


def _tiles(a: Sparse, dtype: type = np.float64, weight: Floats | None = None) -> Iterator[tuple[Ints, Sparse]]:
    """The columns of a CSC matrix [n_cells n_columns] times the weights of the cells: their numbers, and the thin ones
    as CSC with the cells in order, the full ones dense, some at a time.
    """
    is_full = np.diff(a.indptr) > _FULL * a.shape[0]
    thin, full = np.flatnonzero(~is_full), np.flatnonzero(is_full)
    if thin.size:
        own = a if thin.size == a.shape[1] else a[:, thin]
        # two counting sorts put the cells in order faster than sort_indices
        own = own if own.has_canonical_format else sparse.csc_array(sparse.csr_array(own))
        own = sparse.csc_array((own.data.astype(dtype), own.indices, own.indptr), own.shape)
        if weight is not None:
            own.data *= weight[own.indices]
        yield thin, own
    step = max(1, min(_TILE_COLUMNS, _TILE_VALUES // max(a.shape[0], 1)))
    for start in range(0, full.size, step):
        columns = full[start : start + step]
        dense = np.zeros((columns.size, a.shape[0]), dtype=dtype)
        for row, column in zip(dense, columns, strict=True):
            span = slice(a.indptr[column], a.indptr[column + 1])
            row[a.indices[span]] = a.data[span]
        part = np.empty(dense.shape[::-1], dtype=dtype)
        for low in range(0, a.shape[0], _TRANSPOSED):
            # careful: a block at a time, which stays in the cache, is several times as fast as all at once
            part[low : low + _TRANSPOSED] = dense[:, low : low + _TRANSPOSED].T
        if weight is not None:
            part *= weight[:, None]
        yield columns, part


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
