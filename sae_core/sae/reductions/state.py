"""What a reduction accumulates on the device of the codes: counts, maxima and the largest values of each feature."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int, Int64
from torch import Tensor

from sae_core.sae.codes import SparseCodes
from sae_core.sae.reductions.counts import FeatureGeneCounts, GeneCounts, count_keys
from sae_core.sae.reductions.ordering import to_numpy
from sae_core.sae.reductions.pooling import PooledCells
from sae_core.sae.reductions.results import CellTokens, FiringCounts, ShardStatistics, TopCells, TopTokens
from sae_core.sae.reductions.top_values import TopValues


class BlockTokens(NamedTuple):
    """The keys of a block's tokens, on the device of the codes."""

    cell_idx: Int64[Tensor, " token"]
    token_pos: Int[Tensor, " token"]
    gene_id: Int[Tensor, " token"]
    split: Int64[Tensor, " token"]
    ordinal: Int64[Tensor, " token"]
    """The token's cell, counted within the block."""


class ShardState:
    """Statistics of the tokens and of the complete cells so far.

    `token_max` takes the largest code of a (split, feature) from the tokens: pooled codes tell it only if they are
    maxima, and then it costs less to take it from them.
    """

    def __init__(
        self,
        *,
        n_features: int,
        n_splits: int,
        n_top_cells: int,
        n_top_tokens: int,
        by_gene: bool,
        token_max: bool,
        device: torch.device,
    ) -> None:
        size = n_splits * n_features
        self.n_features, self.n_splits, self.token_max = n_features, n_splits, token_max
        self.n_cells = torch.zeros(size, dtype=torch.int64, device=device)
        self.n_tokens = torch.zeros(size, dtype=torch.int64, device=device)
        self.max = torch.zeros(size, device=device)
        self.top_cells = TopValues(n_features, n_top_cells, (torch.int64,), device)
        keys = (torch.int64, torch.int32, torch.int32)
        self.top_tokens = TopValues(n_features, n_top_tokens, keys, device)
        self.feature_gene = FeatureGeneCounts(n_features, n_splits) if by_gene else None
        self.gene = GeneCounts(n_splits)

    def add_tokens(self, codes: SparseCodes, tokens: BlockTokens) -> None:
        """Count the tokens of a block."""
        key = (tokens.split * self.n_features).index_select(0, codes.row)
        key += codes.col
        count_keys(self.n_tokens, key)
        if self.token_max:
            self.max.scatter_reduce_(0, key, codes.value, "amax")
        chosen = self.top_tokens.candidates(codes.col, codes.value)
        token = codes.row[chosen]
        columns = (column[token] for column in (tokens.cell_idx, tokens.token_pos, tokens.gene_id))
        self.top_tokens.add(codes.col[chosen], codes.value[chosen], *columns)

    def add_genes(
        self, codes: SparseCodes, tokens: BlockTokens, split: npt.NDArray[Any], gene: npt.NDArray[Any]
    ) -> None:
        """Count the tokens of a block by gene; `split` and `gene` are those of `tokens`, in main memory."""
        if self.feature_gene is not None:
            top = int(gene.max())
            self.gene.add(split, gene, top)
            self.feature_gene.add(codes, split=tokens.split, gene=tokens.gene_id, top=top)

    def add_cells(self, pooled: PooledCells, cell_idx: Int64[Tensor, " cell"], split: Int64[Tensor, " cell"]) -> None:
        """Count complete cells."""
        key = (split * self.n_features)[pooled.cell] + pooled.feature
        count_keys(self.n_cells, key)
        if not self.token_max:
            self.max.scatter_reduce_(0, key, pooled.value, "amax")
        chosen = self.top_cells.candidates(pooled.feature, pooled.value)
        self.top_cells.add(pooled.feature[chosen], pooled.value[chosen], cell_idx[pooled.cell[chosen]])

    def statistics(self, cells: CellTokens) -> ShardStatistics:
        """The statistics of all that was added."""
        top_cells, top_tokens = self.top_cells.rows(), self.top_tokens.rows()
        cell_idx, token_pos, gene_id = (to_numpy(column) for column in top_tokens.columns)
        return ShardStatistics(
            firing=self._firing(),
            cells=cells,
            top_cells=TopCells(
                to_numpy(top_cells.feature.int()), to_numpy(top_cells.columns[0]), to_numpy(top_cells.value)
            ),
            top_tokens=TopTokens(
                to_numpy(top_tokens.feature.int()), cell_idx, token_pos, gene_id, to_numpy(top_tokens.value)
            ),
            gene_tokens=None if self.feature_gene is None else self.gene.rows(),
            feature_gene=None if self.feature_gene is None else self.feature_gene.rows(),
        )

    def _firing(self) -> FiringCounts:
        tables: list[Tensor] = [self.n_cells, self.n_tokens, self.max]
        n_cells, n_tokens, largest = (to_numpy(table).reshape(self.n_splits, self.n_features).T for table in tables)
        feature, split = np.nonzero(n_tokens)
        return FiringCounts(
            feature.astype(np.int32),
            split.astype(np.uint8),
            n_cells[feature, split],
            n_tokens[feature, split],
            largest[feature, split],
        )
