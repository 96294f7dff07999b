"""The gene sets that features go with."""

import polars as pl

from feature_store.storage import commit
from feature_store.storage.layout import Layout

Q = 0.05


def significant_sets(layout: Layout, sae: str, associations: str) -> pl.DataFrame:
    """The significant gene sets of all features of an SAE that fire; a row without names for those without.

    Columns: sae, feature_id, collection, gene_set.
    """
    folder = layout.associations_dir(associations)
    alive = commit.read_table(folder / "features").filter(~pl.col("dead")).select("feature_id")
    sets = commit.read_table(folder / "feature_geneset").filter(pl.col("q") <= Q)
    own = alive.join(sets.select("feature_id", "collection", "gene_set"), on="feature_id", how="left")
    return own.with_columns(sae=pl.lit(sae))
