"""Batch or biology: what the scatter of batch effect against cell-context effect needs beside the table of features.

The two effects are columns of `features`, measured on the cells that are not test cells. The batch that goes with a
feature most is chosen on `select` cells, and its figures are those of `test` cells; a batch that lies in one split
alone can be chosen and not be tested, or the other way round, and has none.
"""

from typing import Any

import polars as pl

from feature_store.associations.classes import ClassConfig
from feature_store.atlas.columns import encode
from feature_store.atlas.data import AtlasData
from feature_store.atlas.routes import Route, json_bytes
from feature_store.storage.schemas import SPLITS

KEY = ("feature_id", "label")
FIGURES = ("auroc", "q")


def about(data: AtlasData) -> bytes:
    """What the batches are, where they lie, and how many features a steering run takes at most."""
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
        "n_cell_types": data.store.frame("cells").select(pl.col("cell_type").drop_nulls().n_unique()).collect().item(),
        "threshold": ClassConfig().cell_effect,
        "run": data.store.lineage.associations,
        "n_measured": features.drop_nulls(["batch_effect", "context_effect"]).height if measured else 0,
        "n_firing": fires,
        # the null of random features needs as many others (`scsae steer`)
        "most": fires // 2,
    }
    return json_bytes(facts)


def best_batches(data: AtlasData) -> bytes:
    """A row a feature, in the order of the table: the batch that it goes with most on `select`, and its test figures.

    Without a batch that both splits hold there is none.
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
    # of two batches each is the other's mirror image: take the one in which the feature is stronger
    order = [pl.col("feature_id"), -strength.round(12), -pl.col("auroc_select"), pl.col("label")]
    found = select.join(test, on=KEY, how="inner").sort(order).unique("feature_id", keep="first").collect()
    ordered = data.features.select("feature_id").join(found, on="feature_id", how="left", maintain_order="left")
    return encode(_as_categories(ordered.rename({"label": "batch"}).select(list(schema))))


def _as_categories(found: pl.DataFrame) -> pl.DataFrame:
    return found.with_columns(pl.col("batch").cast(pl.Categorical))


def _batches(data: AtlasData) -> list[dict[str, Any]]:
    """Cells of each split in every batch, the batches by name."""
    counts = data.store.frame("cells").drop_nulls("batch").group_by("batch")
    n = [(pl.col("split") == split).sum().alias(split) for split in SPLITS]
    return counts.agg(n).sort("batch").collect().to_dicts()


def _in_both(data: AtlasData) -> int:
    """Batches that a feature is held against on select cells and on test cells."""
    if not data.has("feature_label"):
        return 0
    rows = data.store.frame("feature_label").filter(pl.col("label_kind") == "batch")
    splits = rows.select("label", "split").unique().collect()
    return splits.filter(split="select").join(splits.filter(split="test"), on="label").height


def _no_batches(data: AtlasData, batches: list[dict[str, Any]]) -> dict[str, Any]:
    of = "all cells are of one batch" if batches else "no column of the cells is named as their batch"
    command = f"scsae extract DATA --batch COLUMN --store {data.store.layout.root}"
    return {"missing": {"table": "batch", "command": command}, "why": f"There is nothing to compare: {of}."}


ROUTES = (
    Route(pattern="batch.json", make=about),
    Route(pattern="batch.cols", make=best_batches),
)
