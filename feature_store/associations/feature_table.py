"""The table `features`: a row a feature with its class, density, scale, genes and top label.

Genes, labels and classes are chosen on cells that are not `test` cells, and named only where `test` cells confirm them
(`claims`). A class of cell context or batch whose labels are not significant there becomes the class that the rule
gives without them, and its confidence, which was that of the other class, is null.
"""

import numpy as np
import polars as pl

from feature_store.associations.claims import are_significant, holds_on_test, rank_order
from feature_store.associations.classes import ClassConfig, classify
from feature_store.associations.config import AssociationConfig
from feature_store.associations.gene_identity import Identity, excess_p
from feature_store.associations.range_inputs import CellInputs, FeatureRange
from feature_store.associations.ranges import MeasuredRun
from feature_store.associations.sorted_columns import SortedColumns
from feature_store.storage.schemas import SPLITS

MIN_LABEL_CELLS = 5
"""Least cells of a label on `select` that can be the top label of a feature."""
N_IDENTITY_GENES = 5
"""Largest number of genes by identity that a feature is named after."""


def measure_features(
    features: FeatureRange, cells: CellInputs, identity: Identity | None, config: AssociationConfig
) -> pl.DataFrame:
    """The columns of `features` for one range that need no correction.

    identity: the gene identity on `select` cells, None without tokens.
    """
    codes, split = SortedColumns.of(features.codes), np.asarray(cells.split, dtype=object)
    tokens = list(features.tokens.values())
    fired = sum(t.feature_tokens for t in tokens) if tokens else None
    n_tokens = sum(t.n_tokens for t in tokens)
    n_fires = codes.sizes()
    is_used = np.isin(split, SPLITS)
    cell_density = n_fires / max(int(is_used.sum()), 1)
    density = cell_density if fired is None else np.asarray(fired) / max(n_tokens, 1)
    dead = (n_fires == 0) & (density == 0)
    not_test = is_used & (split != "test")
    merged = None
    for t in (t for name, t in features.tokens.items() if name != "test"):
        merged = t if merged is None else merged + t
    classes = classify(
        codes.take(not_test),
        [x.take(not_test) for x in cells.labels if x.kind != "batch"],
        b.take(not_test) if (b := cells.label("batch")) else None,
        merged,
        units=cells.units.take(not_test) if cells.units else None,
        dead=dead,
        config=config.classes,
        first_feature=features.first,
    )
    basics = pl.DataFrame({"density": density, "cell_density": cell_density, "dead": dead})
    return (
        classes.hstack(basics)
        .hstack(_scales(codes.take(split == "train")))
        .hstack(_identity_genes(features, cells, identity))
    )


def feature_table(
    measured: MeasuredRun, top_genes: pl.DataFrame, labels: pl.DataFrame, *, n_genes: int, classes: ClassConfig
) -> pl.DataFrame:
    """The table, from what was measured, the columns feature_id and top_genes, and the finished table of labels.

    n_genes: the number of genes of the expression; classes: the thresholds of the class rule.
    """
    table = measured.read_all("features")
    identity = _confirmed_identity(table, n_tests=table.height * n_genes)
    # genes by expression before genes by identity
    table = table.drop("identity_genes", "identity_p").join(top_genes, on="feature_id", how="left")
    table = _confirmed_classes(table.with_columns(identity), labels, classes)
    return table.join(top_label(labels), on="feature_id", how="left").sort("feature_id")


def _identity_genes(features: FeatureRange, cells: CellInputs, identity: Identity | None) -> pl.DataFrame:
    """Columns identity_genes, those of the largest precision on `select`, and identity_p, their p on `test` cells."""
    schema = {"identity_genes": pl.List(pl.String), "identity_p": pl.List(pl.Float64)}
    n_features, test = features.codes.shape[1], features.tokens.get("test")
    if identity is None or test is None:
        return pl.DataFrame({name: [[]] * n_features for name in schema}, schema=schema)
    best = np.argsort(-identity.precision, axis=1, kind="stable")[:, :N_IDENTITY_GENES]
    known = np.take_along_axis(identity.precision, best, axis=1) > 0
    p = excess_p(test, best)
    rows = range(n_features)
    return pl.DataFrame(
        {
            "identity_genes": [[cells.genes[gene] for gene in best[i][known[i]]] for i in rows],
            "identity_p": [p[i][known[i]].tolist() for i in rows],
        },
        schema=schema,
    )


def _confirmed_identity(table: pl.DataFrame, *, n_tests: int) -> pl.Series:
    """The column top_identity_genes. p is corrected by Bonferroni over all features and genes, which is never below
    q and needs no other p.
    """
    named = [
        " ".join(np.array(genes, dtype=object)[are_significant(np.array(p) * n_tests)]) or None
        for genes, p in table.select("identity_genes", "identity_p").iter_rows()
    ]
    return pl.Series("top_identity_genes", named, dtype=pl.String)


def _confirmed_classes(table: pl.DataFrame, labels: pl.DataFrame, config: ClassConfig) -> pl.DataFrame:
    """The columns class, class_confidence and context_kind, with what `test` cells do not confirm taken back."""
    confirmed = pl.DataFrame(schema={"feature_id": pl.Int32, "label_kind": pl.String})
    if labels.width:
        confirmed = labels.filter(holds_on_test()).select("feature_id", "label_kind").unique()
    by_batch = confirmed.filter(label_kind="batch").select("feature_id", in_batch=True)
    by_context = confirmed.select("feature_id", context_kind="label_kind", in_context=True)
    found = table.join(by_batch, on="feature_id", how="left", maintain_order="left")
    found = found.join(by_context, on=["feature_id", "context_kind"], how="left", maintain_order="left")
    in_context, in_batch = (pl.col(name).fill_null(value=False) for name in ("in_context", "in_batch"))
    is_class = pl.col("class")
    taken_back = ((is_class == "cell-context") & ~in_context) | ((is_class == "batch") & ~in_batch)
    by_family = (pl.col("gene_effect") >= config.gene_effect).fill_null(value=False)
    without = pl.when(by_family).then(pl.lit("gene-identity")).otherwise(pl.lit("mixed"))
    return found.with_columns(
        pl.when(taken_back).then(without).otherwise(is_class).alias("class"),
        pl.when(~taken_back).then("class_confidence").alias("class_confidence"),
        pl.when(in_context).then("context_kind").alias("context_kind"),
    ).drop("in_context", "in_batch")


def _scales(train: SortedColumns) -> pl.DataFrame:
    """Columns mean (over all train cells), max, and p99, the 99th percentile of the nonzero codes; null for a feature
    that never fires in them.
    """
    columns = train.matrix
    values = [columns.data[a:b] for a, b in zip(columns.indptr[:-1], columns.indptr[1:], strict=True)]
    n = train.shape[0]
    return pl.DataFrame(
        {
            "mean": [float(v.sum(dtype=np.float64) / n) if n else None for v in values],
            "max": [float(v[-1]) if v.size else None for v in values],
            "p99": [float(np.percentile(v.astype(np.float64), 99)) if v.size else None for v in values],
        },
        schema={"mean": pl.Float64, "max": pl.Float64, "p99": pl.Float64},
    )


def top_label(labels: pl.DataFrame) -> pl.DataFrame:
    """The top label of each feature that has one, with its AUROC on `select` and on `test` cells.

    On `select` cells the labels that are no batches and have MIN_LABEL_CELLS are ranked: those that are significant
    there first, then by the lower bound of the interval over donors, and, where too few donors give an interval, by
    AUROC. The first is named if it is significant on `test` cells too, with an AUROC above .5.
    """
    columns = {"top_label": pl.String, "top_label_kind": pl.String, "top_label_auroc_select": pl.Float64}
    if labels.is_empty():
        return pl.DataFrame(schema={"feature_id": pl.Int32, **columns, "top_label_auroc": pl.Float64})
    keys = ["feature_id", "label_kind", "label"]
    usable = (pl.col("n_label") >= MIN_LABEL_CELLS) & (pl.col("label_kind") != "batch") & (pl.col("auroc") > 0.5)
    ranked = rank_order()
    order = [pl.col("feature_id"), *ranked, pl.col("label_kind"), pl.col("label")]
    best = (
        labels.filter((pl.col("split") == "select") & usable)
        .sort(order, descending=[False, *[True] * len(ranked), False, False], nulls_last=True)
        .unique("feature_id", keep="first", maintain_order=True)
    )
    test = labels.filter(holds_on_test() & (pl.col("auroc") > 0.5)).select(*keys, top_label_auroc="auroc")
    return best.join(test, on=keys, how="inner").select(
        "feature_id",
        pl.col("label").alias("top_label"),
        pl.col("label_kind").alias("top_label_kind"),
        pl.col("auroc").alias("top_label_auroc_select"),
        "top_label_auroc",
    )
