"""The Parquet encoding of codes: written block by block in the order of cells, or by ranges of features.

A file by feature is sorted by feature, and its row groups end at the same features in every part of a run, at `bounds`:
a range of features is read from one row group, or a few, of each part. Pages are checked when they are read.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.errors import InputError, IntegrityError
from feature_store.storage.commit import mark_damaged
from feature_store.storage.filesystem import parquet_source

BY_CELL_ROW_GROUP_ROWS = 131_072
ROW_GROUP_ENTRIES = 1 << 16
"""Cells times features of a row group by feature, which is the most rows that it has (of cells)."""
Columns = Mapping[str, npt.NDArray[Any]]


def feature_bounds(n_features: int, n_cells: int) -> list[int]:
    """Where the row groups of a part by feature of `n_cells` cells begin, and the number of features."""
    step = max(1, ROW_GROUP_ENTRIES // max(n_cells, 1))
    return [*range(0, n_features, step), n_features]


class CellCodesWriter:
    """Writes one by_cell part, one row per nonzero, from blocks of cells in ascending order.

    It is a context manager. Every row group but the last has BY_CELL_ROW_GROUP_ROWS rows, and the bytes do not depend
    on how the rows are divided among the calls of `write`.

    Attributes:
        n_rows: rows that were given so far.
    """

    def __init__(self, path: str | Path, *, n_features: int, names: Sequence[str]) -> None:
        self.n_rows = 0
        self._n_features = n_features
        self._waiting: list[list[npt.NDArray[Any]]] = []
        self._n_waiting = 0
        self._last_cell = -1
        self._schema = _schema(names, n_features)
        self._file = _writer(path, self._schema)

    def __enter__(self) -> "CellCodesWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._flush(whole_groups=False)
        finally:
            self._file.close()

    def write(self, columns: Columns) -> None:
        """Add rows sorted by cell (then token) and feature.

        InputError if the cells are not in ascending order or a feature is not below n_features.
        """
        cell, feature = columns["cell_idx"], columns["feature_id"]
        if not len(cell):
            return
        if cell[0] < self._last_cell or (np.diff(cell) < 0).any():
            raise InputError("the rows of codes by cell are not in the order of cell_idx; sort them first")
        if not 0 <= int(feature.min()) <= int(feature.max()) < self._n_features:
            raise InputError(
                f"feature ids go from {feature.min()} to {feature.max()}; allowed: 0 to {self._n_features - 1}"
            )
        self._last_cell = int(cell[-1])
        self._waiting.append([columns[name] for name in self._schema.names])
        self._n_waiting += len(cell)
        self.n_rows += len(cell)
        if self._n_waiting >= BY_CELL_ROW_GROUP_ROWS:
            self._flush(whole_groups=True)

    def _flush(self, *, whole_groups: bool) -> None:
        n_rows = self._n_waiting - self._n_waiting % BY_CELL_ROW_GROUP_ROWS if whole_groups else self._n_waiting
        if not n_rows:
            return
        columns = [np.concatenate(parts) for parts in zip(*self._waiting, strict=True)]
        table = _table([column[:n_rows] for column in columns], self._schema)
        self._file.write_table(table, row_group_size=BY_CELL_ROW_GROUP_ROWS)
        # careful: a view would keep the whole block in memory
        self._waiting = [[column[n_rows:].copy() for column in columns]] if n_rows < self._n_waiting else []
        self._n_waiting -= n_rows


def write_by_feature(path: str | Path, columns: Columns, bounds: Sequence[int]) -> int:
    """Write rows that are sorted by feature_id, with a row group for each range of `bounds`; return their number."""
    schema = _schema(list(columns), bounds[-1])
    feature = columns["feature_id"]
    cuts = np.searchsorted(feature, bounds)
    with _writer(path, schema) as file:
        for low, high in pairwise(cuts.tolist()):
            if low < high:
                rows = _table([column[low:high] for column in columns.values()], schema)
                file.write_table(rows, row_group_size=high - low)
    return len(feature)


def read_columns(path: Path, names: Sequence[str]) -> list[npt.NDArray[Any]]:
    """Columns of one part, with every page checked. IntegrityError if the bytes are not those that were written."""
    try:
        with parquet_source(path) as source, pq.ParquetFile(source, page_checksum_verification=True) as file:
            return [column.to_numpy() for column in file.read(columns=list(names)).columns]
    except (OSError, pa.ArrowException) as error:
        raise IntegrityError(f"{path} cannot be read: {error}; {mark_damaged(path)}") from error


def read_row_groups(path: Path, column: str, start: int, stop: int, *, footer: Any = None) -> tuple[pl.DataFrame, Any]:
    """The rows of a part whose value of the column by which it is sorted is in [start, stop), and its footer, which
    saves reading it again. Only the row groups with such values are read, and their pages are checked. IntegrityError.
    """
    try:
        with (
            parquet_source(path) as source,
            pq.ParquetFile(source, metadata=footer, page_checksum_verification=True) as file,
        ):
            place = file.schema_arrow.get_field_index(column)
            spans = [file.metadata.row_group(i).column(place).statistics for i in range(file.num_row_groups)]
            groups = [i for i, span in enumerate(spans) if span is None or (span.min < stop and span.max >= start)]
            frame = pl.from_arrow(file.read_row_groups(groups))
            footer = file.metadata
    except (OSError, pa.ArrowException) as error:
        raise IntegrityError(f"{path} cannot be read: {error}; {mark_damaged(path)}") from error
    assert isinstance(frame, pl.DataFrame)
    return frame.filter(pl.col(column).is_between(start, stop, closed="left")), footer


_TYPES: Mapping[str, pa.DataType] = {
    "cell_idx": pa.int64(),
    "token_pos": pa.int32(),
    "gene_id": pa.int32(),
    "split": pa.uint8(),
    "n_cells": pa.int64(),
    "n_tokens": pa.int64(),
    "value": pa.float32(),
    "max": pa.float32(),
}


def _schema(names: Sequence[str], n_features: int) -> pa.Schema:
    feature = pa.uint16() if n_features <= 1 << 16 else pa.uint32()
    return pa.schema([pa.field(name, _TYPES.get(name, feature), nullable=False) for name in names])


def _table(columns: Sequence[npt.NDArray[Any]], schema: pa.Schema) -> pa.Table:
    arrays = [
        pa.array(column.astype(field.type.to_pandas_dtype(), copy=False))
        for column, field in zip(columns, schema, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _writer(path: str | Path, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        compression_level=1,
        use_dictionary=False,
        column_encoding={
            field.name: "BYTE_STREAM_SPLIT" if field.type == pa.float32() else "DELTA_BINARY_PACKED"
            for field in schema
            if field.type != pa.uint8()
        },
        write_page_index=True,
        write_page_checksum=True,
    )
