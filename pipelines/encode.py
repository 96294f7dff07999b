"""Encoding: activations into sparse codes and statistics, by Ray actors, shard by shard.

The activations are read from a store, or computed by the foundation model in the same actor (fused), so that an atlas
is encoded without writing its activations to disk. Both ways give the same codes: fresh activations are rounded to the
dtype in which the SAE's activations were stored, and encoded in the same pieces. They are the same bytes where the
shards hold the same cells, as they do without other cells than the panel's, and else they agree to rounding (1e-5),
because the model's batches are cells of a shard. A token's code depends on that token alone (the threshold encoder).
Tokens are pooled to cell codes, and reduced to the statistics of the shard, on the device as they come
(`sae_core.sae.reductions`), so memory does not grow with the shard's tokens. At the end the statistics of the features
are merged over the shards, by actors if there are many.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.activations import ROW_GROUP_ROWS, ActivationBlock, ActivationReader, to_stored
from feature_store.cells import (
    Source,
    StoredObs,
    read_panel,
    read_split_numbers,
    read_split_record,
    recorded_digests,
)
from feature_store.codes import CodesRun, Merging, TokenPiece, TopCells, cells_of_shard, span_of_shard
from feature_store.codes.codes_run import TOP_CELLS, TOP_TOKENS, Write
from feature_store.codes.cut import OTHER_CELLS, Cells
from feature_store.codes.parquet import Columns
from feature_store.codes.top_cells import FOLDER as TOP_CELLS_FOLDER
from feature_store.errors import InputError
from feature_store.query.runs import resolve_run
from feature_store.storage import commit
from feature_store.storage.layout import Layout, as_path
from feature_store.storage.plans import ActivationsPlan, CellsPlan, CodesCut, CodesPlan, FusedForward, SAEPlan
from pipelines.activations import DataSet, write_data_set
from pipelines.config import ActorOptions, CellOptions, EncodeOptions, ForwardOptions, GeneOptions
from pipelines.config.vectors import VectorsPlace
from pipelines.errors import UsageError
from pipelines.external.vector_files import Vectors
from pipelines.external.vectors import (
    GivenVectors,
    VectorsJob,
    VectorsLocation,
    checked_digest,
    load_vectors_location,
    missing_file,
    open_vectors,
    save_vectors_location,
)
from pipelines.forward import Forward, ForwardJob, out_of_memory_fact, rate
from pipelines.genes import found_genes, recorded_genes, with_genes
from pipelines.inputs import (
    genes_without_tokens,
    load_model_location,
    load_recorded_model,
    load_recorded_source,
    load_stored_sae,
    load_token_of_gene,
    match_inputs,
    no_model,
    open_data,
    refuse_few_matched,
    save_token_of_gene,
    token_of_gene,
    tokenless_fact,
)
from pipelines.moved_data import record_if_same
from pipelines.runtime.actor_pool import do_shards
from pipelines.runtime.checks import check_before_work
from pipelines.runtime.cluster import one_ray_session
from pipelines.runtime.stage import Clock, StageResult
from pipelines.shard_size import cells_per_shard

if TYPE_CHECKING:
    from sae_core.sae import ShardStatistics, SparseCodes

CODE_BYTES = 8
"""Bytes that one nonzero of a token's code takes in memory, for its value and its feature."""
DEFAULT_SHARD = "512MB"
PANEL_ENTRIES = 16_000_000
"""Cells times features of a shard of the panel at most: its nonzeros are sorted by feature in memory."""
PANEL_SHARD_CELLS = 6250
"""Cells of a shard of the panel at most, as in 100,000 cells without a panel: larger shards only take more memory."""


@dataclass(frozen=True, kw_only=True)
class FusedJob:
    """The forward pass of a fused encoding, the site of its activations and the dtype they are rounded to."""

    forward: ForwardJob
    site: str
    dtype: str


@dataclass(frozen=True, kw_only=True)
class EncodeJob:
    """Everything an actor needs to encode any shard; it holds plain values, so it can be pickled."""

    source: str | FusedJob | VectorsJob
    """Folder of the stored activations, the forward pass that makes them, or given vectors."""
    sae: str
    cells: str
    codes: str
    device: str


@dataclass(frozen=True, kw_only=True)
class TopCellsJob:
    """Everything an actor needs to encode the cells in which features fire most."""

    encode: EncodeJob
    gene_of: Mapping[int, str]
    """The gene of each gene_id."""


class Activations(Protocol):
    """The source from which an encoder takes the activations of some cells."""

    @property
    def halvings(self) -> int:
        """Number of times that memory ran out."""

    def blocks(self, cells: Cells) -> Iterator[ActivationBlock]:
        """The tokens of the cells (ascending cell_idx), in order, in blocks of any size."""


class StoredActivations:
    """Activations read from the parts of an activations run."""

    halvings = 0

    def __init__(self, folder: str) -> None:
        self.run = commit.Run.open(folder)
        self.reader = ActivationReader(self.run)
        self.shards = self.run.manifest().shards

    def blocks(self, cells: Cells) -> Iterator[ActivationBlock]:
        """See Activations."""
        if not len(cells):
            return
        first, last = int(cells[0]), int(cells[-1])
        parts = {marker.shard for marker in self.shards if marker.start <= last and first < marker.stop}
        whole_range = len(cells) == last - first + 1
        for group in self.reader.row_groups:
            if group.shard in parts:
                block = self.reader.read(group.shard, group.group)
                place = np.searchsorted(cells, block.cell_idx)
                inside = cells[np.minimum(place, len(cells) - 1)] == block.cell_idx
                if inside.any():
                    yield block if whole_range and inside.all() else _rows(block, inside)


class FreshActivations:
    """Activations that the foundation model computes for the cells."""

    def __init__(self, job: FusedJob) -> None:
        from sae_core.scfm import Site

        self.job = job
        self.site = Site.parse(job.site)
        self.forward = Forward(job.forward)

    @property
    def halvings(self) -> int:
        """Number of times that memory ran out."""
        return self.forward.halvings

    def blocks(self, cells: Cells) -> Iterator[ActivationBlock]:
        """See Activations."""
        for block in self.forward.blocks(cells, (self.site,)):
            act = to_stored(block.act[self.site], self.job.dtype)
            yield ActivationBlock(cell_idx=block.cell_idx, token_pos=block.token_pos, gene_id=block.gene_id, act=act)


def activations_of(source: str | FusedJob | VectorsJob) -> Activations:
    """Open what gives the activations of any cells: a folder of stored ones, a forward pass, or given vectors."""
    match source:
        case FusedJob():
            return FreshActivations(source)
        case VectorsJob():
            return GivenVectors(source)
        case _:
            return StoredActivations(source)


def in_pieces(blocks: Iterator[ActivationBlock]) -> Iterator[ActivationBlock]:
    """Cut the tokens of the blocks into pieces of ROW_GROUP_ROWS; the last piece holds the rest."""
    waiting: list[ActivationBlock] = []
    n_waiting = 0
    for block in blocks:
        waiting.append(block)
        n_waiting += len(block.cell_idx)
        if n_waiting >= ROW_GROUP_ROWS:
            joined = waiting[0] if len(waiting) == 1 else _joined(waiting)
            whole = n_waiting - n_waiting % ROW_GROUP_ROWS
            for low in range(0, whole, ROW_GROUP_ROWS):
                yield _rows(joined, slice(low, low + ROW_GROUP_ROWS))
            waiting, n_waiting = [_rows(joined, slice(whole, None))], n_waiting - whole
    if n_waiting:
        yield _joined(waiting)


def _joined(blocks: list[ActivationBlock]) -> ActivationBlock:
    names = ("cell_idx", "token_pos", "gene_id", "act")
    return ActivationBlock(**{name: np.concatenate([getattr(block, name) for block in blocks]) for name in names})


def _rows(block: ActivationBlock, rows: Any) -> ActivationBlock:
    names = ("cell_idx", "token_pos", "gene_id", "act")
    return ActivationBlock(**{name: getattr(block, name)[rows] for name in names})


class TokenBlock(NamedTuple):
    """The codes of tokens by ascending cell, and cell_idx, position, gene and split (position in SPLITS) of each."""

    codes: "SparseCodes"
    cell_idx: npt.NDArray[np.int64]
    token_pos: npt.NDArray[np.int32]
    gene_id: npt.NDArray[np.int32]
    split: npt.NDArray[np.uint8]


class Encoder:
    """Computes shards of an `EncodeJob`; it is the body of an actor and can be called without Ray."""

    def __init__(self, job: EncodeJob) -> None:
        self.activations = activations_of(job.source)
        self.sae = load_stored_sae(as_path(job.sae), device=job.device)
        self.device = job.device
        self.codes = CodesRun.open(job.codes)
        self.panel = read_panel(job.cells)
        self.cells = job.cells

    def shard(self, number: int) -> dict[str, int]:
        """Encode and commit shard `number` unless it is committed; return the counts for the progress display."""
        cut = self.codes.cut
        cells = cells_of_shard(cut, number, self.panel)
        counts = {"cells": len(cells), "tokens": 0, "bytes": 0, "halvings": 0}
        if self.codes.committed(number):
            return counts
        before = self.activations.halvings
        start, stop = span_of_shard(cut, number, self.panel)

        def encode_to(write: Write) -> Mapping[str, Columns]:
            split = read_split_numbers(self.cells, start, stop)
            tables = reduce_shard(self.codes, number, self.blocks(cells, split[cells - start]), write)
            counts["tokens"] = int(tables["cell"]["n_tokens"].sum())
            return tables

        marker = self.codes.commit_shard(number, encode_to, start=start, stop=stop)
        return counts | {"bytes": marker.bytes, "halvings": self.activations.halvings - before}

    def blocks(self, cells: Cells, split: npt.NDArray[np.uint8]) -> Iterator[TokenBlock]:
        """Yield the codes of the tokens of the cells; `split` is the position in SPLITS of each of the cells."""
        import torch

        for block in in_pieces(self.activations.blocks(cells)):
            codes = self.sae.encode(torch.from_numpy(np.array(block.act_f32())).to(self.device))
            of_token = split[np.searchsorted(cells, block.cell_idx)]
            yield TokenBlock(codes, block.cell_idx, block.token_pos, block.gene_id, of_token)


def reduce_shard(codes: CodesRun, shard: int, blocks: Iterable[TokenBlock], write: Write) -> dict[str, Columns]:
    """Give the codes of the cells of a shard to `write`, block by block, and return the columns of its statistics."""
    from sae_core.sae import ShardReduction

    plan, of_panel = codes.plan, shard < codes.cut.n_panel_shards
    reduction = ShardReduction(
        n_features=plan.n_features,
        pooling=plan.pooling,
        keep=None if of_panel else plan.keep,
        level=plan.level,
        n_top_cells=plan.top_cells,
        n_top_tokens=plan.top_tokens,
        by_gene=of_panel,
    )
    for block in blocks:
        keys = block._asdict()
        if (found := reduction.add(keys.pop("codes"), **keys)) is not None:
            write({name: getattr(found, name) for name in codes.code_columns})
    found, statistics = reduction.finish()
    write({name: getattr(found, name) for name in codes.code_columns})
    return _tables(statistics)


def _tables(found: "ShardStatistics") -> dict[str, Columns]:
    """The statistics of a shard as the columns of the tables of a codes run."""
    tables = {
        "feature_gene": found.feature_gene,
        "gene": found.gene_tokens,
        "feature_token": found.top_tokens,
        "feature_cell": found.top_cells,
        "firing": found.firing,
        "cell": found.cells,
    }
    return {name: rows._asdict() for name, rows in tables.items() if rows is not None}


class TopCellEncoder:
    """Encodes the cells in which features fire most, token by token; it is the body of an actor and can be called
    without Ray.
    """

    def __init__(self, job: TopCellsJob) -> None:
        self.encoder = Encoder(job.encode)
        self.top = TopCells(job.encode.codes)
        self.gene_of = job.gene_of

    def shard(self, number: int) -> dict[str, int]:
        """Encode and commit the cells of range `number` of the features; return their number."""
        return {"cells": self.top.write(number, self._pieces, self.gene_of)}

    def _pieces(self, cells: Cells) -> Iterator[TokenPiece]:
        for block in self.encoder.blocks(cells, np.zeros(len(cells), dtype=np.uint8)):
            crow, col, value = (part.cpu().numpy() for part in (block.codes.crow, block.codes.col, block.codes.value))
            token = np.repeat(np.arange(len(block.cell_idx)), np.diff(crow))
            yield TokenPiece(
                block.cell_idx, block.token_pos, block.gene_id, token, col.astype(np.int32), value.astype(np.float32)
            )


class Merger:
    """Merges ranges of features of a codes folder; it is the body of an actor and can be called without Ray."""

    def __init__(self, codes: str) -> None:
        self.merging = Merging(codes)

    def shard(self, number: int) -> dict[str, int]:
        """Merge and commit range `number` of the features; return their number."""
        return {"features": self.merging.write(number)}


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """The cells to encode: their part of the codes plan, and the source of their activations.

    `genes` holds the token of each gene of a fused encoding, and `vectors` the place of its vectors, if it encodes any:
    both are written beside the codes. `facts` are told of it.
    """

    dataset: str
    cut: CodesCut
    source: str | FusedJob | VectorsJob
    fused: FusedForward | None
    genes: pl.DataFrame | None
    vectors: VectorsLocation | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


def encode(
    options: EncodeOptions, store: Path, *, address: str | None = None, dataset: str | None = None
) -> StageResult:
    """Encode the SAE's stored activations, or any cells by running the foundation model; calling it again resumes.

    Activations of a sample of the cells are for training: the foundation model then runs over all cells. For an SAE of
    given vectors, those of other cells are read in place of a forward pass. `dataset` names other data whose tables
    the store has already, whatever the options say of their columns.

    Raises:
        NotFoundError: there is no SAE, or its activations are gone.
        UsageError, InputError: the foundation model, the vectors or the data set changed, the data are invalid, or the
            activations came from a model that is not here.
    """
    clock = Clock()
    layout = Layout(store)
    check_before_work(layout, address=address)
    sae = commit.Run.open(resolve_run(layout, "saes", options.sae, option="--sae").path)
    of_sae = SAEPlan.of(sae)
    activations = commit.Run.open(layout.activations_dir(of_sae.activations))
    if dataset is None:
        options = _without_moved_data(layout, options, of_sae.dataset)
    what = _plan(layout, options, of_sae, activations, known_as=dataset, address=address)
    plan = CodesPlan(
        control_of=of_sae.control_of,
        sae=sae.path.name,
        sae_manifest=sae.manifest().sha,
        activations=activations.path.name,
        dataset=what.dataset,
        n_features=of_sae.n_features,
        pooling=options.pooling,
        level=options.level,
        keep=options.keep if what.cut.n_panel < what.cut.n_cells else None,
        top_cells=TOP_CELLS,
        top_tokens=TOP_TOKENS,
        cut=what.cut,
        fused=what.fused,
    )
    codes = CodesRun.create(layout.codes_dir(plan.id), plan)
    if what.genes is not None:
        save_token_of_gene(codes.folder, what.genes, codes.by_cell.plan_sha)
    if what.vectors is not None:
        save_vectors_location(codes.folder, what.vectors)
    pending = codes.pending()
    total: Mapping[str, int] = {}
    job = EncodeJob(
        source=what.source,
        sae=str(sae.path.resolve()),
        cells=str(layout.cells_dir(what.dataset).resolve()),
        codes=str(codes.folder.resolve()),
        device="cuda" if options.num_gpus > 0 else "cpu",
    )
    with one_ray_session():
        if pending:
            with codes.by_cell.exclusive():
                total = do_shards(Encoder, job, pending, options, title="encode", note=rate, address=address)
        manifest = codes.finalize_shards()
        merge_statistics(codes.folder, options, address=address)
        _encode_top_cells(layout, job, options, address=address)
    return StageResult(
        kind="codes",
        run=codes.folder.name,
        path=codes.folder,
        done=len(pending),
        reused=plan.cut.n_shards - len(pending),
        seconds=clock.seconds,
        facts={
            "dataset": what.dataset,
            **({} if what.vectors is None else {"vectors": what.vectors.vectors}),
            **({"splits": read_split_record(layout.cells_dir(what.dataset)).text} if options.data else {}),
            **what.facts,
            "nonzeros": manifest.rows,
            "bytes a nonzero": round(manifest.bytes / max(manifest.rows, 1), 2),
            **tokenless_fact(codes),
            **out_of_memory_fact(total),
        },
    )


def merge_statistics(folder: Path, options: ActorOptions, *, address: str | None = None) -> None:
    """Build merged/ of a codes folder, in this process if it is one range of features, else by actors; it can be
    resumed.

    Raises:
        IncompleteRunError: the tables of the shards are not complete.
        BusyError, RunFailedError: see `encode`.
    """
    merging = Merging(folder)
    if pending := merging.pending():
        with merging.codes.by_cell.exclusive():
            if len(merging.bounds) == 2:
                merging.write(0)
            else:
                without_gpu = options.model_copy(update={"num_gpus": 0.0})
                do_shards(Merger, str(folder), pending, without_gpu, title="merge", note=_merge_rate, address=address)
    merging.finalize()


def _encode_top_cells(layout: Layout, job: EncodeJob, options: ActorOptions, *, address: str | None) -> None:
    """Write the tokens of the cell in which each feature fires most, where tokens are genes; it can be resumed."""
    codes = CodesRun.open(job.codes)
    genes = load_token_of_gene(layout, codes).drop_nulls("gene_id")
    # where a cell is one vector it has no order
    if genes.is_empty() or commit.is_intact(codes.folder / TOP_CELLS_FOLDER):
        return
    top = TopCells(codes.folder)
    if pending := top.pending():
        of_top = TopCellsJob(encode=job, gene_of=dict(genes.select("gene_id", "symbol").iter_rows()))
        with codes.by_cell.exclusive():
            do_shards(TopCellEncoder, of_top, pending, options, title="top cells", note=_cell_rate, address=address)
    top.finalize()


def _cell_rate(total: Mapping[str, int], seconds: float) -> str:
    return f"{total['cells'] / seconds:,.0f} cells/s"


def _merge_rate(total: Mapping[str, int], seconds: float) -> str:
    return f"{total['features'] / seconds:,.0f} features/s"


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


def _plan(
    layout: Layout,
    options: EncodeOptions,
    sae: SAEPlan,
    activations: commit.Run,
    *,
    known_as: str | None,
    address: str | None,
) -> _Plan:
    """Decide where the activations come from, and refuse options that the decision leaves without effect."""
    trained_on = ActivationsPlan.of(activations)
    if options.vectors is not None and trained_on.origin != "vectors":
        raise UsageError(
            f"--vectors was {options.vectors!r}, but the SAE was trained on {trained_on.site} of {trained_on.model}, "
            "not on given vectors; leave --vectors out, or name another --sae"
        )
    new = bool(options.fused or options.data or options.vectors or trained_on.cells is not None)
    if new and trained_on.origin == "vectors":
        return _plan_vectors(layout, options, sae, activations, known_as=known_as, address=address)
    if new and (reason := no_model(activations)):
        raise UsageError(
            f"{reason}, so that only the cells that were recorded can be encoded; leave --data and --fused out, or "
            "record the other cells too and train on them"
        )
    if new:
        return _plan_fused(layout, options, sae, activations, known_as=known_as, address=address)
    return _plan_stored(layout, activations)


def _plan_stored(layout: Layout, activations: commit.Run) -> _Plan:
    plan = ActivationsPlan.of(activations)
    n_panel = CellsPlan.of(commit.Run.open(layout.cells_dir(plan.dataset))).panel.n_cells
    return _Plan(
        dataset=plan.dataset,
        cut=CodesCut(n_cells=plan.n_cells, n_panel=n_panel, panel_cells=plan.shard_cells, other_cells=OTHER_CELLS),
        source=str(activations.path.resolve()),
        fused=None,
        genes=None,
    )


def _plan_fused(
    layout: Layout,
    options: EncodeOptions,
    sae: SAEPlan,
    activations: commit.Run,
    *,
    known_as: str | None,
    address: str | None,
) -> _Plan:
    """Open the model and the data, write the cell table of new data, and divide the cells into shards."""
    trained_on = ActivationsPlan.of(activations)
    source = _source(layout, options, trained_on, known_as=known_as)
    model = load_recorded_model(activations)
    stored = None if options.data else StoredObs(layout.cells_dir(trained_on.dataset))
    inputs, genes = match_inputs(source, model, stored), recorded_genes(activations)
    if options.data:
        refuse_few_matched(inputs, options.min_matched_share)
    inputs = with_genes(inputs, genes)
    dataset, by_schema = _data_set(layout, options, source, trained_on, known_as=known_as, address=address)
    rows_per_cell = options.tokens_per_cell if trained_on.readout is None else 1
    cut = _cut(
        layout, options, dataset, source.n_cells, sae, mean_tokens=inputs.mean_tokens, rows_per_cell=rows_per_cell
    )
    place = load_model_location(activations)
    forward = ForwardJob(
        data=source.places,
        matrix=source.matrix,
        where=source.where,
        rows=source.rows,
        model=place.model,
        model_options=place.model_options,
        random_init=place.random_init,
        precision=place.precision,
        device="cuda" if options.num_gpus > 0 else "cpu",
        tokens_per_cell=options.tokens_per_cell,
        readout=trained_on.readout,
        seed=trained_on.seed,
        batch_tokens=options.batch_tokens,
        genes=None if genes is None else genes.tokens,
        cells=str(layout.cells_dir(dataset)),
    )
    fused = FusedForward(
        model_digest=model.digest,
        site=trained_on.site,
        dtype=trained_on.dtype,
        precision=place.precision,
        readout=trained_on.readout,
        tokens_per_cell=options.tokens_per_cell,
        seed=trained_on.seed,
        matrix=source.matrix,
    )
    job = FusedJob(forward=forward, site=trained_on.site, dtype=trained_on.dtype)
    facts = {**by_schema, **found_genes(inputs, genes)}
    return _Plan(dataset=dataset, cut=cut, source=job, fused=fused, genes=token_of_gene(inputs), facts=facts)


def _plan_vectors(
    layout: Layout,
    options: EncodeOptions,
    sae: SAEPlan,
    activations: commit.Run,
    *,
    known_as: str | None,
    address: str | None,
) -> _Plan:
    """Find and check the vectors of the cells, write the cell table of new data, and divide the cells into shards.

    Vectors of the SAE's own cells that are those it was trained on may be named to say where they are now.
    """
    _refuse_options_of_a_model(options)
    trained_on = ActivationsPlan.of(activations)
    source = _source(layout, options, trained_on, known_as=known_as)
    recorded = load_vectors_location(activations.path)
    place = VectorsPlace.parse(recorded.vectors)
    if options.vectors is not None:
        place = VectorsPlace.parse(options.vectors).absolute()
    elif options.data and place.file is not None:
        raise UsageError(
            f"the SAE was trained on vectors of {place}, which are those of other cells; name the vectors of "
            f"{', '.join(map(str, options.data))} from the same model: --data DATA --vectors PATH/vectors.npy"
        )
    elif (missing := missing_file(activations.path)) is not None:
        raise UsageError(
            f"the vectors that the SAE was trained on are read again, but {missing} is not there; if it was moved, "
            "name its new place: `scsae encode --vectors PATH/vectors.npy`, with the other options as before"
        )
    vectors = _opened_vectors(options, place, source)
    if vectors.width != sae.d_model:
        raise UsageError(
            f"{vectors.where} has vectors of {vectors.width} numbers, and the SAE was trained on {sae.d_model} "
            f"({trained_on.model}); give vectors of the same model"
        )
    here = VectorsLocation(str(place), checked_digest(vectors, source, dtype=trained_on.dtype))
    if not options.data and here.digest == trained_on.model_digest:
        save_vectors_location(activations.path, here)
        if not options.fused and trained_on.cells is None:
            return _plan_stored(layout, activations)
    elif not options.data and options.vectors is None:
        raise UsageError(
            f"the vectors in {place} changed since activations/{activations.path.name} were made of them (sha256 "
            f"{here.digest[:12]}, was {trained_on.model_digest[:12]}); store them anew with `scsae extract DATA "
            f"--vectors {place}`, or name others with --vectors"
        )
    dataset, by_schema = _data_set(layout, options, source, trained_on, known_as=known_as, address=address)
    fused = FusedForward(
        model_digest=here.digest,
        site=trained_on.site,
        dtype=trained_on.dtype,
        precision=trained_on.precision,
        readout=None,
        tokens_per_cell=None,
        seed=trained_on.seed,
        matrix=source.matrix,
    )
    return _Plan(
        dataset=dataset,
        cut=_cut(layout, options, dataset, source.n_cells, sae, mean_tokens=1.0, rows_per_cell=1),
        source=VectorsJob(
            data=source.places,
            matrix=source.matrix,
            where=source.where,
            vectors=str(place),
            dtype=trained_on.dtype,
        ),
        fused=fused,
        genes=genes_without_tokens(source),
        vectors=here,
        facts=by_schema,
    )


def _opened_vectors(options: EncodeOptions, place: VectorsPlace, source: Source) -> Vectors:
    """Open the vectors of the cells; where the options name none, an error says which were looked for, and why."""
    try:
        return open_vectors(str(place), source)
    except InputError as error:
        if options.vectors is not None or not options.data:
            raise
        raise InputError(
            f"{error}; the SAE was trained on {place}, which is read of other data too unless --vectors names "
            "others: --data DATA --vectors PATH/vectors.npy"
        ) from error


def _refuse_options_of_a_model(options: EncodeOptions) -> None:
    fields = type(options).model_fields
    of_model = {"tokens_per_cell", "batch_tokens", *GeneOptions.model_fields}
    if given := sorted(name for name in of_model if getattr(options, name) != fields[name].default):
        raise UsageError(
            f"{', '.join(given)} apply to the forward pass of a model, and the SAE was trained on given vectors; leave "
            "them out"
        )


def _source(layout: Layout, options: EncodeOptions, trained_on: ActivationsPlan, *, known_as: str | None) -> Source:
    """Open the data set to encode: other data, or those of the SAE."""
    if not options.data:
        return load_recorded_source(layout, trained_on.dataset, stage="encode --fused")
    return open_data(options, options if known_as is None else None, known_digest=recorded_digests(layout))


def _data_set(
    layout: Layout,
    options: EncodeOptions,
    source: Source,
    trained_on: ActivationsPlan,
    *,
    known_as: str | None,
    address: str | None,
) -> DataSet:
    """Return the data set to encode; the tables of other data are written, unless they are known."""
    if not options.data:
        return DataSet(trained_on.dataset, {})
    return write_data_set(
        layout,
        source,
        options,
        actors=options,
        seed=trained_on.seed,
        trained_on=trained_on.dataset,
        known_as=known_as,
        address=address,
    )


def _cut(
    layout: Layout,
    options: EncodeOptions,
    dataset: str,
    n_cells: int,
    sae: SAEPlan,
    *,
    mean_tokens: float,
    rows_per_cell: int | None,
) -> CodesCut:
    """Divide the cells of a data set into shards, by the rows that are encoded of a cell (`cells_per_shard`)."""
    n_panel = CellsPlan.of(commit.Run.open(layout.cells_dir(dataset))).panel.n_cells
    shard_cells = cells_per_shard(
        options,
        mean_tokens=mean_tokens,
        n_cells=n_panel,
        default=DEFAULT_SHARD,
        row_bytes=sae.k * CODE_BYTES,
        rows_per_cell=rows_per_cell,
    )
    if options.shard_cells is None and options.shard_size is None:
        shard_cells = min(shard_cells, PANEL_SHARD_CELLS, max(1, PANEL_ENTRIES // sae.n_features))
    return CodesCut(
        n_cells=n_cells, n_panel=n_panel, panel_cells=shard_cells, other_cells=options.shard_cells or OTHER_CELLS
    )
