"""The statistics of the features over all cells, merged from those of the shards, one range of features at a time.

    merged/feature_token/    token_top: the top-activating tokens of each feature
    merged/feature_cell/     the cells with the largest codes of each feature
    merged/firing/           feature_firing: cells and tokens in which each feature fires

All are exact: the largest of all cells are among the largest of the shards. The row groups of the shards' tables end at
the ranges, so each row is read once. Memory holds some MERGED_ROWS rows beside what is merged.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import polars as pl

from feature_store.codes.codes_run import CodesRun
from feature_store.codes.parquet import read_row_groups
from feature_store.errors import IntegrityError, NotFoundError, OutdatedRunError
from feature_store.storage import schemas
from feature_store.storage.commit import Run, write_frame
from feature_store.storage.layout import MERGED_TABLES
from feature_store.storage.plans import MergedPlan

MERGED_ROWS = 500_000
Merge = Callable[[pl.DataFrame], pl.DataFrame]


class Merging:
    """The runs merged/ of a codes folder, whose parts any number of processes may write.

    Runs that were begun keep their bounds, which decide nothing but the memory. IncompleteRunError if the tables of the
    shards are not finished.
    """

    def __init__(self, folder: str | Path) -> None:
        self.codes = CodesRun.open(folder)
        self.bounds = _begun_with(self.codes.folder) or self.codes.merge_bounds
        self._shards = {name: self.codes.tables[f"stats/{name}"] for name in MERGED_TABLES}
        plan = MergedPlan(
            codes=self.codes.plan.id,
            made_of={name: run.manifest().sha for name, run in self._shards.items()},
            bounds=tuple(self.bounds),
        )
        self.runs = {
            name: Run.create(self.codes.folder / "merged" / name, plan.table(name, n_shards=len(self.bounds) - 1))
            for name in MERGED_TABLES
        }

    def pending(self) -> list[int]:
        """The ranges of which a table is not committed, ascending."""
        return sorted({number for run in self.runs.values() for number in run.pending()})

    def write(self, number: int) -> int:
        """Merge and commit one range; return the number of its features."""
        plan = self.codes.plan
        start, stop = self.bounds[number : number + 2]
        merges: dict[str, Merge] = {
            "feature_token": partial(_largest, n=plan.top_tokens, ties=["cell_idx", "token_pos"]),
            "feature_cell": partial(_largest, n=plan.top_cells, ties=["cell_idx"]),
            "firing": _sum,
        }
        for name, run in self.runs.items():
            if run.committed(number) is None:
                merged = self._merged(name, merges[name], start, stop)
                run.commit_shard(number, partial(write_frame, frame=merged), start=start, stop=stop)
        return stop - start

    def finalize(self) -> None:
        """Finish the runs. IncompleteRunError names missing ranges."""
        for run in self.runs.values():
            run.finalize()

    def _merged(self, name: str, merge: Merge, start: int, stop: int) -> pl.DataFrame:
        run = self._shards[name]
        # every read checks its pages, so only the footers need a check here
        paths = run.checked_parts(max_bytes=0)
        waiting: list[pl.DataFrame] = []
        for path in paths:
            waiting.append(read_row_groups(path, "feature_id", start, stop)[0])
            # the first is merged already
            if sum(part.height for part in waiting[1:]) >= MERGED_ROWS:
                waiting = [merge(pl.concat(waiting))]
        merged = merge(pl.concat(waiting))
        if name == "firing":
            names = pl.col("split").replace_strict(dict(enumerate(schemas.SPLITS)), return_dtype=pl.String)
            merged = merged.with_columns(names)
        return schemas.conform({"feature_token": "token_top", "firing": "feature_firing"}.get(name, name), merged)


def build_merged(folder: str | Path) -> None:
    """Build merged/ of a codes folder in this process. IncompleteRunError if the shards are not finished."""
    merging = Merging(folder)
    for number in merging.pending():
        merging.write(number)
    merging.finalize()


def _begun_with(folder: Path) -> list[int] | None:
    """The bounds of runs that were begun."""
    with suppress(NotFoundError, IntegrityError, OutdatedRunError):
        return list(MergedPlan.of(Run.open(folder / "merged" / MERGED_TABLES[0])).bounds)
    return None


def _largest(rows: pl.DataFrame, *, n: int, ties: list[str]) -> pl.DataFrame:
    """The n largest values of each feature; of equal ones the first in the order of `ties`."""
    order = ["feature_id", "value", *ties]
    falling = [name == "value" for name in order]
    return rows.sort(order, descending=falling).group_by("feature_id", maintain_order=True).head(n)


def _sum(rows: pl.DataFrame) -> pl.DataFrame:
    by = ["feature_id", "split"]
    return rows.group_by(by).agg(pl.col("n_cells", "n_tokens").sum(), pl.col("max").max()).sort(by)
