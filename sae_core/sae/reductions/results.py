"""What a reduction returns: tables of numpy arrays, one entry of each array a row."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]
UInt8s = npt.NDArray[np.uint8]
Float32s = npt.NDArray[np.float32]


class CellCodes(NamedTuple):
    """Codes of complete cells, sorted by cell and feature; at level "token" by cell, token and feature."""

    cell_idx: Int64s
    feature_id: Int32s
    value: Float32s
    token_pos: Int32s | None = None
    """Position of the token in its cell; None at level "cell"."""
    gene_id: Int32s | None = None
    """Gene of the token; None at level "cell"."""


class FiringCounts(NamedTuple):
    """How often and how strongly each feature fires in each split, sorted by feature and split; n_tokens is above 0."""

    feature_id: Int32s
    split: UInt8s
    n_cells: Int64s
    """Cells whose pooled code is above 0, before `keep` is applied."""
    n_tokens: Int64s
    """Tokens whose code is above 0."""
    max: Float32s
    """Largest code of a token."""


class CellTokens(NamedTuple):
    """Number of tokens, firing or not, of each cell that has any, by cell."""

    cell_idx: Int64s
    n_tokens: Int32s


class TopCells(NamedTuple):
    """The cells with the largest pooled code of each feature, sorted by feature, falling value and cell."""

    feature_id: Int32s
    cell_idx: Int64s
    value: Float32s


class TopTokens(NamedTuple):
    """The tokens with the largest code of each feature, sorted by feature, falling value, cell and position."""

    feature_id: Int32s
    cell_idx: Int64s
    token_pos: Int32s
    gene_id: Int32s
    value: Float32s


class GeneTokens(NamedTuple):
    """Number of tokens of each (split, gene) that occurs, whether or not a feature fires, sorted."""

    split: UInt8s
    gene_id: Int32s
    n_tokens: Int64s


class FeatureGeneTokens(NamedTuple):
    """Number of tokens of (split, gene) on which a feature fires, sorted by feature, split and gene."""

    feature_id: Int32s
    split: UInt8s
    gene_id: Int32s
    n_tokens: Int32s


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardStatistics:
    """Statistics of all cells and tokens of a shard."""

    firing: FiringCounts
    cells: CellTokens
    top_cells: TopCells
    top_tokens: TopTokens
    gene_tokens: GeneTokens | None
    """None unless the reduction counts by gene."""
    feature_gene: FeatureGeneTokens | None
    """None unless the reduction counts by gene."""
