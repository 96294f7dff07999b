"""Encoding: activations into sparse codes and token statistics, by Ray actors, shard by shard.

The activations are read from a store, or computed by the foundation model in the same actor (fused), so that an atlas
is encoded without writing its activations to disk. Both ways give the codes run the same bytes: fresh activations are
rounded to the dtype in which the SAE's activations were stored, and encoded in the same pieces. A token's code depends
on that token alone (the threshold encoder). Tokens are pooled to cell codes and counted by gene. At the end the cell
codes are sorted into the by-feature copy, by actors if that takes more than one pass over them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from scipy import sparse

from feature_store.activations import ROW_GROUP_ROWS, ActivationBlock, ActivationReader, to_stored
from feature_store.cells import SplitConfig, open_source, read_split_record, read_splits, write_cells
from feature_store.codes import ByFeature, CodesRun, TokenCodes
from feature_store.codes.codes_run import TOP_TOKENS
from feature_store.query.runs import resolve_run
from feature_store.storage import commit
from feature_store.storage.layout import Layout, as_path
from feature_store.storage.plans import ActivationsPlan, CodesPlan, FusedForward, SAEPlan
from pipelines.config import ActorOptions, CellOptions, EncodeOptions, ForwardOptions
from pipelines.forward import Forward, ForwardJob, out_of_memory_fact, rate
from pipelines.inputs import (
    LoadedInputs,
    load_model_location,
    load_recorded_model,
    load_recorded_source,
    load_stored_sae,
    match_inputs,
    refuse_few_matched,
    save_source_location,
    save_token_of_gene,
    tokenless_fact,
)
from pipelines.moved_data import record_if_same
from pipelines.runtime.actor_pool import do_shards
from pipelines.runtime.checks import check_before_work
from pipelines.runtime.progress import delayed_progress_bar
from pipelines.runtime.stage import Clock, StageResult
from pipelines.shard_size import cells_per_shard

CODE_BYTES = 8
"""Bytes that one nonzero of a token's code takes in memory, for its value and its feature."""
DEFAULT_SHARD = "128MB"
KEY_DTYPES = {"cell_idx": np.int64, "token_pos": np.int32, "gene_id": np.int32}


@dataclass(frozen=True, kw_only=True)
class FusedJob:
    """The forward pass of a fused encoding, the site of its activations and the dtype they are rounded to."""

    forward: ForwardJob
    site: str
    dtype: str
    shard_cells: int
    n_cells: int


@dataclass(frozen=True, kw_only=True)
class EncodeJob:
    """Everything an actor needs to encode any shard; it holds plain values, so it can be pickled."""

    source: str | FusedJob
    """Folder of the stored activations, or the forward pass that makes them."""
    sae: str
    cells: str
    codes: str
    device: str


class Activations(Protocol):
    """The source from which an encoder takes the activations of a shard."""

    @property
    def halvings(self) -> int:
        """Number of times that memory ran out."""

    def extent(self, shard: int) -> tuple[int, int]:
        """Cells [start, stop) of a shard."""

    def blocks(self, shard: int) -> Iterator[ActivationBlock]:
        """The tokens of a shard, in order, in pieces of ROW_GROUP_ROWS."""


class StoredActivations:
    """Activations read from the parts of an activations run."""

    halvings = 0

    def __init__(self, folder: str) -> None:
        self.run = commit.Run.open(folder)
        self.reader = ActivationReader(self.run)
        self.shards = self.run.manifest().shards

    def extent(self, shard: int) -> tuple[int, int]:
        """See Activations."""
        return self.shards[shard].start, self.shards[shard].stop

    def blocks(self, shard: int) -> Iterator[ActivationBlock]:
        """See Activations."""
        for group in self.reader.row_groups:
            if group.shard == shard:
                yield self.reader.read(shard, group.group)


class FreshActivations:
    """Activations that the foundation model computes for the shard's cells."""

    def __init__(self, job: FusedJob) -> None:
        from sae_core.scfm import Site

        self.job = job
        self.site = Site.parse(job.site)
        self.forward = Forward(job.forward)

    @property
    def halvings(self) -> int:
        """Number of times that memory ran out."""
        return self.forward.halvings

    def extent(self, shard: int) -> tuple[int, int]:
        """See Activations."""
        start = shard * self.job.shard_cells
        return start, min(start + self.job.shard_cells, self.job.n_cells)

    def blocks(self, shard: int) -> Iterator[ActivationBlock]:
        """See Activations."""
        waiting: list[tuple[Any, ...]] = []
        for block in self.forward.blocks(*self.extent(shard), (self.site,)):
            act = to_stored(block.act[self.site], self.job.dtype)
            waiting.append((block.cell_idx, block.token_pos, block.gene_id, act))
            if sum(len(part[0]) for part in waiting) >= ROW_GROUP_ROWS:
                *whole, rest = _pieces(waiting)
                yield from whole
                waiting = [(rest.cell_idx, rest.token_pos, rest.gene_id, rest.act)]
        yield from (piece for piece in _pieces(waiting) if len(piece.cell_idx))


def _pieces(parts: list[tuple[Any, ...]]) -> list[ActivationBlock]:
    """Split the tokens of `parts` into pieces of ROW_GROUP_ROWS; the last piece holds the rest and may be empty."""
    if not parts:
        return []
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    pieces = []
    for low in range(0, len(columns[0]) + 1, ROW_GROUP_ROWS):
        cell_idx, token_pos, gene_id, act = (column[low : low + ROW_GROUP_ROWS] for column in columns)
        pieces.append(ActivationBlock(cell_idx=cell_idx, token_pos=token_pos, gene_id=gene_id, act=act))
    return pieces


class Encoder:
    """Computes shards of an `EncodeJob`; it is the body of an actor and can be called without Ray."""

    def __init__(self, job: EncodeJob) -> None:
        self.activations: Activations = (
            FreshActivations(job.source) if isinstance(job.source, FusedJob) else StoredActivations(job.source)
        )
        self.sae = load_stored_sae(as_path(job.sae), device=job.device)
        self.device = job.device
        self.codes = CodesRun.open(job.codes)
        self.split = read_splits(job.cells)

    def shard(self, number: int) -> dict[str, int]:
        """Encode and commit shard `number` unless it is committed; return the counts for the progress display."""
        start, stop = self.activations.extent(number)
        counts = {"cells": stop - start, "tokens": 0, "bytes": 0, "halvings": 0}
        runs = (self.codes.by_cell, *self.codes.statistics.values())
        if all(run.committed(number) for run in runs):
            return counts
        before = self.activations.halvings
        tokens = self._encode(number)
        marker = self.codes.commit_shard(number, tokens, start=start, stop=stop, split_of_cell=self.split)
        halvings = self.activations.halvings - before
        return counts | {"tokens": tokens.n_tokens, "bytes": marker.bytes, "halvings": halvings}

    def _encode(self, number: int) -> TokenCodes:
        """Return the token codes of one shard; activations are released piece by piece."""
        import torch

        keys: dict[str, list[Any]] = {name: [np.empty(0, dtype)] for name, dtype in KEY_DTYPES.items()}
        parts = [sparse.csr_array((0, self.sae.config.n_features), dtype=np.float32)]
        for block in self.activations.blocks(number):
            found = self.sae.encode(torch.from_numpy(np.array(block.act_f32())).to(self.device))
            arrays = (found.value.cpu().numpy(), found.col.cpu().numpy(), found.crow.cpu().numpy())
            parts.append(sparse.csr_array(arrays, shape=(found.n_tokens, found.n_features)))
            for name in KEY_DTYPES:
                keys[name].append(getattr(block, name))
        return TokenCodes(
            **{name: np.concatenate(keys[name]) for name in KEY_DTYPES}, codes=sparse.vstack(parts, format="csr")
        )


@dataclass(frozen=True, kw_only=True)
class SortJob:
    """The job that makes the by-feature copy: the codes folder, and the buckets [first, stop) of each shard."""

    codes: str
    groups: tuple[tuple[int, int], ...]


class Sorter:
    """Computes shards of a `SortJob`; it is the body of an actor and can be called without Ray."""

    def __init__(self, job: SortJob) -> None:
        self.groups = job.groups
        self.by_feature = ByFeature(job.codes)

    def shard(self, number: int) -> dict[str, int]:
        """Sort and commit the buckets of group `number`; return the number of nonzeros."""
        return {"nonzeros": self.by_feature.write(*self.groups[number])}


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """The cells to encode: their part of the codes plan, and the source of their activations.

    `inputs` holds data and model of a fused encoding, whose matched genes are written beside the codes, else None.
    """

    dataset: str
    n_shards: int
    source: str | FusedJob
    fused: FusedForward | None
    inputs: LoadedInputs | None


def encode(options: EncodeOptions, store: Path, *, address: str | None = None) -> StageResult:
    """Encode the SAE's stored activations, or any cells by running the foundation model; calling it again resumes.

    Raises:
        NotFoundError: there is no SAE, or its activations are gone.
        UsageError, InputError: the foundation model or the data set changed, or the data are invalid.
    """
    clock = Clock()
    layout = Layout(store)
    check_before_work(layout, address=address)
    sae = commit.Run.open(resolve_run(layout, "saes", options.sae, option="--sae").path)
    of_sae = SAEPlan.of(sae)
    activations = commit.Run.open(layout.activations_dir(of_sae.activations))
    options = _without_moved_data(layout, options, of_sae.dataset)
    what = (
        _plan_fused(layout, options, of_sae, activations)
        if options.fused or options.data
        else _plan_stored(activations)
    )
    plan = CodesPlan(
        control_of=of_sae.control_of,
        sae=sae.path.name,
        sae_manifest=sae.manifest().sha,
        activations=activations.path.name,
        dataset=what.dataset,
        n_features=of_sae.n_features,
        pooling=options.pooling,
        level=options.level,
        top_tokens=TOP_TOKENS,
        fused=what.fused,
    )
    codes = CodesRun.create(layout.codes_dir(plan.id), plan, n_shards=what.n_shards)
    if what.inputs is not None:
        save_token_of_gene(codes.folder, what.inputs, codes.by_cell.plan_sha)
    pending = codes.pending()
    total: Mapping[str, int] = {}
    if pending:
        job = EncodeJob(
            source=what.source,
            sae=str(sae.path.resolve()),
            cells=str(layout.cells_dir(what.dataset).resolve()),
            codes=str(codes.folder.resolve()),
            device="cuda" if options.num_gpus > 0 else "cpu",
        )
        with codes.by_cell.exclusive():
            total = do_shards(Encoder, job, pending, options, title="encode", note=rate, address=address)
    manifest = codes.finalize_shards()
    sort_by_feature(codes.folder, options, address=address)
    return StageResult(
        kind="codes",
        run=codes.folder.name,
        path=codes.folder,
        done=len(pending),
        reused=what.n_shards - len(pending),
        seconds=clock.seconds,
        facts={
            "dataset": what.dataset,
            **({"splits": read_split_record(layout.cells_dir(what.dataset)).text} if options.data else {}),
            "nonzeros": manifest.rows,
            "bytes a nonzero": round(manifest.bytes / max(manifest.rows, 1), 2),
            **tokenless_fact(layout, codes),
            **out_of_memory_fact(total),
        },
    )


def sort_by_feature(folder: Path, options: ActorOptions, *, address: str | None = None) -> None:
    """Build by_feature/ of a codes folder, in this process if one pass is enough, else by actors; it can be resumed.

    Raises:
        IncompleteRunError: by_cell is not complete.
        BusyError, RunFailedError: see `encode`.
    """
    by_feature = ByFeature(folder)
    groups = tuple(by_feature.groups())
    if len(groups) > 1:
        job = SortJob(codes=str(folder.resolve()), groups=groups)
        without_gpu = options.model_copy(update={"num_gpus": 0.0})
        with by_feature.run.exclusive():
            do_shards(
                Sorter, job, range(len(groups)), without_gpu, title="by feature", note=_sorting_rate, address=address
            )
    else:
        for first, stop in groups:
            by_feature.write(first, stop)
    by_feature.finalize()


def _sorting_rate(total: Mapping[str, int], seconds: float) -> str:
    return f"{total['nonzeros'] / seconds:,.0f} nonzeros/s"


def _without_moved_data(layout: Layout, options: EncodeOptions, dataset: str) -> EncodeOptions:
    """Return the options without `data` if these are the SAE's own data at a new place, which is then recorded."""
    fields = EncodeOptions.model_fields
    columns = ("matrix", *CellOptions.model_fields)
    if not options.data or any(getattr(options, name) != fields[name].default for name in columns):
        return options
    if not record_if_same(layout, dataset, options.data):
        return options
    # options of a forward pass ask for one
    of_forward = set(ForwardOptions.model_fields) - set(ActorOptions.model_fields)
    fused = any(getattr(options, name) != fields[name].default for name in of_forward)
    return options.model_copy(update={"data": (), "fused": options.fused or fused})


def _plan_stored(activations: commit.Run) -> _Plan:
    return _Plan(
        dataset=ActivationsPlan.of(activations).dataset,
        n_shards=activations.n_shards,
        source=str(activations.path.resolve()),
        fused=None,
        inputs=None,
    )


def _plan_fused(layout: Layout, options: EncodeOptions, sae: SAEPlan, activations: commit.Run) -> _Plan:
    """Open the model and the data, write the cell table of new data, and divide the cells into shards."""
    trained_on = ActivationsPlan.of(activations)
    model = load_recorded_model(activations)
    if options.data:
        source = open_source(options.data, matrix=options.matrix, progress=delayed_progress_bar)
    else:
        source = load_recorded_source(layout, trained_on.dataset, stage="encode --fused")
    inputs = match_inputs(source, model)
    dataset = trained_on.dataset
    if options.data:
        refuse_few_matched(inputs, options.min_matched_share)
        cells = write_cells(
            layout,
            source,
            donor=options.donor,
            batch=options.batch,
            cell_type=options.cell_type,
            labels=options.label,
            split=SplitConfig(seed=trained_on.seed, by=options.split_by),
            split_column=options.split,
            panel=options.panel,
            trained_on=trained_on.dataset,
        )
        dataset = str(cells["dataset"][0])
        save_source_location(layout, dataset, source)
    readout = trained_on.readout
    shard_cells = cells_per_shard(
        options,
        inputs,
        default=DEFAULT_SHARD,
        row_bytes=sae.k * CODE_BYTES,
        rows_per_cell=options.tokens_per_cell if readout is None else 1,
    )
    place = load_model_location(activations)
    forward = ForwardJob(
        data=tuple(str(path.resolve()) for path in source.paths),
        matrix=source.matrix,
        model=place.model,
        of_family=place.of_family,
        random_init=place.random_init,
        precision=place.precision,
        device="cuda" if options.num_gpus > 0 else "cpu",
        tokens_per_cell=options.tokens_per_cell,
        readout=readout,
        seed=trained_on.seed,
        batch_tokens=options.batch_tokens,
    )
    fused = FusedForward(
        model_digest=model.digest,
        site=trained_on.site,
        dtype=trained_on.dtype,
        precision=place.precision,
        readout=readout,
        tokens_per_cell=options.tokens_per_cell,
        seed=trained_on.seed,
        matrix=source.matrix,
        shard_cells=shard_cells,
    )
    job = FusedJob(
        forward=forward,
        site=trained_on.site,
        dtype=trained_on.dtype,
        shard_cells=shard_cells,
        n_cells=source.n_cells,
    )
    return _Plan(dataset=dataset, n_shards=-(-source.n_cells // shard_cells), source=job, fused=fused, inputs=inputs)
