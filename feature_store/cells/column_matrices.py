"""Matrices whose values do not lie cell by cell: CSC of AnnData, and the text of Matrix Market.

The values of a cell are scattered over such a matrix, so a range of cells costs a pass over all of it. It is therefore
turned once into parts of whole cells (`row_parts`); until then it gives its entries in the order in which they lie, a
sample of them, and the first `FIRST_CELLS` cells, which one pass finds. Memory is that of a block of entries.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from feature_store.cells.matrices import CSRRows, RowMatrix, check_chunks, check_numeric, select_rows, sort_rows
from feature_store.errors import InputError

BLOCK_VALUES = 1 << 19
"""Entries in memory at a time: half a million, 8 MB, and several times that while they are sorted."""
SAMPLE_VALUES = 1 << 18
"""Most entries from which the kind of the values is told."""
SAMPLE_PLACES = 64
FIRST_CELLS = 1024
"""Cells that can be read before the matrix is turned, for a first look."""
ADVICE = "`scsae extract` turns it once into parts of whole cells, in the store"


class Entries(NamedTuple):
    """Some values of a matrix: cell, gene and value of each [n]."""

    cell: npt.NDArray[np.int64]
    gene: npt.NDArray[np.int32]
    value: npt.NDArray[np.float32]


class Sample(NamedTuple):
    """Some values of a matrix as rows, and the number of all values for each of them."""

    rows: CSRRows
    scale: float


class ColumnMatrix(ABC):
    """A matrix that has to be turned before its cells can be read.

    Attributes:
        shape: numbers of cells and of features.
        n_values: number of its values.
        size_bytes: about the bytes that a pass over it reads.
        where: its name and its file, for errors.
    """

    shape: tuple[int, int]
    n_values: int
    size_bytes: int
    where: str

    @property
    def by_column(self) -> "ColumnMatrix":
        """Itself (`column_matrix`)."""
        return self

    @abstractmethod
    def entries(self, on_values: Callable[[int], None] = lambda _done: None) -> Iterator[Entries]:
        """Every entry, in the order of the file, in blocks of at most BLOCK_VALUES; `on_values` gets how many were read
        so far. InputError names an entry outside the matrix, or says that some are missing.
        """

    @abstractmethod
    def some_entries(self) -> Iterator[Entries]:
        """At most SAMPLE_VALUES entries, of which those of a cell need not be whole."""

    @property
    def gives_cells_in_order(self) -> bool:
        """Whether the entries are likely to come by ascending cell, so that the first cells are found early."""
        return False

    def sample(self) -> Sample:
        """Some entries as rows, for telling the kind of the values. InputError if the matrix has none."""
        n_cells = self.shape[0]
        rows = rows_of(list(self.some_entries()), 0, n_cells, self.where, whole=False)
        return Sample(rows, self.n_values / max(len(rows.data), 1))

    def read(self, start: int, stop: int) -> CSRRows:
        """Rows [start, stop) of the first FIRST_CELLS. InputError for others: the matrix has to be turned first."""
        n_first = len(self._first.indptr) - 1
        if stop > n_first:
            raise InputError(f"{self.where} does not lie cell by cell, so its cells cannot be read from it; {ADVICE}")
        return select_rows(self._first, np.arange(start, stop))

    @cached_property
    def _first(self) -> CSRRows:
        n = min(FIRST_CELLS, self.shape[0])
        found, last, in_order = [], 0, self.gives_cells_in_order
        for block in self.entries():
            wanted = block.cell < n
            if wanted.any():
                found.append(Entries(block.cell[wanted], block.gene[wanted], block.value[wanted]))
            in_order = in_order and bool(block.cell[0] >= last and (np.diff(block.cell) >= 0).all())
            last = int(block.cell[-1])
            if in_order and last >= n:
                break
        return rows_of(found, 0, n, self.where)


def column_matrix(matrix: RowMatrix) -> ColumnMatrix | None:
    """The matrix itself, or the one that a selection of genes is made of, if it has to be turned; else None."""
    found: ColumnMatrix | None = getattr(matrix, "by_column", None)
    return found


def rows_of(found: Iterable[Entries], start: int, stop: int, where: str, *, whole: bool = True) -> CSRRows:
    """The rows [start, stop) made of entries, all of which lie in them. InputError names a cell with a gene twice.

    If the entries are not `whole` cells, a gene may be there twice.
    """
    blocks = list(found)
    cell, gene, value = blocks[0] if len(blocks) == 1 else _joined(blocks)
    order = np.lexsort((gene, cell)) if whole else np.argsort(cell, kind="stable")
    counts = np.bincount(cell - start, minlength=stop - start)
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    rows = CSRRows(indptr=indptr, indices=gene[order], data=value[order])
    # of whole cells, what is left to find are genes that are there twice
    return sort_rows(rows, where=where, start=start) if whole else rows


def _joined(blocks: Sequence[Entries]) -> Entries:
    return Entries(
        cell=np.concatenate([np.empty(0, np.int64), *(block.cell for block in blocks)]),
        gene=np.concatenate([np.empty(0, np.int32), *(block.gene for block in blocks)]),
        value=np.concatenate([np.empty(0, np.float32), *(block.value for block in blocks)]),
    )


class CSCMatrix(ColumnMatrix):
    """A sparse matrix stored by column, of arrays on disk: indptr [n_features + 1], indices (cells) and data.

    InputError if they do not fit together.
    """

    def __init__(self, indptr: Any, indices: Any, data: Any, *, shape: tuple[int, int], where: str) -> None:
        self.shape, self.where = shape, where
        self._indices, self._data = indices, data
        n_features = shape[1]
        if indptr.shape != (n_features + 1,) or indices.shape != data.shape:
            raise InputError(
                f"{where} is not a CSC matrix: its shape is {shape}, but indptr has {indptr.shape}, indices "
                f"{indices.shape}, data {data.shape}; write the file again with anndata"
            )
        check_numeric(data, where)
        for array in (data, indices):
            check_chunks(array, where)
        self.n_values = int(data.shape[0])
        self.size_bytes = self.n_values * (indices.dtype.itemsize + data.dtype.itemsize)
        self._indptr = np.asarray(indptr[:]).astype(np.int64)
        if self._indptr[0] != 0 or self._indptr[-1] != self.n_values or (np.diff(self._indptr) < 0).any():
            raise InputError(
                f"{where}: indptr does not ascend from 0 to the number of values, {self.n_values}; the file is damaged "
                "or was copied in part; copy it again"
            )

    def entries(self, on_values: Callable[[int], None] = lambda _done: None) -> Iterator[Entries]:
        """See `ColumnMatrix`."""
        for low in range(0, self.n_values, BLOCK_VALUES):
            high = min(low + BLOCK_VALUES, self.n_values)
            yield self._block(low, high)
            on_values(high)

    def some_entries(self) -> Iterator[Entries]:
        """See `ColumnMatrix`."""
        size = min(SAMPLE_VALUES // SAMPLE_PLACES, self.n_values)
        if self.n_values <= SAMPLE_VALUES:
            yield from self.entries()
            return
        for low in np.linspace(0, self.n_values - size, SAMPLE_PLACES).astype(np.int64).tolist():
            yield self._block(low, low + size)

    def _block(self, low: int, high: int) -> Entries:
        try:
            cell = np.asarray(self._indices[low:high]).astype(np.int64)
            value = np.asarray(self._data[low:high])
        except InputError:
            raise
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise InputError(
                f"{self.where}: values [{low}, {high}) cannot be read ({error}); the file is damaged or was copied in "
                "part; copy it again"
            ) from error
        first, last = (int(np.searchsorted(self._indptr, place, side="right")) - 1 for place in (low, high - 1))
        bounds = np.clip(self._indptr[first : last + 2], low, high)
        gene = np.repeat(np.arange(first, last + 1, dtype=np.int32), np.diff(bounds))
        outside = (cell < 0) | (cell >= self.shape[0])
        if outside.any():
            place = int(np.argmax(outside))
            raise InputError(
                f"{self.where}, column {gene[place]}: row {cell[place]} is not in [0, {self.shape[0]}); the file is "
                "damaged; copy it again"
            )
        with np.errstate(over="ignore"):
            return Entries(cell, gene, value.astype(np.float32))
