"""Extraction: foundation-model activations of every token, by Ray actors, into Parquet shards.

One shard is a range of cells. An actor reads its rows, tokenizes them, runs the model up to the deepest site asked
for and commits one Parquet file per site. Gene tokens are kept; special tokens (`<cls>`) are context, not data.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from feature_store import activations as activation_store
from feature_store import commit, ingest
from feature_store.layout import Layout, run_id
from feature_store.splits import SplitConfig
from pipelines.config import ExtractOptions, parse_size
from pipelines.inputs import Opened, open_inputs, parse_sites, remember_model, remember_source
from pipelines.shards import do_shards
from pipelines.stage import FORMAT_VERSION, Clock, StageResult

if TYPE_CHECKING:
    from sae_core.scfm import FoundationModel, GeneMatch, Site, Tokens

DEFAULT_SHARD = "256MB"
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
    runs = [_create_run(layout, options, opened, dataset=dataset, site=site) for site in sites]
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
            shard_cells=runs[0].plan["shard_cells"],
            n_cells=opened.source.n_cells,
        )
        do_shards(Extractor, work, pending, options, title="extract", note=_rate, address=address)
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


def _create_run(layout: Layout, options: ExtractOptions, opened: Opened, *, dataset: str, site: "Site") -> commit.Run:
    """Make or reopen the activations run of one site, its plan being what determines its content and nothing else.

    Beside it: which token each gene of the data set is, and where the model lies now.
    """
    shard_cells = cells_per_shard(options, opened)
    plan = {
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
    run = commit.Run.create(layout.activations_dir(run_id(plan)), plan)
    remember_model(run, options, opened)
    return run


def _rate(total: Mapping[str, int], seconds: float) -> str:
    per_second = f"{total['cells'] / seconds:,.0f} cells/s {total['tokens'] / seconds:,.0f} tokens/s"
    return f"{per_second} {total['bytes'] / 1e6:,.0f} MB"
