"""Writes the tables of a steering run that actors make in shards, and finds the shards that are complete."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from feature_store.storage import commit
from feature_store.storage.plans import SteeringPlan
from pipelines.runtime.actor_pool import do_shards
from pipelines.steering.actors import SteerJob
from pipelines.steering.context import Cells
from pipelines.steering.group_means import MeansTable, group_of_cells, means_frame
from pipelines.steering.labels import CellLabels
from pipelines.steering.plan import Variant, variants_frame
from pipelines.steering.request import SteeringRequest
from pipelines.steering.token_sample import (
    TOKEN_SHARD_CELLS,
    TokenSample,
    TokenSampleJob,
    TokenSampler,
    read_token_sample,
)

SHARD_CELLS = 64
"""Number of cells that an actor steers between two commits."""


class GroupMeansRun(NamedTuple):
    """A finished run of group means, and the features of the columns of each of its parts."""

    run: commit.Run
    features: tuple[tuple[int, ...], ...]


class ShardedTables:
    """The sharded tables of one steering run.

    Attributes:
        n_done, n_reused: the numbers of shards that this call made, and that it found complete.
    """

    def __init__(self, request: SteeringRequest, folder: Path, plan: SteeringPlan, address: str | None) -> None:
        self.request, self.folder, self.plan, self.address = request, folder, plan, address
        self.n_done = self.n_reused = 0

    def token_sample(self, cells: Cells) -> TokenSample:
        """The token codes and mean activations of some cells."""
        n_shards = -(-len(cells) // TOKEN_SHARD_CELLS)
        codes, means = (
            commit.Run.create(self.folder / "survey" / name, self.plan.table(name, n_shards=n_shards))
            for name in ("codes", "means")
        )
        job = TokenSampleJob(
            paths=self.request.paths(),
            codes=str(codes.path.resolve()),
            means=str(means.path.resolve()),
            cells=cells,
            shard_cells=TOKEN_SHARD_CELLS,
        )
        self._do(TokenSampler, job, (codes, means), title="token sample")
        return read_token_sample(codes.path, means.path, self.request.features.height)

    def group_means(
        self, name: str, features: tuple[tuple[int, ...], ...], part: Callable[[int], MeansTable]
    ) -> GroupMeansRun:
        """The group means of a split, one part for each tuple of features; `part` makes the rows of one."""
        plan = self.plan.table("references", n_shards=len(features), of=name, features=features)
        run = commit.Run.create(self.folder / "references" / name, plan)
        for number in run.pending():
            frame = means_frame(part(number))
            run.commit_shard(number, partial(commit.write_frame, frame=frame), start=number, stop=number + 1)
        run.finalize()
        return GroupMeansRun(run, features)

    def steered(
        self, worker: type, table: str, cells: Cells, variants: tuple[Variant, ...], means: GroupMeansRun | None
    ) -> commit.Run:
        """The run of a table of cells under variants, which `worker` makes."""
        request = self.request
        rows = pl.DataFrame({"cell_idx": cells}).join(request.cells, on="cell_idx", how="left", maintain_order="left")
        labels = CellLabels.of(rows, request.task.kind)
        n_shards = -(-len(cells) // SHARD_CELLS)
        listed = variants_frame(variants)
        plan = self.plan.table(
            table,
            n_shards=n_shards,
            variants=listed.to_dicts(),
            references=None if means is None else means.run.manifest().sha,
        )
        run = commit.Run.create(self.folder / table, plan)
        job = SteerJob(
            paths=request.paths(),
            run=str(run.path.resolve()),
            group_means=None if means is None else str(means.run.path.resolve()),
            group_mean_features=() if means is None else means.features,
            variants=variants,
            cells=cells,
            steered=request.is_steered(cells) & (labels.split != "train"),
            group=group_of_cells(labels, request.task, request.by),
            scale=tuple(request.features["p99"].fill_null(0.0).to_list()),
            genes=request.gene_ids,
            readout=request.readout,
            shard_cells=SHARD_CELLS,
        )
        self._do(worker, job, (run,), title=table.replace("_", " "))
        return run

    def _do(self, worker: type, job: Any, runs: Sequence[commit.Run], *, title: str) -> None:
        """Make the shards that any of the runs lacks, and finish the runs."""
        pending = sorted({shard for run in runs for shard in run.pending()})
        if pending:
            with runs[0].exclusive():
                do_shards(worker, job, pending, self.request.options, title=title, note=_count, address=self.address)
        for run in runs:
            run.finalize()
        self.n_done += len(pending)
        self.n_reused += runs[0].n_shards - len(pending)


def _count(total: Mapping[str, int], _seconds: float) -> str:
    return f"{total['cells']} cells under {total['variants'] // max(total['shards'], 1)} variants"
