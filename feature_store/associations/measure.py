"""Everything that can be measured of a range of features without the other features.

Ranks need all cells of a feature, so the work is not split by cells; but no statistic of a feature needs another
feature until p is corrected for the number of tests (`assemble`). So the work is split into ranges of features: a range
holds its own codes for all cells, and reads the expression one range of genes at a time. The statistics of a feature
are the same to the bit, whatever the bounds of the ranges are.

The result of a range is small: rows of labels, classes and gene sets; all p of features x genes as bare numbers, as the
correction is over all tests; and those pairs themselves that can still be kept.
Cost: 256 features with 400 thousand nonzeros in 50 thousand cells, 2,000 genes and 46 labels take 7.5 CPU seconds;
codes that fire in three quarters of the cells take 2 seconds a million nonzeros. Memory: 70 bytes a nonzero of the
range's codes (`ranges.NONZERO_BYTES`), 80 bytes a pair of a feature and a gene (two splits), .3 GB of dense columns and
permuted labels, and the expression that is kept (`gene_correlation.KEPT_BYTES`), 16 bytes a nonzero.
"""

from dataclasses import replace

import numpy as np
import polars as pl

from feature_store.associations.config import AssociationConfig
from feature_store.associations.feature_table import measure_features
from feature_store.associations.gene_correlation import GeneTiles
from feature_store.associations.gene_set_table import measure_gene_sets
from feature_store.associations.gene_table import measure_genes, pair_rows, split_rows
from feature_store.associations.label_table import measure_labels
from feature_store.associations.number_table import measure_numbers
from feature_store.associations.range_inputs import CellInputs, FeatureRange
from feature_store.associations.ranges import Measured
from feature_store.associations.sorted_columns import SortedColumns
from feature_store.associations.split_facts import with_split


def measure(
    features: FeatureRange, cells: CellInputs, tiles: GeneTiles, config: AssociationConfig | None = None
) -> Measured:
    """Measure one range of features. Raises InputError for token counts of another gene axis."""
    config = config or AssociationConfig()
    features = replace(features, codes=SortedColumns.of(features.codes))
    genes = measure_genes(features, tiles)
    first = features.first
    labels = measure_labels(features, cells, config.replicates)
    return Measured(
        features=measure_features(features, cells, genes["select"].identity, config),
        labels=labels.table,
        numbers=measure_numbers(features, cells),
        minima=labels.minima,
        pairs=pair_rows(genes, first, config),
        tests=pl.concat([with_split(name, p=np.sort(s.expression.p, axis=None)) for name, s in genes.items()]),
        sets=measure_gene_sets(genes, cells, first),
        tokens=_token_rows(features.top_tokens, config),
        splits=split_rows(genes, tiles),
    )


def _token_rows(top: pl.DataFrame | None, config: AssociationConfig) -> pl.DataFrame:
    if top is None:
        return pl.DataFrame()
    by = ["feature_id", "value", "cell_idx", "token_pos"]
    # special tokens are no gene's
    ranked = top.drop_nulls("gene").sort(by, descending=[False, True, False, False])
    return ranked.group_by("feature_id", maintain_order=True).head(config.n_tokens)
