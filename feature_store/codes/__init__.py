"""Codes: from sparse codes of tokens to two sort orders on disk, and back.

tokens       codes of tokens -> cell codes, and statistics by gene that merge over shards
run          the folder of a codes run: by_cell, by_feature and the statistics, written shard by shard, and its readers
by_feature   the same nonzeros sorted by feature, built from by_cell
parts        the Parquet encoding of both
reader       questions: along the sort order that each needs, in SQL too
"""

from feature_store.codes.by_feature import ByFeature, build_by_feature
from feature_store.codes.reader import CodeReader
from feature_store.codes.run import CodesRun, Statistics, load_cell_codes, load_feature_codes, load_statistics
from feature_store.codes.tokens import TokenCodes

__all__ = [
    "ByFeature",
    "CodeReader",
    "CodesRun",
    "Statistics",
    "TokenCodes",
    "build_by_feature",
    "load_cell_codes",
    "load_feature_codes",
    "load_statistics",
]
