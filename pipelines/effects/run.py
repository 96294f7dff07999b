"""The stage: measure shards of features on actors, then pool the nulls and write the tables.

draws/                    mean effects of features and of their null directions, a part for a few of them
feature_effect/           a row for each feature, intervention and gene, with z, p and q
feature_effect_summary/   a row for each feature and intervention
"""

from pathlib import Path
from typing import Any

import polars as pl

from feature_store.storage import commit
from feature_store.storage.layout import EFFECT_TABLES, Layout
from pipelines.config import EffectsOptions
from pipelines.effects.actors import EffectsMeasurer
from pipelines.effects.chain import gene_symbols
from pipelines.effects.request import EffectsRequest
from pipelines.effects.shards import measure_features, median
from pipelines.effects.tables import draws_of, summary_frame, write_effects
from pipelines.moved_data import record_new_place
from pipelines.runtime.checks import check_before_work
from pipelines.runtime.stage import Clock, StageResult
from sae_core.effects import INTERVENTIONS


def effects(options: EffectsOptions, store: Path, *, address: str | None = None) -> StageResult:
    """Measure the effects of features; shards and tables that are there are not made again.

    Raises:
        UsageError: a feature is unknown or never fires, no model stands behind the SAE, or the data moved or changed.
        ConfigError: the model has no head that predicts hidden genes; nothing is written.
        NotFoundError: there are no associations.
    """
    clock = Clock()
    layout = Layout(store)
    check_before_work(layout, address=address)
    request = EffectsRequest.of(options, layout)
    record_new_place(layout, request.chain.associations.dataset, options.data)
    folder = layout.effects_dir(request.plan.id)
    done, reused = measure_features(
        EffectsMeasurer,
        request.job,
        lambda draws, n_shards: _write_tables(request, folder, draws, n_shards),
        folder=folder,
        plan=request.plan,
        features=request.measured,
        tables=EFFECT_TABLES,
        options=options,
        address=address,
    )
    summary = commit.read_table(folder / "feature_effect_summary")
    return StageResult(
        kind="effects",
        run=folder.name,
        path=folder,
        done=done,
        reused=reused,
        seconds=clock.seconds,
        facts=_facts(request, summary),
    )


def _write_tables(request: EffectsRequest, folder: Path, run: commit.Run, n_shards: int) -> None:
    plan, draws = request.plan, draws_of(run)
    genes = gene_symbols(request.chain)
    of_draws: dict[str, Any] = {"draws": run.manifest().sha}
    table = plan.table("feature_effect", n_shards=n_shards, **of_draws)
    written = write_effects(folder / "feature_effect", draws, table, genes)
    own = dict(request.features.select("feature_id", pl.col("top_genes").fill_null("").str.split(" ")).iter_rows())
    commit.write_table(
        folder / "feature_effect_summary",
        lambda: summary_frame(draws, written, own, genes),
        plan.table("feature_effect_summary", **of_draws),
    )


def _facts(request: EffectsRequest, summary: pl.DataFrame) -> dict[str, object]:
    facts: dict[str, object] = {
        "sae": request.chain.associations.sae,
        "features": len(request.measured),
        "in too few cells": len(request.measured) - summary["feature_id"].n_unique(),
        "nulls": f"{request.n_nulls} random directions and {request.n_nulls} mixtures of features each",
    }
    for intervention in INTERVENTIONS:
        own = summary.filter(intervention=intervention)
        n = own.filter(pl.col("n_up") + pl.col("n_down") > 0).height
        facts[f"{intervention}: change a gene"] = f"{n} features at q <= 0.05 on test cells"
        own_genes, nulls, direct = (
            median(own[name]) for name in ("specificity", "specificity_null", "direct_spearman")
        )
        if own_genes is not None:
            facts[f"{intervention}: own genes against others"] = f"{own_genes:.2f} times, nulls {nulls:.2f} (medians)"
        if direct is not None:
            facts[f"{intervention}: direct path"] = f"rank correlation {direct:.2f} with the effect (median)"
    return facts
