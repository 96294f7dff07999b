"""The table `feature_geneset`: a row a feature, gene set and split, where they overlap or where ranks stand out."""

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from feature_store.associations.config import AssociationConfig
from feature_store.associations.gene_set_enrichment import METHOD, over_representation, rank_enrichment
from feature_store.associations.gene_sets import GeneSets
from feature_store.associations.gene_table import GeneStatistics
from feature_store.associations.inputs import Bools
from feature_store.associations.multiple_testing import q_within
from feature_store.associations.range_inputs import CellInputs
from feature_store.associations.split_facts import SplitFacts, split_columns, with_split


def measure_gene_sets(genes: Mapping[str, GeneStatistics], cells: CellInputs, first: int) -> pl.DataFrame:
    """The rank tests of all features x sets of a range, with the collection and the gene set as numbers from 0."""
    frames = []
    for name, split in genes.items():
        for place, sets in enumerate(cells.gene_sets):
            ranks = rank_enrichment(split.expression.pearson, sets.membership(cells.genes), split.n_cells > 0)
            n_features, n_sets = ranks.p.shape
            frames.append(
                with_split(
                    name,
                    feature_id=np.repeat(np.arange(first, first + n_features, dtype=np.int32), n_sets),
                    collection=np.full(ranks.p.size, place, dtype=np.int32),
                    gene_set=np.tile(np.arange(n_sets, dtype=np.int32), n_features),
                    rank_biserial=pl.Series(ranks.rank_biserial.ravel()).fill_nan(None),
                    p_rank=ranks.p.ravel(),
                )
            )
    return pl.concat(frames) if frames else pl.DataFrame()


class GeneSetTable:
    """Tests every feature against every gene set, range by range; the correction needs the p of all of them."""

    def __init__(
        self,
        gene_sets: Sequence[GeneSets],
        genes: Sequence[str],
        splits: Mapping[str, SplitFacts],
        config: AssociationConfig,
    ) -> None:
        self._sets, self._splits, self._config = gene_sets, splits, config
        self._membership = [sets.membership(genes) for sets in gene_sets]
        self._frames: list[pl.DataFrame] = []

    def add(self, ranks: pl.DataFrame, genes_of_feature: Mapping[str, Bools]) -> None:
        """Test the genes of the features of one range.

        ranks: the result of `measure_gene_sets`; genes_of_feature: by split, bool [n_features n_genes].
        """
        for split, shared in self._splits.items():
            mine = genes_of_feature[split]
            n_mine = (mine & shared.detected).sum(axis=1)
            for place, membership in enumerate(self._membership):
                over = over_representation(mine, membership, shared.detected, shared.n_cells)
                n_set = np.asarray(membership[np.flatnonzero(shared.detected)].sum(axis=0)).ravel()
                rows = ranks.filter((pl.col("split") == split) & (pl.col("collection") == place))
                self._frames.append(
                    rows.with_columns(
                        overlap=over.overlap.ravel(),
                        n_set=np.tile(n_set, mine.shape[0]).astype(np.int64),
                        n_genes=np.repeat(n_mine, n_set.size),
                        odds_ratio=over.odds_ratio.ravel(),
                        p=over.p.ravel(),
                        p_matched=over.p_matched.ravel(),
                    )
                )

    def table(self) -> pl.DataFrame:
        """The table: the pairs with an overlap, or with q_rank <= alpha, on any split."""
        if not self._frames:
            return pl.DataFrame()
        table = pl.concat(self._frames).with_columns(
            q=q_within("p", "collection"),
            q_matched=q_within("p_matched", "collection"),
            q_rank=q_within("p_rank", "collection"),
        )
        keys = ["feature_id", "collection", "gene_set"]
        wanted = pl.any_horizontal(pl.col("overlap") > 0, pl.col("q_rank") <= self._config.alpha).any().over(keys)
        named = pl.DataFrame(
            {
                "collection": pl.Series([c for c, s in enumerate(self._sets) for _ in s.names], dtype=pl.Int32),
                "gene_set": pl.Series([i for s in self._sets for i, _ in enumerate(s.names)], dtype=pl.Int32),
                "collection_name": pl.Series([s.collection for s in self._sets for _ in s.names], dtype=pl.String),
                "set_name": pl.Series([name for s in self._sets for name in s.names], dtype=pl.String),
            }
        )
        kept = table.filter(wanted).join(named, on=["collection", "gene_set"], how="left")
        return kept.select(
            "feature_id",
            pl.col("collection_name").alias("collection"),
            pl.col("set_name").alias("gene_set"),
            "split",
            "overlap",
            "n_set",
            "n_genes",
            "odds_ratio",
            "rank_biserial",
            pl.col("split")
            .replace_strict(
                list(self._splits), [int(s.detected.sum()) for s in self._splits.values()], return_dtype=pl.Int64
            )
            .alias("n"),
            split_columns(self._splits)[1],
            "p",
            "p_matched",
            "p_rank",
            pl.lit(METHOD).alias("method"),
            "q",
            "q_matched",
            "q_rank",
        ).sort(*keys, "split")
