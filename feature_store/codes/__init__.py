"""SAE codes of a data set: sparse codes of tokens become cell codes, stored in two sort orders with their statistics.

`TokenCodes` are pooled to cell codes and committed shard by shard with `CodesRun`; `ByFeature` sorts the finished
codes by feature. They are read back whole (`load_cell_codes`, `load_feature_codes`, `load_statistics`), or one cell or
feature at a time and in SQL (`CodeReader`).

token_codes, token_statistics   codes of tokens, their pooling to cells, and their statistics by gene
codes_run                       the folder of a codes run, written shard by shard
by_feature                      the same nonzeros sorted by feature, built from by_cell
load, code_reader               whole matrices and tables; look-ups and lazy scans
parquet                         the Parquet encoding of both sort orders
"""

from feature_store.codes.by_feature import ByFeature, build_by_feature
from feature_store.codes.code_reader import CodeReader
from feature_store.codes.codes_run import CodesRun
from feature_store.codes.load import Statistics, cells_with_tokens, load_cell_codes, load_feature_codes, load_statistics
from feature_store.codes.token_codes import TokenCodes

__all__ = [
    "ByFeature",
    "CodeReader",
    "CodesRun",
    "Statistics",
    "TokenCodes",
    "build_by_feature",
    "cells_with_tokens",
    "load_cell_codes",
    "load_feature_codes",
    "load_statistics",
]
