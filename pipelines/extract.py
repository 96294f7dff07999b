"""Extraction: foundation-model activations of every token, by Ray actors, into Parquet shards.

One shard is a range of cells. An actor reads its rows, tokenizes them, runs the model up to the deepest site asked
for and commits one Parquet file per site. Gene tokens are kept; special tokens (`<cls>`) are context, not data.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from feature_store import activations as activation_store
from feature_store import commit, ingest
from feature_store.layout import Layout, run_id
from feature_store.splits import SplitConfig
from pipelines.cluster import actors_that_fit, ray_session
from pipelines.config import DataOptions, ExtractOptions, parse_size
from pipelines.errors import UsageError
from pipelines.progress import ticking
from pipelines.shards import run_over_actors
from pipelines.stage import FORMAT_VERSION, Clock, StageResult

if TYPE_CHECKING:
    from sae_core.scfm import FoundationModel, GeneMatch, Site, Tokens

DEFAULT_SHARD = "256MB"
PROBE_CELLS = 512
TIMED_CELLS = 16
BLOCK_CELLS = 256
ITEMSIZE = {"f16": 2, "bf16": 2, "f32": 4}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Everything an actor needs to do any shard of an extraction; plain values, so that it travels."""

    data: str
    matrix: str
    model: str
    random_init: bool
    device: str
    sites: tuple[str, ...]
    folders: tuple[str, ...]
    dtype: str
    tokens_per_cell: int | None
    seed: int
    shard_cells: int
    n_cells: int


class Extractor:
    """Does shards of a `Workload`: the body of an actor, callable without Ray."""

    def __init__(self, work: Workload) -> None:
        from sae_core.scfm import Site, load_model

        self.work = work
        self.sites: tuple[Site, ...] = tuple(Site.parse(name) for name in work.sites)
        self.model: FoundationModel = load_model(work.model, device=work.device, random_init=work.random_init)
        self.source = ingest.open_source(Path(work.data), matrix=work.matrix)
        self.match: GeneMatch = self.model.match_genes(self.source.gene_symbols, self.source.ensembl_ids)
        self.runs = [commit.Run.open(Path(folder)) for folder in work.folders]

    def shard(self, number: int) -> dict[str, int]:
        """Compute and commit shard `number` at every site that lacks it; return cells, tokens and bytes."""
        start = number * self.work.shard_cells
        stop = min(start + self.work.shard_cells, self.work.n_cells)
        if all(run.committed(number) for run in self.runs):
            return {"cells": stop - start, "tokens": 0, "bytes": 0}
        keys, acts = self._compute(start, stop)
        size_bytes = 0
        for site, run in zip(self.sites, self.runs, strict=True):
            metadata = {"site": str(site), "plan_sha": run.plan_sha, "dtype": self.work.dtype}

            def write(path: Path, act: npt.NDArray[Any] = acts[site], meta: dict[str, str] = metadata) -> int:
                return activation_store.write_part(
                    path, keys["cell_idx"], keys["token_pos"], keys["gene_id"], act, meta
                )

            size_bytes += run.commit_shard(number, write, start=start, stop=stop).bytes
        return {"cells": stop - start, "tokens": len(keys["cell_idx"]), "bytes": size_bytes}

    def _compute(self, start: int, stop: int) -> tuple[dict[str, npt.NDArray[Any]], dict["Site", npt.NDArray[Any]]]:
        """Activations of the gene tokens of cells [start, stop), and the columns that name them."""
        names: dict[str, list[npt.NDArray[Any]]] = {"cell_idx": [], "token_pos": [], "gene_id": []}
        parts: dict[Site, list[npt.NDArray[Any]]] = {site: [] for site in self.sites}
        for low in range(start, stop, BLOCK_CELLS):
            rows = self.source.read_rows(low, min(low + BLOCK_CELLS, stop))
            tokens = self.model.tokenize(rows.indptr, rows.indices, rows.data, self.match, seed=self.work.seed)
            chosen = choose_tokens(tokens, self.work.tokens_per_cell, first_cell=low, seed=self.work.seed)
            cell = tokens.cell_of_token()
            names["cell_idx"].append((cell[chosen] + low).astype(np.int64))
            names["token_pos"].append((chosen - tokens.offsets[cell[chosen]]).astype(np.int32))
            names["gene_id"].append(tokens.gene_id[chosen].astype(np.int32))
            for site, act in self.model.activations(tokens, self.sites).items():
                parts[site].append(activation_store.to_stored(act[chosen].float().numpy(), self.work.dtype))
        return (
            {name: np.concatenate(part) for name, part in names.items()},
            {site: np.concatenate(part) for site, part in parts.items()},
        )


def choose_tokens(tokens: "Tokens", per_cell: int | None, *, first_cell: int, seed: int) -> npt.NDArray[np.int64]:
    """Return the positions of the gene tokens to keep, ascending: all, or `per_cell` drawn from (seed, cell index)."""
    genes = np.flatnonzero(~tokens.is_special)
    if per_cell is None:
        return genes
    kept = []
    cell = tokens.cell_of_token()[genes]
    bounds = np.searchsorted(cell, np.arange(tokens.n_cells + 1))
    for i in range(tokens.n_cells):
        own = genes[bounds[i] : bounds[i + 1]]
        if len(own) > per_cell:
            own = np.sort(np.random.default_rng([seed, first_cell + i]).choice(own, per_cell, replace=False))
        kept.append(own)
    return np.concatenate(kept) if kept else genes


def parse_sites(layers: tuple[str, ...], model: "FoundationModel") -> tuple["Site", ...]:
    """Return the sites that `--layer` names (a bare number is that layer's output), checked against the model."""
    from sae_core.scfm import Site

    if not layers:
        raise UsageError(f"no --layer was given; {model.name} has layers 0 to {model.n_layers - 1}, e.g. --layer 2")
    sites = []
    for text in layers:
        site = Site.parse(f"layer.{text}" if text.isdigit() else text)
        if site.index is not None and not 0 <= site.index < model.n_layers:
            raise UsageError(f"--layer was {text!r}; {model.name} has layers 0 to {model.n_layers - 1}")
        sites.append(site)
    return tuple(dict.fromkeys(sites))


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A data set and a model that fit each other."""

    source: ingest.Source
    model: "FoundationModel"
    match: "GeneMatch"
    n_probed: int
    """Cells of the probe: the first of the data set."""
    n_empty: int
    """Cells of the probe in which no gene of the model is expressed."""
    matched_share: float
    """Share of the probe's values (counts, where the data are counts) that lies in matched genes."""
    mean_tokens: float
    """Gene tokens a cell of the probe."""
    probe_seconds: float
    """Seconds that tokenizing and embedding one cell took."""


def open_inputs(options: DataOptions) -> Opened:
    """Open data and model and match their genes; nothing is written. Raises the input errors of both."""
    from sae_core.scfm import load_model

    source = ingest.open_source(options.data, matrix=options.matrix)
    model = load_model(options.model, random_init=options.random_init)
    match = model.match_genes(source.gene_symbols, source.ensembl_ids)
    rows = source.read_rows(0, min(PROBE_CELLS, source.n_cells))
    tokens = model.tokenize(rows.indptr, rows.indices, rows.data, match, seed=0)
    genes_of_cell = np.bincount(tokens.cell_of_token()[~tokens.is_special], minlength=tokens.n_cells)
    clock = Clock()
    few = source.read_rows(0, min(TIMED_CELLS, source.n_cells))
    model.embed(model.tokenize(few.indptr, few.indices, few.data, match, seed=0))
    return Opened(
        source=source,
        model=model,
        match=match,
        n_probed=tokens.n_cells,
        n_empty=int((genes_of_cell == 0).sum()),
        matched_share=float(rows.data[match.matched[rows.indices]].sum() / max(rows.data.sum(), 1e-12)),
        mean_tokens=float(genes_of_cell.mean()),
        probe_seconds=clock.seconds / min(TIMED_CELLS, source.n_cells),
    )


def cells_per_shard(options: ExtractOptions, opened: Opened) -> int:
    """Return the cells of one shard: as given, or as many as make a file of `shard_size`."""
    if options.shard_cells is not None:
        return options.shard_cells
    tokens = min(opened.mean_tokens, options.tokens_per_cell or opened.mean_tokens)
    per_cell_bytes = max(tokens, 1.0) * opened.model.d_model * ITEMSIZE[options.dtype]
    return max(1, int(parse_size(options.shard_size or DEFAULT_SHARD) // per_cell_bytes))


def extract(options: ExtractOptions, store: Path, *, address: str | None = None) -> list[StageResult]:
    """Extract activations at every site asked for; one run per site, resumed by calling again.

    Raises:
        InputError, VocabularyError, CheckpointError, UsageError: data, model or options are wrong; nothing is written.
    """
    clock = Clock()
    opened = open_inputs(options)
    sites = parse_sites(options.layer, opened.model)
    layout = Layout(store)
    cells = ingest.write_cells(
        layout,
        opened.source,
        donor=options.donor,
        batch=options.batch,
        cell_type=options.cell_type,
        labels=options.label,
        split=SplitConfig(seed=options.seed),
    )
    dataset = str(cells["dataset"][0])
    remember_source(layout, dataset, opened.source)
    shard_cells = cells_per_shard(options, opened)
    runs = [
        _create_run(layout, _plan(options, opened, dataset=dataset, site=site, shard_cells=shard_cells))
        for site in sites
    ]
    pending = sorted({shard for run in runs for shard in run.pending()})
    if pending:
        work = Workload(
            data=str(options.data.resolve()),
            matrix=opened.source.matrix,
            model=options.model,
            random_init=options.random_init,
            device="cuda" if options.num_gpus > 0 else "cpu",
            sites=tuple(str(site) for site in sites),
            folders=tuple(str(run.path.resolve()) for run in runs),
            dtype=options.dtype,
            tokens_per_cell=options.tokens_per_cell,
            seed=options.seed,
            shard_cells=shard_cells,
            n_cells=opened.source.n_cells,
        )
        _run_actors(work, options, pending, address=address)
    for run in runs:
        run.finalize()
    facts = {
        "dataset": dataset,
        "cells": opened.source.n_cells,
        "genes matched": f"{opened.match.n_matched} of {opened.source.n_genes}",
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


def _plan(options: ExtractOptions, opened: Opened, *, dataset: str, site: "Site", shard_cells: int) -> dict[str, Any]:
    """What determines the content of an activations run, and nothing else."""
    return {
        "format": FORMAT_VERSION,
        "dataset": dataset,
        "model": opened.model.name,
        "model_digest": opened.model.digest,
        "site": str(site),
        "d_model": opened.model.d_model,
        "dtype": options.dtype,
        "tokens_per_cell": options.tokens_per_cell,
        "seed": options.seed,
        "n_cells": opened.source.n_cells,
        "shard_cells": shard_cells,
        "n_shards": -(-opened.source.n_cells // shard_cells),
    }


def _create_run(layout: Layout, plan: dict[str, Any]) -> commit.Run:
    return commit.Run.create(layout.activations_dir(run_id(plan)), plan)


def _run_actors(work: Workload, options: ExtractOptions, pending: list[int], *, address: str | None) -> None:
    """Do the pending shards on Ray actors, with progress."""
    import ray

    with ray_session(address=address), ticking("extract", len(pending), "shards") as tick:
        n_actors = actors_that_fit(
            options.num_actors, num_cpus=options.num_cpus, num_gpus=options.num_gpus, n_tasks=len(pending)
        )
        actor_class = ray.remote(Extractor).options(
            num_cpus=options.num_cpus, num_gpus=options.num_gpus, max_restarts=-1, max_task_retries=-1
        )
        actors = [actor_class.remote(work) for _ in range(n_actors)]
        clock = Clock()
        total = {"cells": 0, "tokens": 0, "bytes": 0, "shards": 0}

        def on_done(_shard: int, report: dict[str, int]) -> None:
            for key, value in report.items():
                total[key] += value
            total["shards"] += 1
            tick(total["shards"], f"{total['cells'] / clock.seconds:,.0f} cells/s {total['bytes'] / 1e6:,.0f} MB")

        run_over_actors(actors, pending, submit=lambda actor, shard: actor.shard.remote(shard), on_done=on_done)


def remember_source(layout: Layout, dataset: str, source: ingest.Source) -> None:
    """Note where the data set lies now, beside its cells: a later stage reads expression from there."""
    where = {"path": str(source.path.resolve()), "matrix": source.matrix, "digest": source.digest}
    commit.replace_text(layout.cells_dir(dataset) / "source.json", json.dumps(where, indent=1))


def recalled_source(layout: Layout, dataset: str) -> ingest.Source:
    """Open the data set where `remember_source` noted it; raise InputError where the file moved or changed."""
    where = json.loads((layout.cells_dir(dataset) / "source.json").read_text())
    source = ingest.open_source(Path(where["path"]), matrix=where["matrix"])
    if source.digest != where["digest"]:
        raise UsageError(
            f"{where['path']} changed since its extraction (sha256 {source.digest[:12]}, was {where['digest'][:12]}); "
            "extract it again with `scsae extract`"
        )
    return source
