"""The Batch page: what the scatter of batch effect against cell-context effect needs beside the table of features.

The two effects are columns of `features`, measured on train and select cells. The batch with the largest effect on a
feature is chosen on `select` cells, and its figures are those of `test` cells. A batch without cells in one of these
splits is left out.
"""

from typing import Any

import polars as pl

from feature_store.associations.claims import is_significant
from feature_store.associations.classes import ClassConfig
from feature_store.atlas.columns import encode
from feature_store.atlas.data import AtlasData
from feature_store.atlas.routes import Route, json_bytes
from feature_store.storage.schemas import SPLITS

KEY = ("feature_id", "label")
FIGURES = ("auroc", "q")


def about(data: AtlasData) -> bytes:
    """The batches with their cells in each split, and the largest number of features that a steering run takes."""
    if not data.has("cells"):
        return json_bytes(data.missing("cells"))
    batches = _batches(data)
    if len(batches) < 2:
        return json_bytes(_no_batches(data, batches))
    if not data.has("features"):
        return json_bytes(data.missing("features"))
    features = data.features
    measured = {"batch_effect", "context_effect"} <= set(features.columns)
    fires = features.filter(~pl.col("dead") & (pl.col("density") > 0)).height
    facts = {
        "batches": batches,
        "n_in_both": _in_both(data),
        "n_cell_types": data.store.panel_cells().select(pl.col("cell_type").drop_nulls().n_unique()).collect().item(),
        "threshold": ClassConfig().cell_effect,
        "run": data.store.lineage.associations,
        "n_measured": features.drop_nulls(["batch_effect", "context_effect"]).height if measured else 0,
        "n_firing": fires,
        # the null of random features needs as many others (`scsae steer`)
        "most": fires // 2,
    }
    return json_bytes(facts)


def best_batches(data: AtlasData) -> bytes:
    """A row a feature, in the order of the table: its batch of largest effect on `select` cells, with its test figures.

    The batch is null where no batch has cells in both splits, and where it has q > .05 (`claims`) or the other sign on
    `test` cells.
    """
    schema = {"batch": pl.String, "auroc_select": pl.Float64, **dict.fromkeys(FIGURES, pl.Float64)}
    if not data.has("features"):
        return encode(pl.DataFrame(schema=schema))
    if not data.has("feature_label"):
        empty = [pl.lit(None, dtype).alias(name) for name, dtype in schema.items()]
        return encode(_as_categories(data.features.select(empty)))
    rows = data.store.frame("feature_label").filter(pl.col("label_kind") == "batch").drop_nulls("auroc")
    test = rows.filter(pl.col("split") == "test").select(*KEY, *FIGURES)
    select = rows.filter(pl.col("split") == "select").select(*KEY, auroc_select="auroc")
    strength = (pl.col("auroc_select") - 0.5).abs()
    # careful: two batches mirror each other, so ties go to the batch in which the feature is stronger
    order = [pl.col("feature_id"), -strength.round(12), -pl.col("auroc_select"), pl.col("label")]
    found = select.join(test, on=KEY, how="inner").sort(order).unique("feature_id", keep="first").collect()
    ordered = data.features.select("feature_id").join(found, on="feature_id", how="left", maintain_order="left")
    same_sign = (pl.col("auroc") > 0.5) == (pl.col("auroc_select") > 0.5)
    named = ordered.with_columns(pl.when(is_significant() & same_sign).then("label").alias("batch"))
    return encode(_as_categories(named.select(list(schema))))


def _as_categories(found: pl.DataFrame) -> pl.DataFrame:
    return found.with_columns(pl.col("batch").cast(pl.Categorical))


def _batches(data: AtlasData) -> list[dict[str, Any]]:
    """The cells of each split in every batch, sorted by batch."""
    counts = data.store.panel_cells().drop_nulls("batch").group_by("batch")
    n = [(pl.col("split") == split).sum().alias(split) for split in SPLITS]
    return counts.agg(n).sort("batch").collect().to_dicts()


def _in_both(data: AtlasData) -> int:
    """The number of batches that features were tested for on both select and test cells."""
    if not data.has("feature_label"):
        return 0
    rows = data.store.frame("feature_label").filter(pl.col("label_kind") == "batch")
    splits = rows.select("label", "split").unique().collect()
    return splits.filter(split="select").join(splits.filter(split="test"), on="label").height


def _no_batches(data: AtlasData, batches: list[dict[str, Any]]) -> dict[str, Any]:
    of = "all cells are of one batch" if batches else "no column of the cells is named as their batch"
    command = f"scsae extract DATA --batch COLUMN {data.store.layout.store_option}"
    return {"missing": {"table": "batch", "command": command}, "why": f"There is nothing to compare: {of}."}


ROUTES = (
    Route(pattern="batch.json", make=about),
    Route(pattern="batch.cols", make=best_batches),
)
