"""SAE codes of a data set: codes of the panel's cells in two orders, compact codes of all others, and statistics.

`CodesRun` commits shards, whose statistics `Merging` merges over all cells. They are read back as matrices and tables
(`load`), or one cell or feature at a time and in SQL (`CodeReader`).

cut                 the cells of each shard
codes_run           the folder of a codes run, written shard by shard
merge               the statistics of the features over all cells
top_cells           the tokens of the cell in which each feature fires most
load, code_reader   matrices and tables; look-ups and lazy scans
parquet             the Parquet encoding of both sort orders
"""

from feature_store.codes.code_reader import CodeReader
from feature_store.codes.codes_run import CodesRun
from feature_store.codes.cut import cells_of_shard, span_of_shard
from feature_store.codes.load import (
    TokenCounts,
    load_cell_codes,
    load_feature_codes,
    load_token_counts,
    load_top_tokens,
    n_without_tokens,
    panel_firing,
    panel_tokens,
    panel_with_tokens,
)
from feature_store.codes.merge import Merging, build_merged
from feature_store.codes.top_cells import TokenPiece, TopCells

__all__ = [
    "CodeReader",
    "CodesRun",
    "Merging",
    "TokenCounts",
    "TokenPiece",
    "TopCells",
    "build_merged",
    "cells_of_shard",
    "load_cell_codes",
    "load_feature_codes",
    "load_token_counts",
    "load_top_tokens",
    "n_without_tokens",
    "panel_firing",
    "panel_tokens",
    "panel_with_tokens",
    "span_of_shard",
]
