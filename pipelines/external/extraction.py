"""`scsae extract --vectors`: given vectors, one a cell, become an activations run; no model is opened.

The numbers are read twice: once by the command, which checks and hashes them before anything is written, and once by
the actors, which store them shard by shard.
"""

from dataclasses import dataclass
from pathlib import Path

from feature_store.activations import ActivationWriter
from feature_store.cells import read_split_record, recorded_digests
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from feature_store.storage.plans import ActivationsPlan
from pipelines.activations import (
    cells_of,
    create_activations,
    digest_of_sample,
    drawn_sample,
    sample_folder,
    write_data_set,
)
from pipelines.config import ExtractOptions
from pipelines.config.vectors import VectorsPlace
from pipelines.external.vector_files import Vectors
from pipelines.external.vectors import (
    SITE,
    GivenVectors,
    VectorsJob,
    VectorsLocation,
    checked_digest,
    open_vectors,
    save_vectors_location,
)
from pipelines.forward import rate
from pipelines.inputs import genes_without_tokens, matrix_facts, open_data, save_token_of_gene
from pipelines.runtime.actor_pool import do_shards
from pipelines.runtime.checks import check_before_work
from pipelines.runtime.stage import Clock, StageResult
from pipelines.shard_size import ACTIVATIONS_SHARD, ITEMSIZE, cells_per_shard


@dataclass(frozen=True, kw_only=True)
class VectorsWorkload:
    """Everything an actor needs to store any shard of given vectors; it holds plain values, so it can be pickled."""

    vectors: VectorsJob
    folder: str
    sample: str | None
    """Folder of the table of the cells, if they are a sample."""


class VectorsExtractor:
    """Stores shards of a `VectorsWorkload`; it is the body of an actor and can be called without Ray."""

    def __init__(self, work: VectorsWorkload) -> None:
        self.vectors = GivenVectors(work.vectors)
        self.run = commit.Run.open(work.folder)
        self.plan = ActivationsPlan.of(self.run)
        self.cells = cells_of(work.sample, self.plan.n_cells)

    def shard(self, number: int) -> dict[str, int]:
        """Store and commit shard `number` unless it is committed; return the counts for the progress display."""
        cells = self.cells[number * self.plan.shard_cells : (number + 1) * self.plan.shard_cells]
        counts = {"cells": len(cells), "tokens": 0, "bytes": 0, "halvings": 0}
        if self.run.committed(number):
            return counts
        metadata = {"site": self.plan.site, "plan_sha": self.run.plan_sha, "dtype": self.plan.dtype}

        def write(path: Path) -> int:
            with ActivationWriter(path, self.plan.d_model, metadata) as writer:
                for block in self.vectors.blocks(cells):
                    writer.write(block.cell_idx, block.token_pos, block.gene_id, block.act)
            return len(cells)

        start, stop = int(cells[0]), int(cells[-1]) + 1
        marker = self.run.commit_shard(number, write, start=start, stop=stop)
        return counts | {"tokens": marker.rows, "bytes": marker.bytes}


def extract_vectors(options: ExtractOptions, store: Path, *, address: str | None = None) -> StageResult:
    """Store the vectors that the options name as an activations run; calling it again resumes.

    Raises:
        InputError, UsageError: data, vectors or options are wrong; nothing is written.
    """
    clock = Clock()
    layout = Layout(store)
    check_before_work(layout, address=address)
    source = open_data(options, options, known_digest=recorded_digests(layout))
    place = VectorsPlace.parse(str(options.vectors)).absolute()
    vectors = open_vectors(str(place), source)
    digest = checked_digest(vectors, source, dtype=options.dtype)
    dataset, by_schema = write_data_set(layout, source, options, actors=options, seed=options.seed, address=address)
    sample = drawn_sample(layout, dataset, options.cells, n_cells=source.n_cells, seed=options.seed)
    n_cells = source.n_cells if sample is None else len(sample)
    plan = ActivationsPlan(
        control_of=None,
        origin="vectors",
        dataset=dataset,
        cells=digest_of_sample(sample),
        genes=None,
        model=options.source_name or place.name,
        model_digest=digest,
        site=SITE,
        d_model=vectors.width,
        dtype=options.dtype,
        precision="f32",
        tokens_per_cell=None,
        readout=None,
        seed=options.seed,
        n_cells=n_cells,
        shard_cells=cells_per_shard(
            options,
            mean_tokens=1.0,
            n_cells=n_cells,
            default=ACTIVATIONS_SHARD,
            row_bytes=vectors.width * ITEMSIZE[options.dtype],
            rows_per_cell=1,
        ),
    )
    run = create_activations(layout, plan, sample)
    save_vectors_location(run.path, VectorsLocation(str(place), digest))
    save_token_of_gene(run.path, genes_without_tokens(source), run.plan_sha)
    pending = run.pending()
    if pending:
        work = VectorsWorkload(
            vectors=VectorsJob(
                data=source.places,
                matrix=source.matrix,
                where=source.where,
                vectors=str(place),
                dtype=options.dtype,
            ),
            folder=str(run.path.resolve()),
            sample=sample_folder(run),
        )
        with run.exclusive():
            do_shards(VectorsExtractor, work, pending, options, title="extract", note=rate, address=address)
    run.finalize()
    return StageResult(
        kind="activations",
        run=run.path.name,
        path=run.path,
        done=len(pending),
        reused=run.n_shards - len(pending),
        seconds=clock.seconds,
        facts={
            "dataset": dataset,
            "cells": source.n_cells,
            **({} if sample is None else {"activations": f"of a sample of {len(sample):,} cells"}),
            **matrix_facts(source),
            **by_schema,
            **vectors_facts(vectors, plan.model),
            "splits": read_split_record(layout.cells_dir(dataset)).text,
            "site": SITE,
            "tokens": run.manifest().rows,
        },
    )


def vectors_facts(vectors: Vectors, name: str) -> dict[str, str]:
    """Return what the vectors are: the model that they are said to be of, where they are, and how they were joined."""
    joined = {"joined": vectors.joined} if vectors.joined else {}
    return {"vectors": f"{vectors.width} numbers a cell, {vectors.where}", **joined, "said to be of": name}
