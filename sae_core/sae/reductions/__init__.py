"""Reductions of token codes while a shard streams: cell codes, and the statistics of the shard's cells and tokens.

`ShardReduction` takes blocks of tokens in order and gives the codes of each cell once the cell is complete; at the end
it gives `ShardStatistics`. All heavy work is torch operations on the device of the codes: pooling in dense rows of
cells (`pooling`), the largest codes of a cell (`largest`), the largest values of a feature (`top_values`) and integer
counts (`counts`). `ordering` holds the few operations that need another form on each device.

    reduction = ShardReduction(n_features=8192, pooling="max", keep=256, level="cell", n_top_cells=100, ...)
    for block in blocks:
        codes = reduction.add(sae.encode(block.act), cell_idx=..., token_pos=..., gene_id=..., split=...)
    codes, statistics = reduction.finish()

Nothing depends on how the tokens are cut into blocks, and a CPU and a GPU give the same bits: floats are only compared,
or summed in float64 in the order of the tokens; the only atomic operations are maxima and integer counts. Memory does
not grow with the cells of the shard, except 12 bytes a cell and the rows that are returned at the end.
"""

from sae_core.sae.reductions.results import (
    CellCodes,
    CellTokens,
    FeatureGeneTokens,
    FiringCounts,
    GeneTokens,
    ShardStatistics,
    TopCells,
    TopTokens,
)
from sae_core.sae.reductions.shard import Level, ShardReduction

__all__ = [
    "CellCodes",
    "CellTokens",
    "FeatureGeneTokens",
    "FiringCounts",
    "GeneTokens",
    "Level",
    "ShardReduction",
    "ShardStatistics",
    "TopCells",
    "TopTokens",
]
