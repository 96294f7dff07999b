"""The table of all features, and the association of each feature with one label.

Features are ranked on `select` cells; the figures shown are of `test` cells.
"""

from collections.abc import Iterator

import polars as pl

from feature_store.atlas.columns import encode
from feature_store.atlas.data import AtlasData, path_number
from feature_store.atlas.pages.modules import of_features
from feature_store.atlas.routes import Route

CATEGORIES = ("class", "top_label", "top_label_kind", "context_kind", "module")
MOST_KEPT = 8_000_000
"""Features times labels up to which all figures stay in memory (200 MB): reading 100,000 features of 40 labels takes
.25 s, and a colour should change within .1 s. Beyond it each label is read at its request."""
_KEYS, _FIGURES = ("feature_id", "split"), ("auroc", "q")
_TESTED = pl.col("split") == "test"


def table(data: AtlasData) -> bytes:
    """A row a feature: every column of `features`, x, y, px and py (the two maps), top_label_q: q of its best label on
    `test` cells, and module: number and first genes of its module.
    """
    return data.cached(_table)


def label_effects(data: AtlasData, label: str) -> bytes:
    """A row a feature, in the order of the table: AUROC of its code for a label on `test` cells, q, and AUROC on
    `select` cells.
    """
    i = path_number(label, data.labels.height)
    if data.labels.height * data.features.height > MOST_KEPT:
        kind, name = data.labels.row(i)
        rows = data.store.frame("feature_label").filter(label_kind=kind, label=name)
        return _beside(data, rows.select(*_KEYS, *_FIGURES).collect())
    return data.cached(_every_label)[i]


def _every_label(data: AtlasData) -> list[bytes]:
    """The bytes of all labels."""
    columns = ("label_kind", "label", *_KEYS, *_FIGURES)
    texts = pl.col("label_kind", "label", "split").cast(pl.Categorical)
    rows = data.store.frame("feature_label").select(columns).with_columns(texts)
    parts = rows.collect().partition_by("label_kind", "label", as_dict=True, include_key=False)
    return [_beside(data, parts[names]) for names in data.labels.iter_rows()]


def _beside(data: AtlasData, rows: pl.DataFrame) -> bytes:
    """The figures of one label in the order of the table of features."""
    order = data.features.select("feature_id")
    test = order.join(rows.filter(_TESTED), on="feature_id", how="left", maintain_order="left")
    select = order.join(rows.filter(split="select"), on="feature_id", how="left", maintain_order="left")
    return encode(test.select(_FIGURES).with_columns(auroc_select=select["auroc"]))


def _table(data: AtlasData) -> bytes:
    if not data.has("features"):
        return encode(pl.DataFrame())
    found, best = data.features, {"label_kind": "top_label_kind", "label": "top_label"}
    if data.has("feature_label") and "top_label_kind" in found.columns:
        tests = data.store.frame("feature_label").filter(_TESTED).select("feature_id", *best, top_label_q="q")
        keys = ["feature_id", *best.values()]
        found = found.lazy().join(tests.rename(best), on=keys, how="left", maintain_order="left").collect()
    if data.has("feature_module") and data.has("module"):
        found = found.join(of_features(data), on="feature_id", how="left", maintain_order="left")
    known = [name for name in CATEGORIES if name in found.columns]
    return encode(found.with_columns(pl.col(known).cast(pl.Categorical)))


def _labels(data: AtlasData) -> Iterator[tuple[str]]:
    return ((str(i),) for i in range(data.labels.height))


ROUTES = (
    Route(pattern="features.cols", make=table),
    Route(pattern="labels/{id}.cols", make=label_effects, names=_labels),
)
