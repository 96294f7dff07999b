"""The table `features`: a row a feature with its class, density, scale, genes and top label."""

import numpy as np
import polars as pl

from feature_store.associations.classes import classify
from feature_store.associations.config import AssociationConfig
from feature_store.associations.gene_identity import Identity
from feature_store.associations.inputs import Sparse
from feature_store.associations.range_inputs import CellInputs, FeatureRange
from feature_store.associations.ranges import MeasuredRun
from feature_store.associations.top_names import top_names

MIN_LABEL_CELLS = 5
"""Least cells of a label on `select` that can be the top label of a feature."""


def measure_features(
    features: FeatureRange, cells: CellInputs, identity: Identity | None, config: AssociationConfig
) -> pl.DataFrame:
    """The columns of `features` for one range that need no correction.

    identity: the gene identity on `select` cells, None without tokens.
    """
    codes, split = features.codes, np.asarray(cells.split, dtype=object)
    tokens = list(features.tokens.values())
    fired = sum(t.feature_tokens for t in tokens) if tokens else None
    n_tokens = sum(t.n_tokens for t in tokens)
    n_fires = np.bincount(codes.indices, minlength=codes.shape[1])
    cell_density = n_fires / max(codes.shape[0], 1)
    density = cell_density if fired is None else np.asarray(fired) / max(n_tokens, 1)
    dead = (n_fires == 0) & (density == 0)
    not_test = split != "test"
    merged = None
    for t in (t for name, t in features.tokens.items() if name != "test"):
        merged = t if merged is None else merged + t
    classes = classify(
        codes[np.flatnonzero(not_test)],
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
        .hstack(_scales(codes[np.flatnonzero(split == "train")]))
        .with_columns(
            pl.Series(
                "top_identity_genes",
                [None] * dead.size if identity is None else top_names(identity.precision, cells.genes, 5),
                dtype=pl.String,
            )
        )
    )


def feature_table(measured: MeasuredRun, top_genes: pl.DataFrame, labels: pl.DataFrame) -> pl.DataFrame:
    """The table, from what was measured, the columns feature_id and top_genes, and the finished table of labels."""
    table = measured.read_all("features").join(top_genes, on="feature_id", how="left")
    # genes by expression before genes by identity
    table = table.select(pl.exclude("top_identity_genes"), "top_identity_genes")
    return table.join(_top_label(labels), on="feature_id", how="left").sort("feature_id")


def _scales(train: Sparse) -> pl.DataFrame:
    """Columns mean (over all train cells), max, and p99, the 99th percentile of the nonzero codes; null for a feature
    that never fires in them.
    """
    columns = train.tocsc()
    values = [columns.data[a:b] for a, b in zip(columns.indptr[:-1], columns.indptr[1:], strict=True)]
    n = train.shape[0]
    return pl.DataFrame(
        {
            "mean": [float(v.sum(dtype=np.float64) / n) if n else None for v in values],
            "max": [float(v.max()) if v.size else None for v in values],
            "p99": [float(np.percentile(v.astype(np.float64), 99)) if v.size else None for v in values],
        },
        schema={"mean": pl.Float64, "max": pl.Float64, "p99": pl.Float64},
    )


def _top_label(labels: pl.DataFrame) -> pl.DataFrame:
    """The top label of each feature: the label with the largest AUROC on `select` cells among those with enough cells
    that are no batches, with its AUROC on `test` cells.
    """
    columns = {"top_label": pl.String, "top_label_kind": pl.String, "top_label_auroc_select": pl.Float64}
    if labels.is_empty():
        return pl.DataFrame(schema={"feature_id": pl.Int32, **columns, "top_label_auroc": pl.Float64})
    keys = ["feature_id", "label_kind", "label"]
    usable = (pl.col("n_label") >= MIN_LABEL_CELLS) & (pl.col("label_kind") != "batch") & (pl.col("auroc") > 0.5)
    best = (
        labels.filter((pl.col("split") == "select") & usable)
        .sort("feature_id", "auroc", "label_kind", "label", descending=[False, True, False, False])
        .unique("feature_id", keep="first", maintain_order=True)
    )
    test = labels.filter(pl.col("split") == "test").select(*keys, pl.col("auroc").alias("top_label_auroc"))
    return best.join(test, on=keys, how="left").select(
        "feature_id",
        pl.col("label").alias("top_label"),
        pl.col("label_kind").alias("top_label_kind"),
        pl.col("auroc").alias("top_label_auroc_select"),
        "top_label_auroc",
    )
