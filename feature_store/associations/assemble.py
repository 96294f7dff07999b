"""The tables of the store about features, from what was measured of each range of features.

Everything is chosen on `select` cells and reported on `select` and `test` cells: thresholds, the genes of a feature
(for its text and its gene sets), and its top label. Classes and scales use the cells that are not `test` cells; the SAE
saw the `train` cells, but without labels. A feature is named only after what is significant on `test` cells (`claims`).
q is corrected over ALL tests of a kind of labels, of the genes, or of a collection of gene sets, split by split
(`multiple_testing`), also over pairs that are not stored: of features x genes and features x sets only the pairs that
somebody could ask for are kept (`AssociationConfig`), because the full table would be gigabytes of noise.
Cost: 16 bytes a test of features x genes of each split (4096 x 2000: 131 MB), the pairs of one range, and the other
tables.
"""

from collections.abc import Callable, Sequence

import polars as pl

from feature_store.associations.config import AssociationConfig
from feature_store.associations.feature_table import feature_table
from feature_store.associations.gene_set_table import GeneSetTable
from feature_store.associations.gene_sets import GeneSets, table_of_sets
from feature_store.associations.gene_table import GeneTable
from feature_store.associations.label_table import label_table
from feature_store.associations.number_table import number_table
from feature_store.associations.ranges import MeasuredRun
from feature_store.associations.split_facts import read_split_facts
from feature_store.storage import schemas


def assemble_measured(
    measured: MeasuredRun,
    genes: Sequence[str],
    gene_sets: Sequence[GeneSets] = (),
    config: AssociationConfig | None = None,
    *,
    keep_pairs: Callable[[int, pl.DataFrame], object] | None = None,
) -> dict[str, pl.DataFrame]:
    """The tables features, feature_label, feature_number, feature_gene, feature_geneset, feature_token and gene_sets,
    sorted, in their schemas.

    genes: names of the columns of the expression; gene_sets: the collections that were measured. If keep_pairs is
    given, it is called with the number of each range in order and its rows of `feature_gene`, which is by far the
    largest table, and that table is left out of the result.
    """
    config = config or AssociationConfig()
    splits = read_split_facts(measured)
    labels = label_table(measured)
    gene_table = GeneTable(measured, splits, genes, config)
    set_table = GeneSetTable(gene_sets, genes, splits, config)
    pairs: list[pl.DataFrame] = []
    top_genes: list[pl.DataFrame] = []
    for number in range(len(measured.bounds) - 1):
        found = gene_table.read(number)
        rows = schemas.conform("feature_gene", found.rows)
        if keep_pairs is None:
            pairs.append(rows)
        else:
            keep_pairs(number, rows)
        top_genes.append(found.top_genes)
        set_table.add(measured.read("sets", number), found.genes_of_feature)
    tables = {
        "features": feature_table(measured, pl.concat(top_genes), labels, n_genes=len(genes), classes=config.classes),
        "feature_label": labels,
        "feature_number": number_table(measured),
        "feature_geneset": set_table.table(),
        "feature_token": measured.read_all("tokens"),
        "gene_sets": table_of_sets(gene_sets, genes),
    }
    finished = {
        name: schemas.conform(name, frame) if frame.width else schemas.empty(name) for name, frame in tables.items()
    }
    return finished | ({"feature_gene": pl.concat(pairs)} if keep_pairs is None else {})
