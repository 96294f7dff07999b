"""The tables of a circuit run: edges with z, p and q, and modules of features."""

from pathlib import Path
from typing import Any

import networkx as nx
import polars as pl

from feature_store.effects import Draws
from feature_store.storage import commit, schemas
from pipelines.circuit.actors import INTERVENTION
from pipelines.effects.actors import NULLS
from pipelines.effects.cells import SPLIT

Q = 0.05
EDGES_KEPT = 50
"""Pairs of smallest p that are kept for each earlier feature, beside all that are significant."""
PRIOR = 1000.0
"""Draws that the variance of all features counts as. The later codes are 0 up to a threshold, and whether the few draws
of a feature happen to pass it says little of the others: with 4, 16, 64 and a million, 0, 6, 21 and 45 of 39,510 pairs
on Kang's cells were significant. Each is as valid, because null draws get their z in the same way."""
MIN_MODULE = 3
"""Features of a module; smaller groups are edges by themselves."""


def write_edges(folder: Path, run: commit.Run, plan: dict[str, Any], *, from_sae: str, to_sae: str) -> commit.Run:
    """Write the table `feature_edge`, in as many parts as the draws have; q is over all pairs, also those left out."""
    draws = Draws(
        run=run, group="intervention", groups=(INTERVENTION,), target="to_feature_id", nulls=NULLS, prior=PRIOR
    )

    def finish(scored: pl.DataFrame) -> pl.DataFrame:
        rank = pl.col("p").rank("ordinal").over("feature_id")
        kept = scored.filter((pl.col("q") <= Q) | (rank <= EDGES_KEPT))
        base = pl.col("base").cast(pl.Float64)
        named = kept.rename({"feature_id": "from_feature_id"}).with_columns(
            from_sae=pl.lit(from_sae),
            to_sae=pl.lit(to_sae),
            split=pl.lit(SPLIT),
            share=pl.when(base > 0).then(pl.col("effect") / base),
            # less of the later feature without the earlier one: that one drives it
            relation=pl.when(pl.col("effect") < 0).then(pl.lit("excites")).otherwise(pl.lit("inhibits")),
            p_donor=pl.col("p_donor").fill_nan(None),
        )
        return schemas.conform("feature_edge", named.drop("intervention", "base"))

    return draws.write_scored(folder, plan, finish)


def modules_frame(edges: pl.DataFrame, *, from_sae: str, to_sae: str) -> pl.DataFrame:
    """The modules of the significant edges: a row for each feature that is in one, the largest module first.

    Modules are communities of the graph of features (Louvain: Blondel et al. 2008, arXiv:0803.0476) with weights |z|,
    because nearly all features hang together by some edge.
    """
    strong = edges.filter((pl.col("q") <= Q) & pl.col("z").is_not_null())
    graph: nx.Graph = nx.Graph()
    for a, b, z in strong.select("from_feature_id", "to_feature_id", "z").sort(pl.all()).iter_rows():
        graph.add_edge((from_sae, a), (to_sae, b), weight=abs(z))
    groups = nx.community.louvain_communities(graph, weight="weight", seed=0) if len(graph) else []
    groups = sorted((group for group in groups if len(group) >= MIN_MODULE), key=lambda own: (-len(own), min(own)))
    rows = [
        {
            "module": number,
            "sae": sae,
            "feature_id": feature,
            "n_features": len(group),
            "n_edges": sum(other in group for other in graph[sae, feature]),
        }
        for number, group in enumerate(groups)
        for sae, feature in sorted(group)
    ]
    return schemas.conform("edge_module", pl.DataFrame(rows, schema=schemas.empty("edge_module").schema))
