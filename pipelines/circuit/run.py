"""The stage: measure shards of earlier features on actors, then pool the nulls and write the tables.

draws/             mean effects of features and of their null directions, a part for a few of them
feature_edge/      a row for each significant pair of an earlier and a later feature, and for the next ones
edge_module/    the modules of features, a row for each member
edge_module_gene_set/   the gene sets of modules
"""

from pathlib import Path
from typing import Any

import polars as pl

from feature_store.modules import module_gene_sets, significant_sets
from feature_store.query.runs import newest_run_of
from feature_store.storage import commit
from feature_store.storage.layout import CIRCUIT_TABLES, Layout
from pipelines.circuit.actors import CircuitMeasurer
from pipelines.circuit.request import CircuitRequest
from pipelines.circuit.tables import Q, modules_frame, write_edges
from pipelines.config import CircuitOptions
from pipelines.effects.shards import measure_features
from pipelines.moved_data import record_new_place
from pipelines.runtime.checks import check_before_work
from pipelines.runtime.stage import Clock, StageResult


def circuit(options: CircuitOptions, store: Path, *, address: str | None = None) -> StageResult:
    """Measure the edges between the features of two SAEs; shards and tables that are there are not made again.

    Raises:
        UsageError: a feature is unknown or never fires, the SAEs do not belong together, or the data moved or changed.
        ConfigError: the second SAE does not lie later in the model; nothing is written.
        NotFoundError: there is no such SAE, or the first has no associations.
    """
    clock = Clock()
    layout = Layout(store)
    check_before_work(layout, address=address)
    request = CircuitRequest.of(options, layout)
    record_new_place(layout, request.chain.associations.dataset, options.data)
    folder = layout.circuits_dir(request.plan.id)
    done, reused = measure_features(
        CircuitMeasurer,
        request.job,
        lambda draws, n_shards: _write_tables(request, folder, draws, n_shards),
        folder=folder,
        plan=request.plan,
        features=request.measured,
        tables=CIRCUIT_TABLES,
        options=options,
        address=address,
    )
    return StageResult(
        kind="circuits",
        run=folder.name,
        path=folder,
        done=done,
        reused=reused,
        seconds=clock.seconds,
        facts=_facts(request, folder),
    )


def _write_tables(request: CircuitRequest, folder: Path, run: commit.Run, n_shards: int) -> None:
    plan, sae = request.plan, request.chain.associations.sae
    of_draws: dict[str, Any] = {"draws": run.manifest().sha}
    table = plan.table("feature_edge", n_shards=n_shards, **of_draws)
    edges = write_edges(folder / "feature_edge", run, table, from_sae=sae, to_sae=request.later)
    significant = pl.concat([commit.read_part(path).filter(pl.col("q") <= Q) for path in edges.checked_parts()])
    modules = modules_frame(significant, from_sae=sae, to_sae=request.later)
    commit.write_table(folder / "edge_module", lambda: modules, plan.table("edge_module", **of_draws))
    commit.write_table(
        folder / "edge_module_gene_set",
        lambda: module_gene_sets(modules, _gene_sets(request)),
        plan.table("edge_module_gene_set", **of_draws, gene_sets=_associations(request)),
    )


def _associations(request: CircuitRequest) -> dict[str, str]:
    """The associations of each SAE that has some on the data set of the cells."""
    found = {request.chain.associations.sae: request.chain.run}
    of = {"sae": request.later, "dataset": request.chain.associations.dataset}
    if later := newest_run_of(request.layout, "associations", of):
        found[request.later] = later.run
    return found


def _gene_sets(request: CircuitRequest) -> pl.DataFrame:
    """The significant gene sets of all features that fire, of both SAEs; a row without names for those without."""
    return pl.concat(significant_sets(request.layout, sae, run) for sae, run in _associations(request).items())


def _facts(request: CircuitRequest, folder: Path) -> dict[str, object]:
    edges = commit.read_table(folder / "feature_edge")
    modules = commit.read_table(folder / "edge_module")
    strong = edges.filter(pl.col("q") <= Q)
    return {
        "from": f"{request.chain.associations.sae} at {request.chain.sae.site}",
        "to": f"{request.later} at {request.later_plan.site}",
        "ablated": f"{len(request.measured)} features",
        "nulls": f"{request.n_nulls} random directions and {request.n_nulls} mixtures of features each",
        "edges": f"{strong.height} at q <= {Q} on test cells, from {strong['from_feature_id'].n_unique()} features to "
        f"{strong['to_feature_id'].n_unique()}",
        "modules": modules["module"].n_unique(),
    }
