"""The stage: measure shards of features on actors, then pool the null genes and write the tables.

draws/                   what genes and null genes do to features, a part for a few of them
feature_input/           a row for each feature, gene and path, with z, p and q
feature_input_summary/   a row for each feature
"""

from pathlib import Path
from typing import Any

import polars as pl

from feature_store.storage import commit
from feature_store.storage.layout import INPUT_TABLES, Layout
from pipelines.config import InputsOptions
from pipelines.effects.chain import gene_symbols
from pipelines.effects.shards import measure_features, median
from pipelines.feature_inputs.actors import InputsMeasurer
from pipelines.feature_inputs.request import InputsRequest
from pipelines.feature_inputs.tables import PATHS, summary_frame, write_inputs
from pipelines.moved_data import record_new_place
from pipelines.runtime.checks import check_before_work, warn_of_few_draws
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
    n_drawn = len(request.measured) * options.genes * request.n_nulls
    warn_of_few_draws(
        n_drawn, "null genes of all features together", enough="leave out --n-nulls, and 500 or more are drawn"
    )
    folder = layout.inputs_dir(request.plan.id)
    done, reused = measure_features(
        InputsMeasurer,
        request.job,
        lambda draws, n_shards: _write_tables(request, folder, draws, n_shards),
        folder=folder,
        plan=request.plan,
        features=request.measured,
        tables=INPUT_TABLES,
        options=options,
        address=address,
    )
    summary = commit.read_table(folder / "feature_input_summary")
    return StageResult(
        kind="inputs",
        run=folder.name,
        path=folder,
        done=done,
        reused=reused,
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
        if (share := median(summary[f"share_{path.column}"])) is not None:
            facts[f"{name}: share of the genes"] = f"{share:.2f} (median)"
    if (rank := median(summary["gradient_spearman"])) is not None:
        facts["gradient"] = f"rank correlation {rank:.2f} with the measured change (median)"
    return facts
