"""The bytes: schemas, commits, cells, activations, codes, associations and the queries over them.

The everyday door is `FeatureStore`; writers import the rooms themselves (`feature_store.storage.commit`, for one). The
exports are loaded on first use, so that importing a room that needs no Polars (errors, layout) costs milliseconds.
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
