"""The stage: measure shards of features on actors, then pool the null genes and write the tables.

draws/                   what genes and null genes do to features, a part for FEATURES_A_SHARD of them
feature_input/           a row for each feature, gene and path, with z, p and q
feature_input_summary/   a row for each feature
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from feature_store.storage import commit
from feature_store.storage.layout import INPUT_TABLES, Layout
from pipelines.config import InputsOptions
from pipelines.effects.chain import gene_symbols
from pipelines.feature_inputs.actors import FEATURES_A_SHARD, InputsJob, InputsMeasurer
from pipelines.feature_inputs.request import InputsRequest
from pipelines.feature_inputs.tables import PATHS, summary_frame, write_inputs
from pipelines.moved_data import record_new_place
from pipelines.runtime.actor_pool import do_shards
from pipelines.runtime.checks import check_before_work
from pipelines.runtime.stage import Clock, StageResult


def inputs(options: InputsOptions, store: Path, *, address: str | None = None) -> StageResult:
    """Measure the inputs of features; shards and tables that are there are not made again.

    Raises:
        UsageError: a feature is unknown or never fires, no model stands behind the SAE, or the data moved or changed.
        ConfigError: the model passes no gradient to the site; nothing is written.
        NotFoundError: there are no associations.
    """
    clock = Clock()
    layout = Layout(store)
    check_before_work(layout, address=address)
    request = InputsRequest.of(options, layout)
    record_new_place(layout, request.chain.associations.dataset, options.data)
    plan = request.plan
    folder = layout.inputs_dir(plan.id)
    n_shards = -(-len(request.measured) // FEATURES_A_SHARD)
    missing = [name for name in INPUT_TABLES if not commit.is_intact(folder / name)]
    pending: list[int] = []
    if missing:
        request.check_gradient()
        run = commit.Run.create(folder / "draws", plan.table("draws", n_shards=n_shards))
        job = InputsJob(
            paths=request.paths(),
            run=str(run.path.resolve()),
            codes=str(layout.codes_dir(request.chain.associations.codes).resolve()),
            features=request.measured,
            cells=options.cells,
            genes=options.genes,
            n_nulls=request.n_nulls,
            seed=options.seed,
        )
        with commit.exclusive(folder):
            if pending := run.pending():
                do_shards(InputsMeasurer, job, pending, options, title="inputs", note=_done, address=address)
            run.finalize()
            _write_tables(request, folder, run, n_shards)
    summary = commit.read_table(folder / "feature_input_summary")
    return StageResult(
        kind="inputs",
        run=folder.name,
        path=folder,
        done=len(pending) + len(missing),
        reused=n_shards + len(INPUT_TABLES) - len(pending) - len(missing),
        seconds=clock.seconds,
        facts=_facts(request, summary),
    )


def _write_tables(request: InputsRequest, folder: Path, draws: commit.Run, n_shards: int) -> None:
    plan = request.plan
    of_draws: dict[str, Any] = {"draws": draws.manifest().sha}
    table = plan.table("feature_input", n_shards=n_shards, **of_draws)
    written = write_inputs(folder / "feature_input", draws, table, gene_symbols(request.chain))
    commit.write_table(
        folder / "feature_input_summary",
        lambda: summary_frame(draws, written),
        plan.table("feature_input_summary", **of_draws),
    )


def _facts(request: InputsRequest, summary: pl.DataFrame) -> dict[str, object]:
    facts: dict[str, object] = {
        "sae": request.chain.associations.sae,
        "features": len(request.measured),
        "in too few cells or genes": len(request.measured) - summary.height,
        "nulls": f"{summary['n_nulls'].sum()} null genes, of features together",
    }
    for name, path in PATHS.items():
        n = summary.filter(pl.col(f"n_{path.column}") > 0).height
        facts[f"{name}: driven by a gene"] = f"{n} features at q <= 0.05 on test cells"
        if (share := _median(summary[f"share_{path.column}"])) is not None:
            facts[f"{name}: share of the genes"] = f"{share:.2f} (median)"
    if (rank := _median(summary["gradient_spearman"])) is not None:
        facts["gradient"] = f"rank correlation {rank:.2f} with the measured change (median)"
    return facts


def _median(values: pl.Series) -> float | None:
    known = values.drop_nulls().to_numpy()
    return float(np.median(known)) if len(known) else None


def _done(total: Mapping[str, int], seconds: float) -> str:
    return f"{total['features']} features, {total['features'] / max(seconds, 1e-9):.2f} a second"
