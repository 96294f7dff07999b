"""Reductions of the token codes of a whole shard by numpy and scipy alone: the oracle of `sae_core.sae.reductions`.

Everything is held in memory and computed at once, so nothing here knows of blocks, open cells, buffers or thresholds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

Array = np.ndarray[Any, Any]
BLOCK_ENTRIES = 1 << 22


class TokenCodes(NamedTuple):
    """Codes CSR [n_tokens n_features] of a shard's tokens, in order of cell and position, and the keys of each."""

    codes: sparse.csr_array
    cell_idx: Array
    token_pos: Array
    gene_id: Array
    split: Array


class GroupSums(NamedTuple):
    """Number, sum and maximum of the nonzeros of one block of groups: a sorted row per (group, feature) with any."""

    group: Array
    feature_id: Array
    n: Array
    sum: Array
    max: Array


def reduce_by_group(codes: sparse.csr_array, group: npt.NDArray[Any], n_groups: int) -> Iterator[GroupSums]:
    """The reductions of the rows of `codes` by `group` [n_tokens], a dense block of groups at a time."""
    order = np.argsort(group, kind="stable")
    rows = codes[order]
    bounds = np.searchsorted(group[order], np.arange(n_groups + 1))
    n_features = codes.shape[1]
    step = max(1, BLOCK_ENTRIES // n_features)
    row_group = np.repeat(group[order], np.diff(rows.indptr))
    for low in range(0, n_groups, step):
        high = min(low + step, n_groups)
        span = slice(rows.indptr[bounds[low]], rows.indptr[bounds[high]])
        key = (row_group[span] - low) * n_features + rows.indices[span]
        size = (high - low) * n_features
        n = np.bincount(key, minlength=size)
        total: Any = np.bincount(key, weights=rows.data[span].astype(np.float64), minlength=size)
        largest = np.zeros(size, dtype=np.float32)
        np.maximum.at(largest, key, rows.data[span])
        fired = np.flatnonzero(n)
        yield GroupSums(low + fired // n_features, fired % n_features, n[fired], total[fired], largest[fired])


def _reduced(codes: sparse.csr_array, group: npt.NDArray[Any], n_groups: int) -> GroupSums:
    none = GroupSums(*(np.empty(0, dtype) for dtype in (int, int, int, float, np.float32)))
    parts = [none, *reduce_by_group(codes, group, n_groups)]
    return GroupSums(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def pool(tokens: TokenCodes, how: str) -> tuple[Array, Array, Array]:
    """cell_idx, feature_id and value of the cell codes: the maximum, or the mean with zeros, over a cell's tokens."""
    cells, group = np.unique(tokens.cell_idx, return_inverse=True)
    n_tokens = np.bincount(group, minlength=len(cells))
    found = _reduced(tokens.codes, group, len(cells))
    value = found.max if how == "max" else (found.sum / n_tokens[found.group]).astype(np.float32)
    return cells[found.group], found.feature_id, value


def keep_largest(cell_codes: tuple[Array, Array, Array], keep: int | None) -> tuple[Array, Array, Array]:
    """The `keep` largest codes of each cell, sorted by cell and feature; of equal ones the first features."""
    cell, feature, value = cell_codes
    order = np.lexsort((feature, -value, cell))
    rank = np.arange(len(cell)) - np.searchsorted(cell, cell)
    kept = np.sort(order[rank < (len(cell) if keep is None else keep)])
    return cell[kept], feature[kept], value[kept]


def token_codes_of(tokens: TokenCodes, kept: tuple[Array, Array, Array]) -> tuple[Array, ...]:
    """cell_idx, feature_id, value, token_pos and gene_id of the token codes of the cells' kept features."""
    coo = tokens.codes.tocoo()
    pairs = set(zip(kept[0].tolist(), kept[1].tolist(), strict=True))
    cell = tokens.cell_idx[coo.row]
    among = np.array([pair in pairs for pair in zip(cell.tolist(), coo.col.tolist(), strict=True)], dtype=bool)
    token = coo.row[among]
    return cell[among], coo.col[among], coo.data[among], tokens.token_pos[token], tokens.gene_id[token]


def largest_of_feature(feature: Array, value: Array, n: int) -> Array:
    """Places of the `n` largest values of each feature, by feature and falling value; of equal ones the first."""
    order = np.lexsort((np.arange(len(feature)), -value, feature))
    rank = np.arange(len(feature)) - np.searchsorted(feature[order], feature[order])
    return order[rank < n]


def top_cells(tokens: TokenCodes, how: str, n: int) -> tuple[Array, ...]:
    """feature_id, cell_idx and value of the n cells of the largest pooled code of each feature."""
    cell, feature, value = pool(tokens, how)
    place = largest_of_feature(feature, value, n)
    return feature[place], cell[place], value[place]


def top_tokens(tokens: TokenCodes, n: int) -> tuple[Array, ...]:
    """feature_id, cell_idx, token_pos, gene_id and value of the n tokens of the largest code of each feature."""
    by_feature = sparse.csc_array(tokens.codes)
    chosen = [np.empty(0, int)]
    for feature in np.flatnonzero(np.diff(by_feature.indptr)):
        low, high = by_feature.indptr[feature], by_feature.indptr[feature + 1]
        places, values = np.arange(low, high), by_feature.data[low:high]
        if high - low > n:
            places = places[values >= np.partition(values, -n)[-n]]
        # stable: equal values stay in the order of their tokens
        chosen.append(places[np.argsort(-by_feature.data[places], kind="stable")][:n])
    place = np.concatenate(chosen)
    token, feature = by_feature.indices[place], np.searchsorted(by_feature.indptr, place, side="right") - 1
    return feature, tokens.cell_idx[token], tokens.token_pos[token], tokens.gene_id[token], by_feature.data[place]


def firing(tokens: TokenCodes, n_splits: int) -> tuple[Array, ...]:
    """feature_id, split, n_cells, n_tokens and max of each feature that fires in a split."""
    tokens_of = _reduced(tokens.codes, tokens.split.astype(int), n_splits)
    cells, first = np.unique(tokens.cell_idx, return_index=True)
    cell, feature, _ = pool(tokens, "max")
    n_cells = np.zeros((n_splits, tokens.codes.shape[1]), int)
    np.add.at(n_cells, (tokens.split[first][np.searchsorted(cells, cell)], feature), 1)
    order = np.lexsort((tokens_of.group, tokens_of.feature_id))
    split, feature = tokens_of.group[order], tokens_of.feature_id[order]
    return feature, split, n_cells[split, feature], tokens_of.n[order], tokens_of.max[order]


def cell_statistics(tokens: TokenCodes) -> tuple[Array, Array]:
    """cell_idx and n_tokens of each cell."""
    return np.unique(tokens.cell_idx, return_counts=True)


def gene_statistics(tokens: TokenCodes) -> tuple[Array, ...]:
    """split, gene_id and number of tokens of each (split, gene)."""
    keys, n = np.unique(np.stack([tokens.split, tokens.gene_id]), axis=1, return_counts=True)
    return keys[0], keys[1], n


def feature_gene_statistics(tokens: TokenCodes) -> tuple[Array, ...]:
    """feature_id, split, gene_id and number of tokens of (split, gene) on which the feature fires."""
    keys, group = np.unique(np.stack([tokens.split, tokens.gene_id]), axis=1, return_inverse=True)
    found = _reduced(tokens.codes, group.reshape(-1), keys.shape[1])
    split, gene = keys[0][found.group], keys[1][found.group]
    order = np.lexsort((gene, split, found.feature_id))
    return found.feature_id[order], split[order], gene[order], found.n[order]
