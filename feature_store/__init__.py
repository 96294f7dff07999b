"""The bytes: data sets, activations, codes, associations and maps on disk, and the queries, plots and pages over them.

>>> from feature_store import FeatureStore
>>> FeatureStore.open("scsae-store").features_for(label="CD19+ B")

The rooms import only those below them: storage < cells < activations < codes < associations < maps < query < plots <
atlas. Readers use `FeatureStore`; the stages that write import the rooms themselves. The exports are loaded on first
use, so that importing a room without Polars (errors, layout) takes milliseconds.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from feature_store.query.runs import Lineage
    from feature_store.query.store import FeatureStore
    from feature_store.storage.layout import Layout

__all__ = ["FeatureStore", "Layout", "Lineage"]

_ROOM = {
    "FeatureStore": "feature_store.query.store",
    "Layout": "feature_store.storage.layout",
    "Lineage": "feature_store.query.runs",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOM:
        raise AttributeError(f"module 'feature_store' has no attribute {name!r}")
    return getattr(importlib.import_module(_ROOM[name]), name)
