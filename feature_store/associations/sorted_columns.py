"""The codes of features with every column sorted once, which ranks, thresholds and quantiles of any cells start from.

A column keeps its order when cells are left out (`take`), and midranks inside strata need only a counting sort of the
strata of cells in the order of values. So no statistic sorts values again. A value takes 8 bytes, float32 and its cell.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import numpy as np
from scipy import sparse

from feature_store.associations.inputs import Bools, Floats, Ints, Sparse

T = TypeVar("T")
CHUNK_VALUES = 1 << 17
"""Number of values that are worked on at a time, unless a column has more: they stay in the cache of a core."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SortedColumns:
    """A CSC matrix [n_cells n_columns] without stored zeros, whose columns are stored in ascending order of value."""

    matrix: Sparse
    memory: dict[bytes, Any] = field(default_factory=dict, repr=False)
    """What was computed of these columns and is needed again: ranks by strata, and columns by split."""

    @classmethod
    def of(cls, codes: "Codes") -> "SortedColumns":
        """Sort the columns of a matrix without stored zeros, unless they are sorted."""
        if isinstance(codes, cls):
            return codes
        by_column: Sparse = sparse.csc_array(codes)  # type: ignore[arg-type]
        values, cells = np.empty_like(by_column.data), np.empty_like(by_column.indices)
        for column in range(by_column.shape[1]):
            span = slice(by_column.indptr[column], by_column.indptr[column + 1])
            # ties may come in any order, as all that is computed from a column treats them alike
            order = np.argsort(by_column.data[span])
            values[span], cells[span] = by_column.data[span][order], by_column.indices[span][order]
        return cls(matrix=csc(values, cells, by_column.indptr, by_column.shape))

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of cells and columns."""
        return self.matrix.shape[0], self.matrix.shape[1]

    def sizes(self) -> Ints:
        """The number of stored values of each column [n_columns]."""
        size: Ints = np.diff(self.matrix.indptr).astype(np.int64)
        return size

    def maximum(self) -> Floats:
        """The largest value of each column [n_columns], a zero that is not stored among them."""
        matrix, largest = self.matrix, np.zeros(self.shape[1])
        filled = np.flatnonzero(self.sizes())
        largest[filled] = matrix.data[matrix.indptr[filled + 1] - 1]
        return np.where(self.sizes() < self.shape[0], np.maximum(largest, 0.0), largest)

    def take(self, cells: Bools) -> "SortedColumns":
        """The same columns over the cells of a mask [n_cells]."""
        if cells.all():
            return self
        place: Sparse = np.full(cells.size, -1, dtype=np.int32)
        place[cells] = np.arange(int(cells.sum()), dtype=np.int32)
        return self._filtered(lambda values, rows: place[rows], int(cells.sum()))

    def split(self, cells: Bools) -> "SortedColumns":
        """The same as `take`, remembered with what is remembered of it: 8 bytes a value."""
        return self.remember(cells.tobytes(), lambda: self.take(cells))

    def remember(self, key: bytes, compute: Callable[[], T]) -> T:
        """The result of the first call with this key."""
        if key not in self.memory:
            self.memory[key] = compute()
        found: T = self.memory[key]
        return found

    def positive(self) -> "SortedColumns":
        """The same columns without their negative values."""
        if not (self.matrix.data < 0).any():
            return self
        return self._filtered(lambda values, rows: np.where(values > 0, rows, -1), self.shape[0])

    def columns(self, start: int, stop: int) -> "SortedColumns":
        """The columns [start, stop), which share the memory."""
        span = slice(self.matrix.indptr[start], self.matrix.indptr[stop])
        pointer = self.matrix.indptr[start : stop + 1] - self.matrix.indptr[start]
        parts = self.matrix.data[span], self.matrix.indices[span], pointer
        return SortedColumns(matrix=csc(*parts, (self.shape[0], stop - start)))

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Ranges of columns that hold at most CHUNK_VALUES values, or one column."""
        pointer, start = self.matrix.indptr, 0
        while start < self.shape[1]:
            stop = int(np.searchsorted(pointer, pointer[start] + CHUNK_VALUES, side="right")) - 1
            stop = min(max(stop, start + 1), self.shape[1])
            yield start, stop
            start = stop

    def _filtered(self, row_of: Callable[[Sparse, Ints], Ints], n_cells: int) -> "SortedColumns":
        """The values whose new row is not negative; row_of: a function of values and rows."""
        matrix, pointer = self.matrix, self.matrix.indptr
        values, rows = [matrix.data[:0]], [matrix.indices[:0]]
        size = np.zeros(self.shape[1] + 1, dtype=np.int64)
        for start, stop in self.chunks():
            span = slice(pointer[start], pointer[stop])
            row = row_of(matrix.data[span], matrix.indices[span])
            kept = row >= 0
            values.append(matrix.data[span][kept])
            rows.append(row[kept])
            before = np.r_[0, np.cumsum(kept)]
            size[start + 1 : stop + 1] = np.diff(before[pointer[start : stop + 1] - pointer[start]])
        parts = np.concatenate(values), np.concatenate(rows), np.cumsum(size)
        return SortedColumns(matrix=csc(*parts, (n_cells, self.shape[1])))


Codes: TypeAlias = Sparse | SortedColumns


def csc(values: Sparse, cells: Sparse, pointer: Sparse, shape: tuple[int, int]) -> Sparse:
    """A CSC matrix of these arrays, whatever their order in a column."""
    return sparse.csc_array((values, cells, pointer), shape=shape)


def stable_order(group: Ints, n_groups: int) -> Ints:
    """The stable order by group, numbers from 0 to n_groups - 1, by counting."""
    if n_groups <= 1 << 8:
        return np.argsort(group.astype(np.uint8), kind="stable")
    order = np.argsort(group.astype(np.uint16), kind="stable")
    for shift in range(16, max(n_groups - 1, 1).bit_length(), 16):
        digit = ((group[order] >> shift) & 0xFFFF).astype(np.uint16)
        order = order[np.argsort(digit, kind="stable")]
    return order
