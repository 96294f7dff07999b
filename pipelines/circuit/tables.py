"""The tables of a circuit run: edges with z, p and q, modules of features, and the gene sets of modules."""

from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import polars as pl
from scipy.stats import hypergeom

from feature_store.associations.multiple_testing import benjamini_hochberg
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
    return schemas.conform("feature_module", pl.DataFrame(rows, schema=schemas.empty("feature_module").schema))


def gene_sets_frame(modules: pl.DataFrame, of_features: pl.DataFrame) -> pl.DataFrame:
    """The gene sets that more features of a module go with than chance would give, by the hypergeometric test.

    Args:
        modules: the table `feature_module`.
        of_features: sae, feature_id, collection and gene_set of each significant pair, and of features without any
            gene set a row without names: the features among which those of a module are drawn.
    """
    empty = schemas.empty("module_gene_set")
    members = modules.join(of_features.select("sae", "feature_id").unique(), on=["sae", "feature_id"], how="semi")
    pairs = of_features.drop_nulls("gene_set").unique(["sae", "feature_id", "collection", "gene_set"])
    if not members.height or not pairs.height:
        return empty
    n_all = of_features.select("sae", "feature_id").n_unique()
    with_set = pairs.group_by("collection", "gene_set").agg(n_with_set=pl.len().cast(pl.Int64))
    known = members.group_by("module").agg(n_known=pl.len().cast(pl.Int64))
    hits = (
        members.join(pairs, on=["sae", "feature_id"])
        .group_by("module", "collection", "gene_set")
        .agg(n_features=pl.len().cast(pl.Int64))
        .join(with_set, on=["collection", "gene_set"])
        .join(known, on="module")
    )
    n_features, n_with_set, n_known = (hits[name].to_numpy() for name in ("n_features", "n_with_set", "n_known"))
    p = np.asarray(hypergeom.sf(n_features - 1, n_all, n_with_set, n_known))
    # pairs of a module and a set without a hit have p 1, and count among the tests
    n_tests = known.height * with_set.height
    q = benjamini_hochberg(np.concatenate([p, np.ones(n_tests - hits.height)]))[: hits.height]
    found = hits.with_columns(p=pl.Series(p), q=pl.Series(q), n_all=pl.lit(n_all, dtype=pl.Int64))
    return schemas.conform("module_gene_set", found.sort("module", "p", "collection", "gene_set"))
