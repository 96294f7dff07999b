"""The gene sets that the features of a module go with, beyond chance."""

import numpy as np
import polars as pl

from feature_store.associations.multiple_testing import benjamini_hochberg
from feature_store.storage import commit, schemas
from feature_store.storage.layout import Layout

Q = 0.05


def module_gene_sets(modules: pl.DataFrame, of_features: pl.DataFrame) -> pl.DataFrame:
    """The gene sets that more features of a module go with than chance would give, by the hypergeometric test.

    Args:
        modules: module, sae and feature_id of each member.
        of_features: sae, feature_id, collection and gene_set of each significant pair, and of features without any
            gene set a row without names: the features among which those of a module are drawn.
    """
    from scipy.stats import hypergeom

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


def significant_sets(layout: Layout, sae: str, associations: str) -> pl.DataFrame:
    """The significant gene sets of all features of an SAE that fire; a row without names for those without.

    Columns: sae, feature_id, collection, gene_set.
    """
    folder = layout.associations_dir(associations)
    alive = commit.read_table(folder / "features").filter(~pl.col("dead")).select("feature_id")
    sets = commit.read_table(folder / "feature_geneset").filter(pl.col("q") <= Q)
    own = alive.join(sets.select("feature_id", "collection", "gene_set"), on="feature_id", how="left")
    return own.with_columns(sae=pl.lit(sae))
