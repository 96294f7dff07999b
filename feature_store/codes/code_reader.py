"""Codes of a finished run, read in the sort order that suits a query: by cell, or by feature.

A look-up of a cell opens one part, found from the manifest, one of a feature every part of by_feature; both read the
row groups whose statistics include it. The cells with the largest codes of a feature are in merged/feature_cell.
Manifests and Parquet footers are kept in memory, because a finished run never changes. Pages are checked.

`scan` makes one lazy frame of both orders, as a source for the optimizer of Polars: it receives the filter, evaluates
the conditions on feature_id (or cell_idx) alone for every id, and reads only what holds an id that passes, in the
better order. So any form of the filter helps (=, IN, BETWEEN, OR), nothing is parsed, and rows come by cell in either
order. The codes are those of the panel's cells; `scan_compact` has the largest codes of all others.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from polars.io.plugins import register_io_source

from feature_store.codes.codes_run import CodesRun
from feature_store.codes.parquet import read_row_groups
from feature_store.errors import QueryError
from feature_store.storage.commit import Run
from feature_store.storage.filesystem import scan_source

SPARSE_SHARE = 32
"""by_feature is scanned if the filter leaves one feature, or at most one in this many: its rows have to be sorted by
cell, which at one in 20 takes as long as reading all of by_cell (CPU, 4096 features: .46 s for .75 at one in 32)."""
Mask = npt.NDArray[np.bool_]


class CodeReader:
    """The codes of one finished run, in both orders; `folder` is the codes folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = CodesRun.open(folder)
        self.plan = self.run.plan
        self.n_features = self.plan.n_features
        self._footers: dict[Path, Any] = {}

    @property
    def schema(self) -> dict[str, pl.DataType]:
        """Columns and dtypes of `scan`."""
        keys = {"token_pos": pl.Int32(), "gene_id": pl.Int32()} if self.plan.level == "token" else {}
        return {"cell_idx": pl.Int64(), **keys, "feature_id": pl.Int32(), "value": pl.Float32()}

    @property
    def of_all_cells(self) -> bool:
        """Whether the panel holds all cells, so that every cell has all its codes."""
        return self.run.compact is None

    def top_cells(self, feature: int, n: int) -> pl.DataFrame:
        """cell_idx and value of the n cells with the largest code of a feature among all cells; of equal ones the
        first.

        QueryError for more cells than are kept of a feature, unless the panel holds all cells.
        """
        if n > self.plan.top_cells:
            if not self.of_all_cells:
                raise QueryError(
                    f"the {self.plan.top_cells} cells with the largest codes of a feature are kept, and {n} were asked "
                    f"for; the codes of the panel's cells are in the table `codes`: SELECT * FROM codes WHERE "
                    f"feature_id = {feature} ORDER BY value DESC LIMIT {n}"
                )
            return self.codes_of(feature).sort("value", "cell_idx", descending=[True, False]).head(n)
        run = Run.open(self.folder / "merged" / "feature_cell")
        markers = [marker for marker in run.manifest().shards if marker.start <= feature < marker.stop]
        rows = self._rows(run.checked_parts(markers, max_bytes=0), "feature_id", feature, feature + 1)
        return rows.select("cell_idx", "value").head(n)

    def codes_of(self, feature: int) -> pl.DataFrame:
        """cell_idx and value of the panel's cells in which a feature fires, by cell."""
        rows = self._by_feature(feature, feature + 1).select("cell_idx", "value")
        # codes of tokens: a cell's is that of its strongest
        return rows.group_by("cell_idx", maintain_order=True).agg(pl.col("value").max())

    def codes_between(self, start: int, stop: int) -> pl.DataFrame:
        """feature_id, cell_idx and value of the panel's cells in which the features [start, stop) fire, by feature and
        cell.
        """
        rows = self._by_feature(start, stop)
        keys = ["feature_id", "cell_idx"]
        return rows.group_by(keys).agg(pl.col("value").max()).sort(keys)

    def features_of(self, cell: int) -> pl.DataFrame:
        """feature_id and value of all features of a cell, the largest value first; of equal ones the first.

        Of a cell outside the panel they are those of its largest codes.
        """
        rows = [
            self._rows([run.checked_parts([marker], max_bytes=0)[0]], "cell_idx", cell, cell + 1)
            for run in (self.run.by_cell, self.run.compact)
            if run is not None
            for marker in run.manifest().shards
            if marker.start <= cell < marker.stop
        ]
        found = pl.concat(rows).select(pl.col("feature_id").cast(pl.Int32), "value")
        features = found.group_by("feature_id", maintain_order=True).agg(pl.col("value").max())
        return features.sort("value", "feature_id", descending=[True, False])

    def scan(self) -> pl.LazyFrame:
        """The codes of the panel's cells as one lazy frame, by cell and then feature; the module says how a filter is
        used.
        """
        return register_io_source(self._read, schema=self.schema)

    def scan_compact(self) -> pl.LazyFrame:
        """The largest codes of the cells outside the panel as one lazy frame, by cell and then feature."""
        if self.run.compact is None:
            return pl.LazyFrame(schema=self.schema)
        return register_io_source(self._read_compact, schema=self.schema)

    def _read(
        self, columns: list[str] | None, predicate: pl.Expr | None, n_rows: int | None, _batch_size: int | None
    ) -> Iterator[pl.DataFrame]:
        conditions = [] if predicate is None else _conjuncts(predicate)
        features = _allowed(conditions, "feature_id", self.n_features, pl.Int32())
        cells = _allowed(conditions, "cell_idx", self.run.cut.n_cells, pl.Int64())
        if features is not None and n_rows is None and _is_sparser(features, cells):
            frame = self._by_features(features)
        else:
            frame = self._by_cell(self.run.by_cell, cells, n_rows)
        yield _selected(frame, predicate, columns or list(self.schema))

    def _read_compact(
        self, columns: list[str] | None, predicate: pl.Expr | None, n_rows: int | None, _batch_size: int | None
    ) -> Iterator[pl.DataFrame]:
        assert self.run.compact is not None
        conditions = [] if predicate is None else _conjuncts(predicate)
        cells = _allowed(conditions, "cell_idx", self.run.cut.n_cells, pl.Int64())
        yield _selected(self._by_cell(self.run.compact, cells, n_rows), predicate, columns or list(self.schema))

    def _by_cell(self, run: Run, cells: Mask | None, n_rows: int | None) -> pl.LazyFrame:
        """The rows of the parts with a cell that is allowed; with `n_rows`, the first rows of the table."""
        chosen = [
            marker
            for marker in run.manifest().shards
            if n_rows is not None or cells is None or cells[marker.start : marker.stop].any()
        ]
        parts = [scan_source(path) for path in run.checked_parts(chosen)]
        if not parts:
            return pl.LazyFrame(schema=self.schema)
        stored = {**self.schema, "feature_id": pl.UInt32() if self.n_features > 1 << 16 else pl.UInt16()}
        cast_options = pl.ScanCastOptions(integer_cast="upcast")
        frame = pl.scan_parquet(parts, schema=stored, cast_options=cast_options, glob=False)
        frame = frame.with_columns(pl.col("feature_id").cast(pl.Int32))
        # careful: Polars means the first rows of the table here, before the filter
        return frame if n_rows is None else frame.head(n_rows)

    def _by_features(self, allowed: Mask) -> pl.LazyFrame:
        ids = np.flatnonzero(allowed)
        if not len(ids):
            return pl.LazyFrame(schema=self.schema)
        # neighbouring features are read together
        ranges = np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1)
        rows = pl.concat([self._by_feature(int(some[0]), int(some[-1]) + 1) for some in ranges])
        keys = [name for name in ("cell_idx", "token_pos", "feature_id") if name in self.schema]
        return rows.lazy().select(pl.col(name).cast(dtype) for name, dtype in self.schema.items()).sort(keys)

    def _by_feature(self, start: int, stop: int) -> pl.DataFrame:
        return self._rows(self.run.by_feature.checked_parts(max_bytes=0), "feature_id", start, stop)

    def _rows(self, paths: Sequence[Path], column: str, start: int, stop: int) -> pl.DataFrame:
        """The rows of some parts with a value of the column in [start, stop), by part."""
        found = []
        for path in paths:
            rows, self._footers[path] = read_row_groups(path, column, start, stop, footer=self._footers.get(path))
            found.append(rows)
        return pl.concat(found)


def _selected(frame: pl.LazyFrame, predicate: pl.Expr | None, columns: list[str]) -> pl.DataFrame:
    return (frame if predicate is None else frame.filter(predicate)).select(columns).collect()


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
