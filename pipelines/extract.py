"""Extraction: foundation-model activations of every token, by Ray actors, into Parquet shards.

One shard is a range of cells, or of those of a sample (`--cells`). An actor runs the model over it block by block
(`pipelines.forward`) up to the deepest requested site, and writes one Parquet file per site as it goes, so its memory
does not depend on the shard's size. Gene tokens are stored and special tokens (`<cls>`) are not. With `--readout`, one
vector per cell is stored instead; with `--vectors`, vectors that were given (`pipelines.external.extraction`).
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from feature_store.activations import ActivationWriter
from feature_store.cells import read_split_record, recorded_digests
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from feature_store.storage.plans import RANDOM_MODEL, ActivationsPlan
from pipelines.activations import (
    cells_of,
    create_activations,
    digest_of_sample,
    drawn_sample,
    sample_folder,
    write_data_set,
)
from pipelines.config import ExtractOptions
from pipelines.errors import UsageError
from pipelines.external.extraction import extract_vectors
from pipelines.forward import Cells, Forward, ForwardJob, out_of_memory_fact, rate
from pipelines.genes import (
    ChosenGenes,
    checked_genes,
    choose_variable_genes,
    long_cells,
    save_genes,
    tokens_that_go_in,
    with_genes,
)
from pipelines.inputs import (
    TOKENLESS,
    LoadedInputs,
    absolute_model_options,
    absolute_model_path,
    few_matched,
    load_named_model,
    match_inputs,
    matrix_facts,
    open_data,
    parse_sites,
    refuse_few_matched,
    save_model_location,
)
from pipelines.runtime.actor_pool import do_shards
from pipelines.runtime.checks import check_before_work
from pipelines.runtime.stage import Clock, StageResult
from pipelines.shard_size import ACTIVATIONS_SHARD, ITEMSIZE, cells_per_shard

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sae_core.scfm import FoundationModel, Site


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Everything an actor needs to compute any shard of an extraction; it holds plain values, so it can be pickled."""

    forward: ForwardJob
    sites: tuple[str, ...]
    folders: tuple[str, ...]
    dtype: str
    shard_cells: int
    n_cells: int
    sample: str | None
    """Folder of the table of the cells, if they are a sample."""


class Extractor:
    """Computes shards of a `Workload`; it is the body of an actor and can be called without Ray.

    Attributes:
        tokenless: cells of the latest shard that have no token.
    """

    def __init__(self, work: Workload) -> None:
        from sae_core.scfm import Site

        self.tokenless = 0
        self.work = work
        self.forward = Forward(work.forward)
        self.cells = cells_of(work.sample, work.n_cells)
        self.runs: dict[Site, commit.Run] = {
            Site.parse(name): commit.Run.open(folder) for name, folder in zip(work.sites, work.folders, strict=True)
        }

    def shard(self, number: int) -> dict[str, int]:
        """Compute and commit shard `number` at every site that lacks it; return the counts for the progress display."""
        cells = self.cells[number * self.work.shard_cells : (number + 1) * self.work.shard_cells]
        self.tokenless = 0
        missing = [site for site, run in self.runs.items() if run.committed(number) is None]
        before = self.forward.halvings
        markers: dict[Site, commit.ShardMarker] = {}
        # careful: another writer may commit one site meanwhile; the other sites must still be computed here
        while left := [site for site in missing if site not in markers]:
            self._commit(number, left, {}, markers, cells)
        return {
            "cells": len(cells),
            "tokens": max((marker.rows for marker in markers.values()), default=0),
            "tokenless": self.tokenless,
            "bytes": sum(marker.bytes for marker in markers.values()),
            "halvings": self.forward.halvings - before,
        }

    def _commit(
        self,
        number: int,
        sites: "Sequence[Site]",
        parts: "dict[Site, Path]",
        markers: "dict[Site, commit.ShardMarker]",
        cells: Cells,
    ) -> int:
        """Open a part of each of `sites`, one inside the other, then fill them all in one pass; return the tokens."""
        if not sites:
            return self._fill(parts, cells)
        n_tokens = 0

        def write(path: Path) -> int:
            nonlocal n_tokens
            n_tokens = self._commit(number, sites[1:], {**parts, sites[0]: path}, markers, cells)
            return n_tokens

        start, stop = int(cells[0]), int(cells[-1]) + 1
        markers[sites[0]] = self.runs[sites[0]].commit_shard(number, write, start=start, stop=stop)
        return n_tokens

    def _fill(self, parts: "dict[Site, Path]", cells: Cells) -> int:
        """Write the activations of the cells to one file a site; return the tokens."""
        job, model = self.work.forward, self.forward.model
        width = model.d_model if job.readout is None else model.width(job.readout)
        n_tokens, used = 0, 0
        with ExitStack() as stack:
            writers = {}
            for site, path in parts.items():
                metadata = {"site": str(site), "plan_sha": self.runs[site].plan_sha, "dtype": self.work.dtype}
                writers[site] = stack.enter_context(ActivationWriter(path, width, metadata))
            for block in self.forward.blocks(cells, tuple(parts)):
                for site, writer in writers.items():
                    writer.write(block.cell_idx, block.token_pos, block.gene_id, block.act[site])
                n_tokens += block.n_tokens
                # the tokens of a cell are in one block
                used += len(np.unique(block.cell_idx))
        self.tokenless = len(cells) - used
        return n_tokens


def extract(
    options: ExtractOptions,
    store: Path,
    *,
    address: str | None = None,
    dataset: str | None = None,
    genes: ChosenGenes | None = None,
) -> list[StageResult]:
    """Extract activations at every requested site, one run per site, or store given vectors; calling it again resumes.

    `dataset` and `genes` are those of another run, instead of what the options say of the columns and the genes.

    Raises:
        InputError, VocabularyError, CheckpointError, UsageError: data, model, vectors or options are wrong; nothing is
            written.
    """
    if options.vectors is not None:
        return [extract_vectors(options, store, address=address)]
    clock = Clock()
    layout = Layout(store)
    check_before_work(layout, address=address)
    source = open_data(options, options if dataset is None else None, known_digest=recorded_digests(layout))
    model = load_named_model(options)
    sites = parse_sites(options.layer, model)
    _check_readout(options, model, sites)
    inputs = match_inputs(source, model)
    refuse_few_matched(inputs, options.min_matched_share)
    genes = genes or checked_genes(options, inputs)
    dataset, by_schema = write_data_set(
        layout, inputs.source, options, actors=options, seed=options.seed, known_as=dataset, address=address
    )
    if genes is None and (n := options.n_variable_genes) is not None:
        genes = choose_variable_genes(layout, inputs, dataset, n, options, address=address)
    inputs = with_genes(inputs, genes)
    sample = drawn_sample(layout, dataset, options.cells, n_cells=inputs.source.n_cells, seed=options.seed)
    runs = [_create_run(layout, options, inputs, sample, genes, dataset=dataset, site=site) for site in sites]
    pending = sorted({shard for run in runs for shard in run.pending()})
    total: Mapping[str, int] = {}
    if pending:
        work = Workload(
            forward=forward_job(options, inputs, cells=str(layout.cells_dir(dataset))),
            sites=tuple(str(site) for site in sites),
            folders=tuple(str(run.path.resolve()) for run in runs),
            dtype=options.dtype,
            shard_cells=ActivationsPlan.of(runs[0]).shard_cells,
            n_cells=ActivationsPlan.of(runs[0]).n_cells,
            sample=sample_folder(runs[0]),
        )
        with ExitStack() as driving:
            for run in runs:
                driving.enter_context(run.exclusive())
            total = do_shards(Extractor, work, pending, options, title="extract", note=rate, address=address)
    for run in runs:
        run.finalize()
    facts = {
        "dataset": dataset,
        "cells": inputs.source.n_cells,
        **({} if sample is None else {"activations": f"of a sample of {len(sample):,} cells"}),
        **matrix_facts(inputs.source),
        **by_schema,
        "splits": read_split_record(layout.cells_dir(dataset)).text,
        "genes matched": f"{inputs.match.n_matched} of {inputs.source.n_genes}",
        **({} if genes is None else {"genes chosen": genes.fact}),
        **_warnings(inputs, total),
        **out_of_memory_fact(total),
    }
    return [
        StageResult(
            kind="activations",
            run=run.path.name,
            path=run.path,
            done=len(pending),
            reused=run.n_shards - len(pending),
            seconds=clock.seconds,
            facts={**facts, "site": str(site), "tokens": run.manifest().rows},
        )
        for site, run in zip(sites, runs, strict=True)
    ]


def _warnings(inputs: LoadedInputs, total: "Mapping[str, int]") -> dict[str, str]:
    """Return what is unusual about the cells: few matched genes although they were accepted, cells with more genes than
    the model takes, cells without tokens.
    """
    few = few_matched(inputs, ExtractOptions.model_fields["min_matched_share"].default)
    facts = {} if few is None else {"FEW GENES MATCHED": few}
    if (longer := long_cells(inputs)) is not None:
        facts["LONGER THAN THE INPUT"] = longer
    if n := total.get("tokenless", 0):
        facts["CELLS WITHOUT TOKENS"] = (
            f"{n:,} of {total['cells']:,} computed now, left out of every statistic; {TOKENLESS}"
        )
    return facts


def forward_job(options: ExtractOptions, inputs: LoadedInputs, *, cells: str | None = None) -> ForwardJob:
    """Return the job that describes the forward pass of an extraction; `cells` is the folder of the cell table."""
    return ForwardJob(
        data=inputs.source.places,
        matrix=inputs.source.matrix,
        where=inputs.source.where,
        rows=inputs.source.rows,
        model=absolute_model_path(options.model),
        model_options=absolute_model_options(options),
        random_init=options.random_init,
        precision=options.precision,
        device="cuda" if options.num_gpus > 0 else "cpu",
        tokens_per_cell=options.tokens_per_cell,
        readout=options.readout,
        seed=options.seed,
        batch_tokens=options.batch_tokens,
        genes=tokens_that_go_in(inputs),
        cells=cells,
    )


def _create_run(
    layout: Layout,
    options: ExtractOptions,
    inputs: LoadedInputs,
    sample: Cells | None,
    genes: ChosenGenes | None,
    *,
    dataset: str,
    site: "Site",
) -> commit.Run:
    """Create or reopen the activations run of one site; its plan holds only what determines its content.

    The token of each gene of the data set, the chosen genes and the present location of the model are written beside
    it.
    """
    width = inputs.model.d_model if options.readout is None else inputs.model.width(options.readout)
    n_cells = inputs.source.n_cells if sample is None else len(sample)
    shard_cells = cells_per_shard(
        options,
        mean_tokens=inputs.mean_tokens,
        n_cells=n_cells,
        default=ACTIVATIONS_SHARD,
        row_bytes=width * ITEMSIZE[options.dtype],
        rows_per_cell=options.tokens_per_cell if options.readout is None else 1,
    )
    plan = ActivationsPlan(
        control_of=RANDOM_MODEL if options.random_init else None,
        origin="model",
        dataset=dataset,
        cells=digest_of_sample(sample),
        genes=None if genes is None else genes.record,
        model=inputs.model.name,
        model_digest=inputs.model.digest,
        site=str(site),
        d_model=width,
        dtype=options.dtype,
        precision=options.precision,
        tokens_per_cell=options.tokens_per_cell,
        readout=options.readout,
        seed=options.seed,
        n_cells=n_cells,
        shard_cells=shard_cells,
    )
    run = create_activations(layout, plan, sample)
    save_genes(run, genes)
    save_model_location(run, options, inputs)
    return run


def _check_readout(options: ExtractOptions, model: "FoundationModel", sites: "Sequence[Site]") -> None:
    """Raise UsageError if the model cannot give one vector per cell by the requested readout."""
    if options.readout is None:
        return
    if options.readout not in model.readouts:
        raise UsageError(f"--readout was {options.readout!r}; {model.name} has {', '.join(model.readouts)}")
    inner = [str(site) for site in sites if site.kind in ("attention", "mlp")]
    if inner:
        raise UsageError(f"--layer was {inner[0]!r}; a cell's vector (--readout) is read at a layer, e.g. --layer 2")
