"""A codes run on disk: codes by cell, codes by feature, and the statistics of their tokens.

    by_cell/                 cell_idx (sorted), [token_pos, gene_id], feature_id u16 or u32, value f32
    by_feature/              the same nonzeros by feature_id, value descending, cell_idx; one part per range of features
    stats/feature_gene/      token_feature_gene: per (split, feature, gene), mergeable float64
    stats/gene/              token_gene: tokens per (split, gene)
    stats/feature_token/     token_top: the top-activating tokens of each feature
    stats/cell/              cell_tokens: tokens of each cell that has any

There are two sort orders because a query by cell and a query by feature read different rows: 2 ms in the right order,
with the part found from the manifest, 677 ms in the wrong one (measured). Each is a run of its own, so each resumes;
by_feature is built from the finished by_cell (`by_feature.py`).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from feature_store.codes.by_feature import build_by_feature
from feature_store.codes.parquet import write_by_cell
from feature_store.codes.token_codes import TokenCodes, pool
from feature_store.codes.token_statistics import cell_statistics, feature_gene_statistics, gene_statistics, top_tokens
from feature_store.errors import InputError
from feature_store.storage.commit import Manifest, Run, ShardMarker, write_frame
from feature_store.storage.layout import STATISTICS_TABLES, as_path
from feature_store.storage.plans import CodesPlan

TOP_TOKENS = 20
"""Top-activating tokens that are kept of each feature and shard."""


class CodesRun:
    """A codes run: the runs by_cell and stats/* of one folder, whose shards are written together.

    Its `plan` is the record of what determines the codes.
    """

    def __init__(self, folder: Path, by_cell: Run, statistics: Mapping[str, Run]) -> None:
        self.folder = folder
        self.by_cell = by_cell
        self.statistics = statistics
        self.plan = CodesPlan.of(by_cell)
        self.n_features = self.plan.n_features

    @classmethod
    def create(cls, folder: str | Path, plan: CodesPlan, *, n_shards: int) -> "CodesRun":
        """Make or reopen the runs. PlanMismatchError, InputError as `Run.create`."""
        folder = as_path(folder)
        if not 1 <= plan.n_features <= 2**31 - 1:
            raise InputError(f"a codes plan needs n_features, an int of at least 1; got {plan.n_features!r}")
        if plan.level not in ("cell", "token"):
            raise InputError(f"the level of codes is 'cell' or 'token'; got {plan.level!r}")
        if plan.level == "token" and plan.pooling != "max":
            raise InputError(f"codes of tokens can only be max-pooled when read; got pooling {plan.pooling!r}")
        by_cell = Run.create(folder / "by_cell", plan.table("by_cell", n_shards=n_shards))
        tables = {
            name: Run.create(folder / "stats" / name, plan.table(name, n_shards=n_shards)) for name in STATISTICS_TABLES
        }
        return cls(folder, by_cell, tables)

    @classmethod
    def open(cls, folder: str | Path) -> "CodesRun":
        """Open an existing codes run, complete or not. NotFoundError if there is none."""
        folder = as_path(folder)
        statistics = {name: Run.open(folder / "stats" / name) for name in STATISTICS_TABLES}
        return cls(folder, Run.open(folder / "by_cell"), statistics)

    def pending(self) -> list[int]:
        """Shards that at least one of the runs lacks, ascending; see `Run.pending`."""
        return sorted({shard for run in (self.by_cell, *self.statistics.values()) for shard in run.pending()})

    def commit_shard(
        self, shard: int, tokens: TokenCodes, *, start: int, stop: int, split_of_cell: npt.NDArray[Any]
    ) -> ShardMarker:
        """Commit the codes of cells [start, stop) and their statistics; tables that are committed already stay.

        `tokens` are all tokens of these cells without special tokens. `split_of_cell` is indexed by cell_idx and
        covers at least the cells of the shard. Returns the marker of by_cell. InputError for a cell outside the range.
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
        commit(tables["feature_token"], lambda path: write_frame(path, top_tokens(tokens, self.plan.top_tokens)))
        commit(tables["cell"], lambda path: write_frame(path, cell_statistics(tokens)))
        return commit(self.by_cell, lambda path: self._write_codes(path, tokens))

    def finalize_shards(self) -> Manifest:
        """Finish all runs but by_feature and return by_cell's manifest. IncompleteRunError names missing shards."""
        for run in self.statistics.values():
            run.finalize()
        return self.by_cell.finalize()

    def finalize(self, *, n_buckets: int | None = None) -> Manifest:
        """Finish all runs, build by_feature in this process and return by_cell's manifest. IncompleteRunError."""
        manifest = self.finalize_shards()
        build_by_feature(self.folder, n_buckets=n_buckets)
        return manifest

    def _write_codes(self, path: Path, tokens: TokenCodes) -> int:
        if self.plan.level == "cell":
            return write_by_cell(path, *pool(tokens, self.plan.pooling), n_features=self.n_features)
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
