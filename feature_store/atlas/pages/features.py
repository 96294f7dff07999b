"""All features at once: the table beside the scatter, and how each of them goes with one label."""

from collections.abc import Iterator

import polars as pl

from feature_store.atlas.columns import encode
from feature_store.atlas.opened import Opened, place
from feature_store.atlas.resources import Route

CATEGORIES = ("class", "top_label", "top_label_kind", "context_kind")
MOST_KEPT = 20_000_000
"""Rows of labels that are kept in memory, at most: a colour that changes within a tenth of a second has no time to read
100,000 features of 40 labels (.25 s); they take 100 MB. Of more, each label is read when it is asked for."""
_TESTED = pl.col("split") == "test"


def table(opened: Opened) -> bytes:
    """A row a feature: every column of `features`, and x, y."""
    return opened.once(_table)


def label_effects(opened: Opened, label: str) -> bytes:
    """A row a feature, in the order of the table: AUROC of its code for a label on `test` cells, and q."""
    kind, name = opened.labels.row(place(label, opened.labels.height))
    if opened.labels.height * opened.features.height > MOST_KEPT:
        rows = opened.store.frame("feature_label").filter(_TESTED, label_kind=kind, label=name)
        found = rows.select("feature_id", "auroc", "q").collect()
    else:
        found = opened.once(_effects).get((kind, name), pl.DataFrame())
    order = opened.features.select("feature_id")
    return encode(order.join(found, on="feature_id", how="left", maintain_order="left").drop("feature_id"))


def _table(opened: Opened) -> bytes:
    if not opened.has("features"):
        return encode(pl.DataFrame())
    known = [name for name in CATEGORIES if name in opened.features.columns]
    return encode(opened.features.with_columns(pl.col(known).cast(pl.Categorical)))


def _effects(opened: Opened) -> dict[tuple[object, ...], pl.DataFrame]:
    """feature_id, auroc and q of every label, by its kind and name."""
    columns = ("label_kind", "label", "feature_id", "auroc", "q")
    rows = opened.store.frame("feature_label").filter(_TESTED).select(columns).collect()
    return rows.partition_by("label_kind", "label", as_dict=True, include_key=False)


def _labels(opened: Opened) -> Iterator[tuple[str]]:
    return ((str(i),) for i in range(opened.labels.height))


ROUTES = (
    Route(pattern="features.cols", make=table),
    Route(pattern="labels/{id}.cols", make=label_effects, names=_labels),
)
