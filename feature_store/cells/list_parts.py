"""Parquet files that hold a list of genes and a list of values in each row: ranges of rows, in bounded memory.

Rows are decoded in batches of `BATCH_ROWS` from one row group, and the latest batch is kept, so that ranges that follow
each other decode nothing twice. A range that lies further on in the same row group decodes what is before it; ranges
that go back begin the row group again. Row groups may be as large as they like.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.errors import InputError
from feature_store.storage import filesystem

BATCH_ROWS = 1024
BUFFER_BYTES = 1 << 20


class Lists(NamedTuple):
    """The lists of some rows: those of row i are the values [indptr[i], indptr[i + 1]) of both arrays."""

    indptr: npt.NDArray[np.int64]
    genes: Any
    values: Any


class _Batch(NamedTuple):
    start: int
    rows: Any

    @property
    def stop(self) -> int:
        return self.start + int(self.rows.num_rows)


class ListPart:
    """One opened Parquet file, two of whose columns hold a list in each row. InputError if it cannot be read."""

    def __init__(self, path: Path, *, genes: str, values: str, checked: bool = False) -> None:
        self.path, self._names = path, (genes, values)
        self._stack = ExitStack()
        try:
            source = self._stack.enter_context(filesystem.parquet_source(path))
            self._file = self._stack.enter_context(
                pq.ParquetFile(source, page_checksum_verification=checked, buffer_size=BUFFER_BYTES, pre_buffer=False)
            )
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from error
        groups = range(self._file.num_row_groups)
        self._first = np.cumsum([0, *(self._file.metadata.row_group(group).num_rows for group in groups)])
        self.n_rows = int(self._first[-1])
        self._group = -1
        self._batches: Iterator[_Batch] = iter(())
        self._batch: _Batch | None = None

    def close(self) -> None:
        """Close the file and let go of what was read."""
        # careful: the iterator refers to this object, so that neither would be freed at once
        self._batches, self._batch = iter(()), None
        self._stack.close()

    def read(self, start: int, stop: int) -> list[Lists]:
        """The lists of the rows [start, stop), batch by batch. InputError names a row whose lists differ in length."""
        found = []
        while start < stop:
            batch = self._batch_with(start)
            high = min(stop, batch.stop)
            found.append(self._lists(batch, start, high))
            start = high
        return found

    def _batch_with(self, row: int) -> _Batch:
        group = int(np.searchsorted(self._first, row, side="right")) - 1
        if group != self._group or self._batch is None or row < self._batch.start:
            self._group, self._batches, self._batch = group, self._of_group(group), None
        while self._batch is None or row >= self._batch.stop:
            try:
                self._batch = next(self._batches)
            except StopIteration:
                raise self._unreadable("it has fewer rows than its footer says") from None
            except (OSError, pa.ArrowException) as error:
                raise self._unreadable(error) from error
        return self._batch

    def _of_group(self, group: int) -> Iterator[_Batch]:
        start = int(self._first[group])
        for rows in self._file.iter_batches(BATCH_ROWS, row_groups=[group], columns=list(self._names)):
            yield _Batch(start, rows)
            start += rows.num_rows

    def _lists(self, batch: _Batch, start: int, stop: int) -> Lists:
        columns = [batch.rows.column(name).slice(start - batch.start, stop - start) for name in self._names]
        for name, column in zip(self._names, columns, strict=True):
            if column.null_count:
                row = start + int(np.argmax(np.asarray(column.is_null())))
                raise InputError(f"{self.path}, row {row}: {name} is missing; write the part again")
        lengths = [np.diff(np.asarray(column.offsets)) for column in columns]
        if (differ := lengths[0] != lengths[1]).any():
            i = int(np.argmax(differ))
            raise InputError(
                f"{self.path}, row {start + i}: {self._names[0]} has {lengths[0][i]:,} entries and {self._names[1]} "
                f"has {lengths[1][i]:,}; write the part again"
            )
        genes, values = (column.flatten() for column in columns)
        if genes.null_count or values.null_count:
            raise InputError(f"{self.path}, rows [{start}, {stop}): a gene or a value is missing; write the part again")
        return Lists(np.concatenate([[0], np.cumsum(lengths[0])]).astype(np.int64), genes, values)

    def _unreadable(self, error: object) -> InputError:
        return InputError(f"{self.path} cannot be read as Parquet ({error}); it is damaged: fetch or write it again")


class OpenParts:
    """Several Parquet files with lists, of which one at a time is open.

    Attributes:
        paths: the files.
        first: the first row of each among all rows, and at the end the number of rows.
    """

    def __init__(
        self, paths: Sequence[Path], n_rows: Sequence[int], *, genes: str, values: str, checked: bool = False
    ) -> None:
        self.paths = tuple(paths)
        self.first = np.cumsum([0, *n_rows]).astype(np.int64)
        self._options: dict[str, Any] = {"genes": genes, "values": values, "checked": checked}
        self._open: tuple[int, ListPart] | None = None

    def read(self, start: int, stop: int) -> Iterator[tuple[Path, int, Lists]]:
        """Yield the lists of the rows [start, stop), with their part and the number of their first row in it."""
        while start < stop:
            place = int(np.searchsorted(self.first, start, side="right")) - 1
            before, end = int(self.first[place]), min(stop, int(self.first[place + 1]))
            row = start - before
            for lists in self._part(place).read(row, end - before):
                yield self.paths[place], row, lists
                row += len(lists.indptr) - 1
            start = end

    def close(self) -> None:
        """Close the file that is open."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def _part(self, place: int) -> ListPart:
        if self._open is None or self._open[0] != place:
            self.close()
            self._open = place, ListPart(self.paths[place], **self._options)
        return self._open[1]
