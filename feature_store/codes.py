"""Codes on disk: by cell, by feature, and the token statistics beside them.

    by_cell/                 cell_idx (sorted), [token_pos, gene_id], feature_id u16 or u32, value f32
    by_feature/              the same nonzeros by feature_id, value descending, cell_idx; one part per range of features
    stats/feature_gene/      token_feature_gene: per (split, feature, gene), mergeable float64
    stats/gene/              token_gene: tokens per (split, gene)
    stats/feature_token/     token_top: the top-activating tokens of each feature

Two sort orders because a query needs the one that it reads along: 2 ms on the right one with the part found from the
manifest, 677 ms on the wrong one (measured). Each is a run of its own, so each resumes; by_feature is built from
by_cell's manifest. Sorted ids are delta-encoded, values byte-stream-split, all zstd-1: 3.6 bytes a nonzero by cell
and 4.2 by feature (1000 cells of 3,200 nonzeros over 4096 features, exponential values).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse

from feature_store.commit import Manifest, Run, ShardMarker, read_part, write_frame
from feature_store.errors import InputError, IntegrityError
from feature_store.files import REPAIR, parquet_source, scan_source
from feature_store.layout import STATISTICS_TABLES, as_path
from feature_store.token_codes import (
    TokenCodes,
    feature_gene_statistics,
    gene_statistics,
    merge_feature_gene,
    merge_gene,
    merge_top,
    pool,
    top_tokens,
)

BY_CELL_ROW_GROUP_ROWS = 131_072
BY_FEATURE_ROW_GROUP_ROWS = 65_536
N_BUCKETS = 64
MERGE_PARTS = 16
DEFAULTS: Mapping[str, Any] = {"level": "cell", "pooling": "max", "top_tokens": 20}


class Statistics(NamedTuple):
    """The merged token statistics of a codes run: tables token_feature_gene, token_gene and token_top."""

    feature_gene: pl.DataFrame
    gene: pl.DataFrame
    feature_token: pl.DataFrame


class CodesRun:
    """A codes run: the runs by_cell and stats/* of one folder, written shard by shard together.

    `plan` has `n_shards`, `n_features` and whatever determines the codes; further `level` ("cell", or "token" to
    store the codes of tokens), `pooling` ("max" or "mean") and `top_tokens` (kept per feature and shard), with
    `DEFAULTS`.
    """

    def __init__(self, folder: Path, by_cell: Run, statistics: Mapping[str, Run]) -> None:
        self.folder = folder
        self.by_cell = by_cell
        self.statistics = statistics
        self.plan = by_cell.plan
        self.n_features: int = self.plan["n_features"]

    @classmethod
    def create(cls, folder: str | Path, plan: Mapping[str, Any]) -> "CodesRun":
        """Make or reopen the runs. PlanMismatchError, InputError as `Run.create`."""
        folder = as_path(folder)
        plan = {**DEFAULTS, **plan}
        n_features = plan.get("n_features")
        if not isinstance(n_features, int) or not 1 <= n_features <= 2**31 - 1:
            raise InputError(f"a codes plan needs n_features, an int of at least 1; got {n_features!r}")
        if plan["level"] not in ("cell", "token"):
            raise InputError(f"the level of codes is 'cell' or 'token'; got {plan['level']!r}")
        if plan["level"] == "token" and plan["pooling"] != "max":
            raise InputError(f"codes of tokens can only be max-pooled when read; got pooling {plan['pooling']!r}")
        by_cell = Run.create(folder / "by_cell", {**plan, "table": "by_cell"})
        names = {name: folder / "stats" / name for name in STATISTICS_TABLES}
        return cls(folder, by_cell, {name: Run.create(path, {**plan, "table": name}) for name, path in names.items()})

    @classmethod
    def open(cls, folder: str | Path) -> "CodesRun":
        """Open an existing codes run, complete or not. NotFoundError."""
        folder = as_path(folder)
        statistics = {name: Run.open(folder / "stats" / name) for name in STATISTICS_TABLES}
        return cls(folder, Run.open(folder / "by_cell"), statistics)

    def pending(self) -> list[int]:
        """Shards that any of the runs still lacks, ascending; see `Run.pending`."""
        return sorted({shard for run in (self.by_cell, *self.statistics.values()) for shard in run.pending()})

    def commit_shard(
        self, shard: int, tokens: TokenCodes, *, start: int, stop: int, split_of_cell: npt.NDArray[Any]
    ) -> ShardMarker:
        """Commit the codes of cells [start, stop) and their statistics; what is committed already is left alone.

        `tokens` are all tokens of those cells that count (no special tokens). `split_of_cell` is indexed by cell_idx
        and covers at least the cells of the shard. Returns the marker of by_cell. InputError for a cell outside the
        range.
        """
        cells = tokens.cell_idx
        if tokens.n_features != self.n_features:
            raise InputError(f"codes have {tokens.n_features} features; the plan says {self.n_features}")
        if len(cells) and not (start <= cells.min() and cells.max() < stop):
            raise InputError(f"shard {shard} has cells [{start}, {stop}); got {cells.min()} to {cells.max()}")
        split = np.asarray(split_of_cell)[cells]

        def commit(run: Run, write: Callable[[Path], int]) -> ShardMarker:
            return run.commit_shard(shard, write, start=start, stop=stop)

        tables = self.statistics
        commit(tables["feature_gene"], lambda path: write_frame(path, feature_gene_statistics(tokens, split)))
        commit(tables["gene"], lambda path: write_frame(path, gene_statistics(tokens, split)))
        commit(tables["feature_token"], lambda path: write_frame(path, top_tokens(tokens, self.plan["top_tokens"])))
        return commit(self.by_cell, lambda path: self._write_codes(path, tokens))

    def finalize(self, *, n_buckets: int = N_BUCKETS) -> Manifest:
        """Finish all runs and build by_feature; returns by_cell's manifest. IncompleteRunError names missing shards."""
        for run in self.statistics.values():
            run.finalize()
        manifest = self.by_cell.finalize()
        build_by_feature(self.folder, n_buckets=n_buckets)
        return manifest

    def _write_codes(self, path: Path, tokens: TokenCodes) -> int:
        if self.plan["level"] == "cell":
            return write_by_cell(path, *pool(tokens, self.plan["pooling"]), n_features=self.n_features)
        order = np.lexsort((tokens.token_pos, tokens.cell_idx))
        codes = tokens.codes[order]
        codes.sort_indices()
        token = order.repeat(np.diff(codes.indptr))
        return write_by_cell(
            path,
            tokens.cell_idx[token],
            codes.indices,
            codes.data,
            n_features=self.n_features,
            token_pos=tokens.token_pos[token],
            gene_id=tokens.gene_id[token],
        )


def write_by_cell(
    path: str | Path,
    cell_idx: npt.NDArray[Any],
    feature_id: npt.NDArray[Any],
    value: npt.NDArray[Any],
    *,
    n_features: int,
    token_pos: npt.NDArray[Any] | None = None,
    gene_id: npt.NDArray[Any] | None = None,
) -> int:
    """Write one by_cell part, a row a nonzero, sorted by cell (then token, then feature); returns the rows.

    InputError if the cells are not in ascending order or a feature is not below n_features.
    """
    if len(cell_idx) and (np.diff(cell_idx) < 0).any():
        raise InputError("codes by cell are sorted by cell_idx; sort them first")
    if len(feature_id) and not 0 <= int(feature_id.min()) <= int(feature_id.max()) < n_features:
        raise InputError(
            f"feature ids go from {feature_id.min()} to {feature_id.max()}; allowed: 0 to {n_features - 1}"
        )
    columns = {"cell_idx": pa.array(cell_idx, pa.int64())}
    if token_pos is not None and gene_id is not None:
        columns |= {"token_pos": pa.array(token_pos, pa.int32()), "gene_id": pa.array(gene_id, pa.int32())}
    columns |= {"feature_id": _feature_ids(feature_id, n_features), "value": pa.array(value, pa.float32())}
    return _write_codes(path, columns, BY_CELL_ROW_GROUP_ROWS)


def build_by_feature(folder: str | Path, *, n_buckets: int = N_BUCKETS, max_rows: int = 20_000_000) -> Manifest:
    """Build by_feature/ of a codes folder from its finished by_cell/: a part per range of features; resumable.

    Buckets are gathered several at a time, as many as have `max_rows` nonzeros together, with one pass over by_cell
    each
    time: memory stays near 40 bytes * max_rows whatever the size. IncompleteRunError if by_cell is not finished.
    """
    folder = as_path(folder)
    by_cell = Run.open(folder / "by_cell")
    n_features: int = by_cell.plan["n_features"]
    n_buckets = min(n_buckets, n_features)
    bounds = [bucket * n_features // n_buckets for bucket in range(n_buckets + 1)]
    plan = {
        "table": "by_feature",
        "by_cell": by_cell.manifest().sha,
        "n_features": n_features,
        "level": by_cell.plan["level"],
        "n_shards": n_buckets,
    }
    run = Run.create(folder / "by_feature", plan)
    pending = run.pending()
    rows = _rows_of_features(by_cell, n_features) if pending else np.zeros(n_features, dtype=np.int64)
    while pending:
        buckets = _first_that_fit(pending, bounds, rows, max_rows)
        pending = pending[len(buckets) :]
        low, high = bounds[buckets[0]], bounds[buckets[-1] + 1]
        frame = _gather(by_cell, low, high)
        for bucket in buckets:
            start, stop = bounds[bucket], bounds[bucket + 1]
            part = frame.filter(pl.col("feature_id").is_between(start, stop, closed="left"))
            write = partial(_write_by_feature, part=part, n_features=n_features)
            run.commit_shard(bucket, write, start=start, stop=stop)
    return run.finalize()


def load_cell_codes(run: Run, n_cells: int, cells: npt.NDArray[Any] | None = None) -> sparse.csr_array:
    """Cell codes as CSR float32 [n_cells n_features] of a finished by_cell run, indices sorted.

    `cells` (bool [n_cells], or cell_idx) takes these cells only, in their order: [len(cells) n_features]; parts without
    any of them are not read. Codes of tokens are max-pooled. InputError for a cell_idx of n_cells or more.
    """
    chosen = None if cells is None else np.flatnonzero(cells) if cells.dtype == np.bool_ else np.asarray(cells)
    parts = []
    for marker in run.manifest().shards:
        if chosen is None or ((marker.start <= chosen) & (chosen < marker.stop)).any():
            parts.append(_cell_codes_of_part(run, marker))
    cell_idx = np.concatenate([np.empty(0, np.int64), *(part[0] for part in parts)])
    if len(cell_idx) and int(cell_idx.max()) >= n_cells:
        raise InputError(f"{run.path} has codes of cell {int(cell_idx.max())}; the data set has {n_cells} cells")
    indptr = np.concatenate([[0], np.cumsum(np.bincount(cell_idx, minlength=n_cells))])
    feature_id = np.concatenate([np.empty(0, np.int32), *(part[1] for part in parts)])
    value = np.concatenate([np.empty(0, np.float32), *(part[2] for part in parts)])
    codes = sparse.csr_array((value, feature_id, indptr), shape=(n_cells, run.plan["n_features"]))
    return codes if chosen is None else codes[chosen]


def load_feature_codes(run: Run, n_cells: int, start: int, stop: int) -> sparse.csr_array:
    """Cell codes of the features [start, stop) of all cells as CSR float32 [n_cells stop - start], indices sorted, from
    a finished by_feature run.

    Parts without any of them are not read. Codes of tokens are max-pooled. InputError for a cell_idx of n_cells or
    more. Memory: 24 bytes a nonzero while it is made.
    """
    parts = []
    for marker in run.manifest().shards:
        if marker.start < stop and marker.stop > start:
            feature, cell, value = _columns(run.part(marker.shard), ["feature_id", "cell_idx", "value"])
            # sorted by feature
            low, high = np.searchsorted(feature, [start, stop])
            parts.append((feature[low:high].astype(np.int32) - start, cell[low:high], value[low:high]))
    feature = np.concatenate([np.empty(0, np.int32), *(part[0] for part in parts)])
    cell = np.concatenate([np.empty(0, np.int64), *(part[1] for part in parts)])
    value = np.concatenate([np.empty(0, np.float32), *(part[2] for part in parts)])
    if len(cell) and int(cell.max()) >= n_cells:
        raise InputError(f"{run.path} has codes of cell {int(cell.max())}; the data set has {n_cells} cells")
    indptr = np.concatenate([[0], np.cumsum(np.bincount(feature, minlength=stop - start))])
    # turned into rows, which keeps the order of a feature's values within a cell: the largest is the first
    codes = sparse.csc_array((value, cell, indptr), shape=(n_cells, stop - start)).tocsr()
    if run.plan["level"] == "token":
        row = np.repeat(np.arange(n_cells), np.diff(codes.indptr))
        first = (np.diff(row, prepend=-1) != 0) | (np.diff(codes.indices, prepend=-1) != 0)
        indptr = np.concatenate([[0], np.cumsum(np.bincount(row[first], minlength=n_cells))])
        codes = sparse.csr_array((codes.data[first], codes.indices[first], indptr), shape=codes.shape)
    return codes


def load_statistics(folder: str | Path, *, features: tuple[int, int] | None = None) -> Statistics:
    """The token statistics of a finished codes run, merged over its shards in their order: the same bits each time.

    `features` (start, stop) keeps the rows of these features only.
    """
    codes = CodesRun.open(folder)
    n_top: int = codes.plan["top_tokens"]
    return Statistics(
        feature_gene=_fold(codes.statistics["feature_gene"], merge_feature_gene, features),
        gene=_fold(codes.statistics["gene"], merge_gene),
        feature_token=_fold(codes.statistics["feature_token"], lambda parts: merge_top(parts, n_top), features),
    )


def _fold(run: Run, merge: Any, features: tuple[int, int] | None = None) -> pl.DataFrame:
    """Merge the parts of a run, a few at a time: memory of the merged table and MERGE_PARTS parts."""
    paths = run.parts()
    merged: pl.DataFrame = merge([])
    for low in range(0, len(paths), MERGE_PARTS):
        parts = (read_part(path) for path in paths[low : low + MERGE_PARTS])
        if features is not None:
            wanted = pl.col("feature_id").is_between(*features, closed="left")
            parts = (part.filter(wanted) for part in parts)
        merged = merge([merged, *parts])
    return merged


def _feature_ids(feature_id: npt.NDArray[Any], n_features: int) -> Any:
    return pa.array(feature_id.astype(np.uint16 if n_features <= 1 << 16 else np.uint32))


def _write_codes(path: str | Path, columns: Mapping[str, Any], row_group_rows: int) -> int:
    schema = pa.schema([pa.field(name, column.type, nullable=False) for name, column in columns.items()])
    table = pa.Table.from_arrays(list(columns.values()), schema=schema)
    pq.write_table(
        table,
        path,
        row_group_size=row_group_rows,
        compression="zstd",
        compression_level=1,
        use_dictionary=False,
        column_encoding={name: "DELTA_BINARY_PACKED" for name in columns if name != "value"}
        | {"value": "BYTE_STREAM_SPLIT"},
        write_page_index=True,
        write_page_checksum=True,
    )
    return int(table.num_rows)


def _write_by_feature(path: Path, part: pl.DataFrame, n_features: int) -> int:
    keys = [name for name in ("cell_idx", "token_pos") if name in part.columns]
    part = part.sort("feature_id", "value", *keys, descending=[False, True, *(False for _ in keys)])
    order = ["feature_id", "value", *(name for name in part.columns if name not in ("feature_id", "value"))]
    columns = {name: part[name].to_arrow() for name in order}
    columns["feature_id"] = _feature_ids(part["feature_id"].to_numpy(), n_features)
    return _write_codes(path, columns, BY_FEATURE_ROW_GROUP_ROWS)


def _rows_of_features(by_cell: Run, n_features: int) -> npt.NDArray[np.int64]:
    total = np.zeros(n_features, dtype=np.int64)
    for path in by_cell.parts():
        total += np.bincount(_columns(path, ["feature_id"])[0], minlength=n_features)
    return total


def _first_that_fit(
    pending: Sequence[int], bounds: Sequence[int], rows: npt.NDArray[np.int64], max_rows: int
) -> list[int]:
    """The first pending buckets, at least one, that follow each other and have at most max_rows nonzeros together."""
    chosen = [pending[0]]
    for bucket in pending[1:]:
        if bucket != chosen[-1] + 1 or rows[bounds[chosen[0]] : bounds[bucket + 1]].sum() > max_rows:
            break
        chosen.append(bucket)
    return chosen


def _gather(by_cell: Run, low: int, high: int) -> pl.DataFrame:
    wanted = pl.col("feature_id").is_between(low, high, closed="left")
    return pl.concat([pl.scan_parquet(scan_source(path)).filter(wanted).collect() for path in by_cell.parts()])


def _columns(path: Path, names: list[str]) -> list[npt.NDArray[Any]]:
    """Columns of one part, every page checked. IntegrityError if it is not as written."""
    try:
        with parquet_source(path) as source, pq.ParquetFile(source, page_checksum_verification=True) as file:
            return [column.to_numpy() for column in file.read(columns=names).columns]
    except (OSError, pa.ArrowException) as error:
        raise IntegrityError(f"{path} cannot be read: {error}; {REPAIR}") from error


def _cell_codes_of_part(
    run: Run, marker: ShardMarker
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    cell_idx, feature_id, value = _columns(run.part(marker.shard), ["cell_idx", "feature_id", "value"])
    if run.plan["level"] == "token" and len(cell_idx):
        order = np.lexsort((feature_id, cell_idx))
        cell_idx, feature_id, value = cell_idx[order], feature_id[order], value[order]
        new = np.flatnonzero((np.diff(cell_idx, prepend=-1) != 0) | (np.diff(feature_id.astype(int), prepend=-1) != 0))
        cell_idx, feature_id, value = cell_idx[new], feature_id[new], np.maximum.reduceat(value, new)
    return cell_idx, feature_id.astype(np.int32), value
