"""The tables `genes` and `digests` of a large data set, by Ray actors that share one pass over its matrix.

    <root>/matrices/<id>/{sums,digests}/      a part for each range of cells

The parts depend on the content of the files and the matrix alone, because the digests are needed before the splits and
so before the data set has a name. They are committed, so a killed pass resumes; the folder is removed once the tables
of the data set are complete. A data set of one shard (`gene_table.ONE_SHARD_CELLS`) is passed over in this process.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from feature_store.cells import (
    MakeTables,
    MatrixPass,
    MatrixTables,
    Source,
    gene_table_of,
    matrix_tables,
    open_source,
    shard_cells,
    shard_range,
)
from feature_store.errors import BusyError
from feature_store.storage import commit, filesystem
from feature_store.storage.addresses import RemotePath
from feature_store.storage.layout import PLAN, Layout
from feature_store.storage.plans import MatrixPlan
from pipelines.config import ActorOptions
from pipelines.inputs import turn_once
from pipelines.runtime.actor_pool import do_shards

SUMS, DIGESTS = "sums", "digests"


@dataclass(frozen=True, kw_only=True)
class MatrixJob:
    """The files of a data set, and the runs of the sums by gene and of the digests of its cells."""

    data: tuple[str | RemotePath, ...]
    matrix: str
    where: str | None
    rows: tuple[str, ...]
    sums: str
    digests: str


class MatrixReader:
    """Computes shards of a `MatrixJob`; it is the body of an actor and can be called without Ray."""

    def __init__(self, job: MatrixJob) -> None:
        self.matrix_pass = MatrixPass(open_source(job.data, matrix=job.matrix, where=job.where, rows=job.rows))
        self.sums, self.digests = commit.Run.open(job.sums), commit.Run.open(job.digests)
        self.plan = MatrixPlan.of(self.sums)

    def shard(self, number: int) -> dict[str, int]:
        """Check and commit the cells of shard `number` unless they are committed; return the progress counts."""
        start, stop = shard_range(number, self.plan.n_cells, self.plan.shard_cells)
        if not all(run.committed(number) for run in (self.sums, self.digests)):
            found = self.matrix_pass.shard(start, stop)
            for run, frame in ((self.sums, found.sums), (self.digests, found.digests)):
                run.commit_shard(number, partial(commit.write_frame, frame=frame), start=start, stop=stop)
        return {"cells": stop - start}


@contextmanager
def tables_by_actors(
    layout: Layout, source: Source, options: ActorOptions, *, address: str | None = None
) -> Iterator[MakeTables]:
    """Yield what `write_cells` makes the tables of a source with; what it leaves is removed if the block succeeds.

    The tables raise InputError for an impossible value, as `matrix_tables`, and the errors of `do_shards`.
    """
    size = shard_cells(source.n_cells)
    if source.n_cells <= size:

        def make_here(source: Source) -> MatrixTables:
            turn_once(layout, source)
            return matrix_tables(source)

        yield make_here
        return
    with ExitStack() as lock:

        def make(source: Source) -> MatrixTables:
            turn_once(layout, source)
            plan = _plan(source)
            folder = layout.matrix_dir(plan.id)
            lock.enter_context(commit.exclusive(folder))
            return _make(source, plan, folder, options, address=address)

        yield make
    folder = layout.matrix_dir(_plan(source).id)
    # it is there, too, if a process was killed after its last table
    if filesystem.size_bytes(folder / SUMS / PLAN) is not None:
        # another process that works on it removes it
        with suppress(BusyError), commit.exclusive(folder):
            filesystem.remove_folder(folder)


def _plan(source: Source) -> MatrixPlan:
    return MatrixPlan(
        digest=source.digest,
        matrix=source.matrix,
        n_cells=source.n_cells,
        shard_cells=shard_cells(source.n_cells),
    )


def _make(
    source: Source, plan: MatrixPlan, folder: Path, options: ActorOptions, *, address: str | None
) -> MatrixTables:
    sums, digests = (
        commit.Run.create(folder / name, plan.table(name, n_shards=plan.n_shards)) for name in (SUMS, DIGESTS)
    )
    job = MatrixJob(
        data=source.places,
        matrix=source.matrix,
        where=source.where,
        rows=source.rows,
        sums=str(sums.path.resolve()),
        digests=str(digests.path.resolve()),
    )
    # a pass over a matrix uses neither a GPU nor several threads
    one_core = ActorOptions(num_actors=options.num_actors)
    pending = sorted({*sums.pending(), *digests.pending()})
    do_shards(MatrixReader, job, pending, one_core, title="check values", note=_cells_done, address=address)
    for run in (sums, digests):
        run.finalize()
    return MatrixTables(
        genes=gene_table_of(source, map(commit.read_part, sums.checked_parts())),
        n_shards=plan.n_shards,
        digests_of=lambda shard: commit.read_part(digests.checked_part(shard)),
    )


def _cells_done(total: Mapping[str, int], seconds: float) -> str:
    return f"{total['cells'] / max(seconds, 1e-9):,.0f} cells/s"
