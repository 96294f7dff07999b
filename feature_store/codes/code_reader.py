"""Cell codes of a finished run, read in the sort order that suits a query: by cell, or by feature.

A look-up opens one part, found from the manifest, and reads the row groups whose statistics include the cell or the
feature. As the values of a feature fall, the n largest need only its first row groups. Manifests and Parquet footers
are kept in memory, because a finished run never changes. Pages are checked.

`scan` makes one lazy frame of both orders, as a source for the optimizer of Polars: it receives the filter, evaluates
the conditions on feature_id (or cell_idx) alone for every id, and reads only the parts with an id that passes, in the
better order. So any form of the filter helps (=, IN, BETWEEN, OR), nothing is parsed, and rows come by cell in either
order.

CPU time, warm, of 50M nonzeros, 1M cells, 4096 features (`tests/benchmarks/bench_query.py`): the 100 cells of a feature
3 ms (by a scan and a sort of the part, and of the cell table: 80), all features of a cell 5, SQL by feature_id 5 (600
over by_cell), SQL by cell_idx 5. A filter that joins another table to find its features reads everything (600).
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from polars.io.plugins import register_io_source

from feature_store.errors import IntegrityError
from feature_store.storage.commit import Run, ShardMarker
from feature_store.storage.filesystem import REPAIR, parquet_source, scan_source
from feature_store.storage.plans import CodesPlan

SPARSE_SHARE = 32
"""by_feature is scanned if the filter leaves one feature, or at most one in this many: its rows have to be sorted by
cell, which at one in 20 takes as long as reading all of by_cell (CPU, 4096 features: .46 s for .75 at one in 32)."""
Mask = npt.NDArray[np.bool_]


class SortOrder:
    """One sort order of a codes run: its rows are sorted by `column`, and each part holds a range of it."""

    def __init__(self, folder: Path, column: str) -> None:
        self.run = Run.open(folder)
        self.column = column
        self.markers = self.run.manifest().shards
        self._footers: dict[int, Any] = {}

    @property
    def stop(self) -> int:
        """End of the range of `column`."""
        return max(marker.stop for marker in self.markers)

    def row_groups_of(self, value: int) -> Iterator[pl.DataFrame]:
        """The rows with this value of `column`, a row group at a time, in order. IntegrityError for a damaged part."""
        for marker in self.markers:
            if marker.start <= value < marker.stop:
                yield from self._row_groups_of(marker, value)

    def parts_of(self, allowed: Mask | None) -> list[str]:
        """The parts to scan for the values of `column` that are `allowed` [stop]; all parts if None."""
        chosen = [m for m in self.markers if allowed is None or allowed[m.start : m.stop].any()]
        return [scan_source(path) for path in self.run.checked_parts(chosen)]

    def _row_groups_of(self, marker: ShardMarker, value: int) -> Iterator[pl.DataFrame]:
        (path,) = self.run.checked_parts([marker])
        footer = self._footers.get(marker.shard)
        try:
            with (
                parquet_source(path) as source,
                pq.ParquetFile(source, metadata=footer, page_checksum_verification=True) as file,
            ):
                self._footers[marker.shard] = file.metadata
                place = file.schema_arrow.get_field_index(self.column)
                for group in range(file.num_row_groups):
                    statistics = file.metadata.row_group(group).column(place).statistics
                    if statistics is None or statistics.min <= value <= statistics.max:
                        frame = pl.from_arrow(file.read_row_group(group))
                        assert isinstance(frame, pl.DataFrame)
                        yield frame.filter(pl.col(self.column) == value)
        except (OSError, pa.ArrowException) as error:
            raise IntegrityError(f"{path} cannot be read: {error}; {REPAIR}") from error


class CodeReader:
    """The codes of one finished run, in both orders; `folder` is the codes folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.by_cell = SortOrder(folder / "by_cell", "cell_idx")
        self.plan = CodesPlan.of(self.by_cell.run)
        self.n_features = self.plan.n_features

    @cached_property
    def by_feature(self) -> SortOrder:
        """The order by feature, opened on first use."""
        return SortOrder(self.folder / "by_feature", "feature_id")

    @property
    def schema(self) -> dict[str, pl.DataType]:
        """Columns and dtypes of `scan`."""
        keys = {"token_pos": pl.Int32(), "gene_id": pl.Int32()} if self.plan.level == "token" else {}
        return {"cell_idx": pl.Int64(), **keys, "feature_id": pl.Int32(), "value": pl.Float32()}

    def top_cells(self, feature: int, n: int) -> pl.DataFrame:
        """cell_idx and value of the n cells with the largest code of a feature; of equal ones the first."""
        top = pl.DataFrame(schema={"cell_idx": pl.Int64, "value": pl.Float32})
        for rows in self.by_feature.row_groups_of(feature):
            # the first token of a cell is the largest
            top = pl.concat([top, rows.select(top.columns)]).unique("cell_idx", keep="first", maintain_order=True)
            if top.height >= n:
                break
        return top.head(n)

    def features_of(self, cell: int) -> pl.DataFrame:
        """feature_id and value of all features of a cell, the largest value first; of equal ones the first."""
        empty = pl.DataFrame(schema={"feature_id": pl.Int32, "value": pl.Float32})
        groups = self.by_cell.row_groups_of(cell)
        rows = [group.select(pl.col("feature_id").cast(pl.Int32), "value") for group in groups]
        features = pl.concat([empty, *rows]).group_by("feature_id", maintain_order=True).agg(pl.col("value").max())
        return features.sort("value", "feature_id", descending=[True, False])

    def scan(self) -> pl.LazyFrame:
        """All codes as one lazy frame, by cell and then feature; the module says how a filter is used."""
        return register_io_source(self._read, schema=self.schema)

    def _read(
        self, columns: list[str] | None, predicate: pl.Expr | None, n_rows: int | None, _batch_size: int | None
    ) -> Iterator[pl.DataFrame]:
        conditions = [] if predicate is None else _conjuncts(predicate)
        features = _allowed(conditions, "feature_id", self.n_features, pl.Int32())
        cells = _allowed(conditions, "cell_idx", self.by_cell.stop, pl.Int64())
        frame = self._by_feature(features) if n_rows is None and _is_sparser(features, cells) else self._by_cell(cells)
        if n_rows is not None:
            # careful: Polars means the first rows of the table here, before the filter
            frame = self._by_cell(None).head(n_rows)
        if predicate is not None:
            frame = frame.filter(predicate)
        yield frame.select(columns or list(self.schema)).collect()

    def _by_cell(self, cells: Mask | None) -> pl.LazyFrame:
        return self._scan(self.by_cell.parts_of(cells))

    def _by_feature(self, features: Mask | None) -> pl.LazyFrame:
        keys = [name for name in ("cell_idx", "token_pos", "feature_id") if name in self.schema]
        return self._scan(self.by_feature.parts_of(features)).sort(keys)

    def _scan(self, parts: list[str]) -> pl.LazyFrame:
        if not parts:
            return pl.LazyFrame(schema=self.schema)
        stored = {**self.schema, "feature_id": pl.UInt32() if self.n_features > 1 << 16 else pl.UInt16()}
        cast_options = pl.ScanCastOptions(integer_cast="upcast")
        frame = pl.scan_parquet(parts, schema=stored, cast_options=cast_options, glob=False)
        return frame.with_columns(pl.col("feature_id").cast(pl.Int32))


def _conjuncts(predicate: pl.Expr) -> list[pl.Expr]:
    """The conditions that `predicate` joins with AND."""
    operands = predicate.meta.pop()
    if len(operands) != 2 or not (operands[1] & operands[0]).meta.eq(predicate):
        return [predicate]
    return [condition for operand in operands for condition in _conjuncts(operand)]


def _allowed(conditions: Sequence[pl.Expr], column: str, n: int, dtype: pl.DataType) -> Mask | None:
    """Which of the ids 0 to n - 1 meet the conditions on `column` alone; None if there is no such condition."""
    on_column = [condition for condition in conditions if set(condition.meta.root_names()) == {column}]
    if not on_column:
        return None
    ids = pl.select(pl.int_range(n).cast(dtype).alias(column))
    allowed = np.zeros(n, dtype=bool)
    allowed[ids.filter(on_column)[column].to_numpy()] = True
    return allowed


def _is_sparser(features: Mask | None, cells: Mask | None) -> bool:
    """Whether the filter leaves few features, and a smaller share of them than of the cells."""
    if features is None:
        return False
    share = features.mean()
    few = features.sum() <= 1 or share * SPARSE_SHARE <= 1
    return bool(few and (cells is None or share <= cells.mean()))
