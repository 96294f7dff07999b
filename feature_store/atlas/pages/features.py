"""All features at once: the table beside the scatter, and how each of them goes with one label."""

from collections.abc import Iterator

import polars as pl

from feature_store.atlas.columns import encode
from feature_store.atlas.opened import Opened, place
from feature_store.atlas.resources import Route

CATEGORIES = ("class", "top_label", "top_label_kind", "context_kind")
EFFECTS = ("auroc", "rank_biserial", "q")


def table(opened: Opened) -> bytes:
    """A row a feature: every column of `features`, and x, y."""
    if not opened.has("features"):
        return encode(pl.DataFrame())
    found = opened.features
    known = [name for name in CATEGORIES if name in found.columns]
    return encode(found.with_columns(pl.col(known).cast(pl.Categorical)))


def label_effects(opened: Opened, label: str) -> bytes:
    """A row a feature, in the order of the table: how its code goes with a label on `test` cells."""
    kind, name = opened.labels.row(place(label, opened.labels.height))
    rows = opened.store.frame("feature_label").filter(
        (pl.col("label_kind") == kind) & (pl.col("label") == name) & (pl.col("split") == "test")
    )
    found = rows.select("feature_id", *EFFECTS).collect()
    order = opened.features.select("feature_id")
    return encode(order.join(found, on="feature_id", how="left", maintain_order="left").drop("feature_id"))


def _labels(opened: Opened) -> Iterator[tuple[str]]:
    return ((str(i),) for i in range(opened.labels.height))


ROUTES = (
    Route(pattern="features.cols", make=table),
    Route(pattern="labels/{id}.cols", make=label_effects, names=_labels),
)
