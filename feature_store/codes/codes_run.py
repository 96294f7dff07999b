"""A codes run on disk: the codes of the panel's cells in two orders, compact codes of all others, and statistics.

    by_cell/              of the panel: cell_idx (sorted), [token_pos, gene_id], feature_id u16 or u32, value f32
    by_feature/           the same nonzeros by feature_id and then cell_idx, row groups cut at the same features
    compact/              the largest codes of the cells outside the panel, as by_cell; absent if there are no such
                          cells
    stats/feature_gene/   of the panel: tokens of (feature, split, gene) on which the feature fires
    stats/gene/           of the panel: tokens of (split, gene)
    stats/feature_token/  of all cells: the top-activating tokens of each feature
    stats/feature_cell/   of all cells: the cells with the largest codes of each feature
    stats/firing/         of all cells: how many cells and tokens each feature fires in
    stats/cell/           of all cells: tokens of each cell that has any
    merged/               feature_token/, feature_cell/ and firing/ over all shards (`merge`)

A shard holds cells of the panel, or others (`cut`): a table of the panel has a part for each of the former, one of all
cells for both, the panel's first. All tables of a shard are written in one pass over its cells, so memory holds a block
of cells, the statistics, and of a shard of the panel its nonzeros (12 bytes each), which are sorted by feature.

There are two sort orders because a query by cell and a query by feature read different rows: 2 ms in the right order,
with the part found from the manifest, 677 ms in the wrong one (measured). Each table is a run of its own.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.codes.parquet import CellCodesWriter, Columns, feature_bounds, write_by_feature
from feature_store.errors import InputError
from feature_store.storage.commit import Manifest, Run, ShardMarker, write_frame
from feature_store.storage.layout import as_path
from feature_store.storage.plans import CodesPlan

TOP_TOKENS, TOP_CELLS = 20, 100
"""Top-activating tokens, and cells with the largest codes, that are kept of each feature."""
OF_PANEL, OF_ALL = ("feature_gene", "gene"), ("feature_token", "feature_cell", "firing", "cell")
MERGE_RANGES = 16
"""Ranges of features in which the statistics of many shards are merged."""
MERGE_ROWS = 16_000_000
"""Rows up to which they are merged in one."""

_DTYPES: dict[str, type[np.generic]] = {"cell_idx": np.int64, "value": np.float32}
"""Of the columns of codes, where it is not int32."""

Write = Callable[[Columns], None]
"""Takes the codes of the next cells of a shard, rows by cell (then token) and feature."""
Encode = Callable[[Write], Mapping[str, Columns]]
"""Gives the codes of a shard to `Write`, block by block, and returns its statistics: the columns of each table."""


class CodesRun:
    """A codes run: the runs of one folder, whose shards are written together.

    Its `plan` is the record of what determines the codes.
    """

    def __init__(self, folder: Path, plan: CodesPlan, tables: Mapping[str, Run]) -> None:
        self.folder = folder
        self.plan = plan
        self.cut = plan.cut
        self.n_features = plan.n_features
        self.tables = tables
        """Each run by its folder: by_cell, by_feature, compact, stats/..."""

    @property
    def by_cell(self) -> Run:
        """The codes of the panel's cells, by cell."""
        return self.tables["by_cell"]

    @property
    def by_feature(self) -> Run:
        """The codes of the panel's cells, by feature."""
        return self.tables["by_feature"]

    @property
    def compact(self) -> Run | None:
        """The largest codes of the cells outside the panel; None if there are no such cells."""
        return self.tables.get("compact")

    @property
    def bounds(self) -> list[int]:
        """Where the row groups of by_feature and stats/feature_gene begin, and the number of features."""
        return feature_bounds(self.n_features, self.cut.panel_cells)

    @property
    def merge_bounds(self) -> list[int]:
        """Where the ranges of features begin in which statistics are merged, and the number of features."""
        rows = self.cut.n_shards * self.n_features * (self.plan.top_cells + self.plan.top_tokens)
        n = min(self.n_features, 1 if rows <= MERGE_ROWS else MERGE_RANGES)
        return [i * self.n_features // n for i in range(n + 1)]

    @classmethod
    def create(cls, folder: str | Path, plan: CodesPlan) -> "CodesRun":
        """Make or reopen the runs. PlanMismatchError, InputError as `Run.create`."""
        folder = as_path(folder)
        if not 1 <= plan.n_features <= 2**31 - 1:
            raise InputError(f"a codes plan needs n_features, an int of at least 1; got {plan.n_features!r}")
        if plan.level not in ("cell", "token"):
            raise InputError(f"the level of codes is 'cell' or 'token'; got {plan.level!r}")
        if plan.level == "token" and plan.pooling != "max":
            raise InputError(f"codes of tokens can only be max-pooled when read; got pooling {plan.pooling!r}")
        return cls(
            folder,
            plan,
            {
                name: Run.create(folder / name, plan.table(name.rpartition("/")[2], n_shards=n))
                for name, n in _n_parts(plan).items()
            },
        )

    @classmethod
    def open(cls, folder: str | Path) -> "CodesRun":
        """Open an existing codes run, complete or not. NotFoundError if there is none."""
        folder = as_path(folder)
        by_cell = Run.open(folder / "by_cell")
        plan = CodesPlan.of(by_cell)
        others = {name: Run.open(folder / name) for name in _n_parts(plan) if name != "by_cell"}
        return cls(folder, plan, {"by_cell": by_cell, **others})

    def tables_of(self, shard: int) -> dict[str, tuple[Run, int]]:
        """Each run that has a part of a shard, and the number of that part."""
        return {name: (run, part) for name, run in self.tables.items() if (part := self._part(name, shard)) is not None}

    def committed(self, shard: int) -> bool:
        """Whether all tables of a shard are committed."""
        return all(run.committed(part) is not None for run, part in self.tables_of(shard).values())

    def pending(self) -> list[int]:
        """Shards of which at least one table is not committed, ascending; see `Run.pending`."""
        first_other = self.cut.n_panel_shards
        found: set[int] = set()
        for name, run in self.tables.items():
            found |= {part + first_other if name == "compact" else part for part in run.pending()}
        return sorted(found)

    def commit_shard(self, shard: int, encode: Encode, *, start: int, stop: int) -> ShardMarker:
        """Commit all tables of a shard, whose cells lie in [start, stop); those that are committed already stay.

        Returns the marker of its codes by cell. InputError for a cell outside the range.
        """
        of_panel = shard < self.cut.n_panel_shards
        codes, part = self.tables_of(shard)["by_cell" if of_panel else "compact"]
        kept: list[dict[str, npt.NDArray[Any]]] = []

        def encode_to(writer: CellCodesWriter | None) -> int:
            n_rows = 0

            def write(columns: Columns) -> None:
                nonlocal n_rows
                cells = columns["cell_idx"]
                if len(cells) and not (start <= cells[0] and cells[-1] < stop):
                    raise InputError(f"shard {shard} has cells [{start}, {stop}); got {cells[0]} to {cells[-1]}")
                n_rows += len(cells)
                if writer is not None:
                    writer.write(columns)
                if of_panel:
                    kept.append(dict(columns))

            self._commit_statistics(shard, encode(write), kept, start=start, stop=stop)
            return n_rows

        def write_part(path: Path) -> int:
            with CellCodesWriter(path, n_features=self.n_features, names=self.code_columns) as writer:
                return encode_to(writer)

        marker = codes.committed(part)
        if marker is None:
            return codes.commit_shard(part, write_part, start=start, stop=stop)
        # another table of the shard is missing
        encode_to(None)
        return marker

    @property
    def code_columns(self) -> list[str]:
        """Columns of codes by cell."""
        return ["cell_idx", *(("token_pos", "gene_id") if self.plan.level == "token" else ()), "feature_id", "value"]

    def finalize_shards(self) -> Manifest:
        """Finish all runs that shards write and return by_cell's manifest. IncompleteRunError names missing shards."""
        for name, run in self.tables.items():
            if name != "by_cell":
                run.finalize()
        return self.by_cell.finalize()

    def _commit_statistics(
        self,
        shard: int,
        statistics: Mapping[str, Columns],
        kept: list[dict[str, npt.NDArray[Any]]],
        *,
        start: int,
        stop: int,
    ) -> None:
        waiting = dict(statistics)
        del statistics
        for name, (run, part) in self.tables_of(shard).items():
            if name == "by_feature":
                run.commit_shard(part, lambda path: self._write_by_feature(path, kept), start=start, stop=stop)
            elif name.startswith("stats/"):
                table = name.removeprefix("stats/")
                # what is written goes at once: there are tens of millions of rows
                write = partial(self._write_table, table=table, columns=waiting.pop(table))
                run.commit_shard(part, write, start=start, stop=stop)

    def _write_by_feature(self, path: Path, kept: list[dict[str, npt.NDArray[Any]]]) -> int:
        names = ["feature_id", *(name for name in self.code_columns if name != "feature_id")]
        # a stable sort of 16 bits is a radix sort, and rows of a feature stay in the order of their cells
        dtype = np.uint16 if self.n_features <= 1 << 16 else np.int32
        order = np.argsort(_joined([block["feature_id"].astype(dtype) for block in kept], dtype), kind="stable")
        columns: dict[str, npt.NDArray[Any]] = {}
        for name in names:
            # column by column: all of them twice would be the largest thing in memory
            columns[name] = _joined([block.pop(name) for block in kept], _DTYPES.get(name, np.int32))[order]
        return write_by_feature(path, columns, self.bounds)

    def _write_table(self, path: Path, table: str, columns: Columns) -> int:
        if table == "feature_gene":
            return write_by_feature(path, columns, self.bounds)
        if table in ("feature_token", "feature_cell", "firing"):
            return write_by_feature(path, columns, self.merge_bounds)
        return write_frame(path, pl.DataFrame(dict(columns)))

    def _part(self, name: str, shard: int) -> int | None:
        """The number of a shard's part of a table; None if it has none."""
        if name.removeprefix("stats/") in OF_ALL:
            return shard
        first_other = self.cut.n_panel_shards
        if name == "compact":
            return shard - first_other if shard >= first_other else None
        return shard if shard < first_other else None


def _n_parts(plan: CodesPlan) -> dict[str, int]:
    """The number of parts of each run that shards write."""
    of_panel, of_all = plan.cut.n_panel_shards, plan.cut.n_shards
    return {
        **{f"stats/{name}": of_panel for name in OF_PANEL},
        **{f"stats/{name}": of_all for name in OF_ALL},
        "by_feature": of_panel,
        **({"compact": of_all - of_panel} if of_all > of_panel else {}),
        "by_cell": of_panel,
    }


def _joined(parts: list[npt.NDArray[Any]], dtype: type[np.generic]) -> npt.NDArray[Any]:
    return np.concatenate([np.empty(0, dtype), *parts])
