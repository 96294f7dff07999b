"""Codes and token statistics of a finished run, loaded into memory."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy import sparse

from feature_store.codes.codes_run import CodesRun
from feature_store.codes.parquet import read_columns
from feature_store.codes.token_statistics import merge_feature_gene, merge_gene, merge_top
from feature_store.errors import InputError
from feature_store.storage.commit import Run, ShardMarker, read_part
from feature_store.storage.layout import as_path
from feature_store.storage.plans import ByFeaturePlan, CodesPlan

MERGE_PARTS = 16


class Statistics(NamedTuple):
    """The merged token statistics of a codes run: tables token_feature_gene, token_gene and token_top."""

    feature_gene: pl.DataFrame
    gene: pl.DataFrame
    feature_token: pl.DataFrame


def load_cell_codes(run: Run, n_cells: int, cells: npt.NDArray[Any] | None = None) -> sparse.csr_array:
    """Cell codes as CSR float32 [n_cells n_features] of a finished by_cell run, indices sorted.

    `cells` (bool [n_cells], or cell_idx) selects cells, in their order: [len(cells) n_features]; parts without any of
    them are not read. Codes of tokens are max-pooled. InputError for a cell_idx of n_cells or more.
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
    codes = sparse.csr_array((value, feature_id, indptr), shape=(n_cells, CodesPlan.of(run).n_features))
    return codes if chosen is None else codes[chosen]


def load_feature_codes(run: Run, n_cells: int, start: int, stop: int) -> sparse.csr_array:
    """Cell codes of the features [start, stop) of all cells as CSR float32 [n_cells stop - start], indices sorted, from
    a finished by_feature run.

    Parts without any of them are not read. Codes of tokens are max-pooled. InputError for a cell_idx of n_cells or
    more. Peak memory: 24 bytes a nonzero.
    """
    parts = []
    for marker in run.manifest().shards:
        if marker.start < stop and marker.stop > start:
            feature, cell, value = read_columns(run.checked_parts([marker])[0], ["feature_id", "cell_idx", "value"])
            # sorted by feature
            low, high = np.searchsorted(feature, [start, stop])
            parts.append((feature[low:high].astype(np.int32) - start, cell[low:high], value[low:high]))
    feature = np.concatenate([np.empty(0, np.int32), *(part[0] for part in parts)])
    cell = np.concatenate([np.empty(0, np.int64), *(part[1] for part in parts)])
    value = np.concatenate([np.empty(0, np.float32), *(part[2] for part in parts)])
    if len(cell) and int(cell.max()) >= n_cells:
        raise InputError(f"{run.path} has codes of cell {int(cell.max())}; the data set has {n_cells} cells")
    indptr = np.concatenate([[0], np.cumsum(np.bincount(feature, minlength=stop - start))])
    # careful: tocsr keeps the order of a feature's values within a cell, so the largest stays the first
    codes = sparse.csc_array((value, cell, indptr), shape=(n_cells, stop - start)).tocsr()
    if ByFeaturePlan.of(run).level == "token":
        row = np.repeat(np.arange(n_cells), np.diff(codes.indptr))
        first = (np.diff(row, prepend=-1) != 0) | (np.diff(codes.indices, prepend=-1) != 0)
        indptr = np.concatenate([[0], np.cumsum(np.bincount(row[first], minlength=n_cells))])
        codes = sparse.csr_array((codes.data[first], codes.indices[first], indptr), shape=codes.shape)
    return codes


def cells_with_tokens(folder: str | Path, n_cells: int) -> npt.NDArray[np.bool_]:
    """Whether each cell [n_cells] of a finished codes run has a token; a cell without a gene that the model knows, such
    as an empty droplet, has none, and takes part in no statistic.
    """
    has_tokens = np.zeros(n_cells, dtype=bool)
    for path in Run.open(as_path(folder) / "stats" / "cell").checked_parts():
        has_tokens[read_part(path, ["cell_idx"])["cell_idx"].to_numpy()] = True
    return has_tokens


def load_statistics(folder: str | Path, *, features: tuple[int, int] | None = None) -> Statistics:
    """The token statistics of a finished codes run, merged over its shards in their order, so every call gives the same
    bits.

    `features` (start, stop) keeps only the rows of these features.
    """
    codes = CodesRun.open(folder)
    n_top = codes.plan.top_tokens
    return Statistics(
        feature_gene=_merge_parts(codes.statistics["feature_gene"], merge_feature_gene, features),
        gene=_merge_parts(codes.statistics["gene"], merge_gene),
        feature_token=_merge_parts(codes.statistics["feature_token"], lambda parts: merge_top(parts, n_top), features),
    )


def _merge_parts(run: Run, merge: Any, features: tuple[int, int] | None = None) -> pl.DataFrame:
    """Merge the parts of a run, MERGE_PARTS at a time; memory holds these and the merged table."""
    paths = run.checked_parts()
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
    cell_idx, feature_id, value = read_columns(run.checked_parts([marker])[0], ["cell_idx", "feature_id", "value"])
    if CodesPlan.of(run).level == "token" and len(cell_idx):
        order = np.lexsort((feature_id, cell_idx))
        cell_idx, feature_id, value = cell_idx[order], feature_id[order], value[order]
        new = np.flatnonzero((np.diff(cell_idx, prepend=-1) != 0) | (np.diff(feature_id.astype(int), prepend=-1) != 0))
        cell_idx, feature_id, value = cell_idx[new], feature_id[new], np.maximum.reduceat(value, new)
    return cell_idx, feature_id.astype(np.int32), value
