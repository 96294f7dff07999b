"""Codes on disk: by cell, by feature, and the token statistics beside them.

    by_cell/                 cell_idx (sorted), [token_pos, gene_id], feature_id u16 or u32, value f32
    by_feature/              the same nonzeros by feature_id, value descending, cell_idx; one part per range of features
    stats/feature_gene/      token_feature_gene: per (split, feature, gene), mergeable float64
    stats/gene/              token_gene: tokens per (split, gene)
    stats/feature_token/     token_top: the top-activating tokens of each feature

Two sort orders because a query needs the one that it reads along: 2 ms on the right one with the part found from the
manifest, 677 ms on the wrong one (measured). Each is a run of its own, so each resumes; by_feature is built from
by_cell's manifest (`feature_store.codes.by_feature`).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy import sparse

from feature_store.codes.by_feature import build_by_feature
from feature_store.codes.parts import read_columns, write_by_cell
from feature_store.codes.tokens import (
    TokenCodes,
    feature_gene_statistics,
    gene_statistics,
    merge_feature_gene,
    merge_gene,
    merge_top,
    pool,
    top_tokens,
)
from feature_store.errors import InputError
from feature_store.storage.commit import Manifest, Run, ShardMarker, read_part, write_frame
from feature_store.storage.layout import STATISTICS_TABLES, as_path

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

    def finalize_shards(self) -> Manifest:
        """Finish all runs but by_feature; returns by_cell's manifest. IncompleteRunError names missing shards."""
        for run in self.statistics.values():
            run.finalize()
        return self.by_cell.finalize()

    def finalize(self, *, n_buckets: int | None = None) -> Manifest:
        """Finish all runs and build by_feature in this process; returns by_cell's manifest. IncompleteRunError."""
        manifest = self.finalize_shards()
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
            feature, cell, value = read_columns(run.part(marker.shard), ["feature_id", "cell_idx", "value"])
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


def _cell_codes_of_part(
    run: Run, marker: ShardMarker
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    cell_idx, feature_id, value = read_columns(run.part(marker.shard), ["cell_idx", "feature_id", "value"])
    if run.plan["level"] == "token" and len(cell_idx):
        order = np.lexsort((feature_id, cell_idx))
        cell_idx, feature_id, value = cell_idx[order], feature_id[order], value[order]
        new = np.flatnonzero((np.diff(cell_idx, prepend=-1) != 0) | (np.diff(feature_id.astype(int), prepend=-1) != 0))
        cell_idx, feature_id, value = cell_idx[new], feature_id[new], np.maximum.reduceat(value, new)
    return cell_idx, feature_id.astype(np.int32), value
