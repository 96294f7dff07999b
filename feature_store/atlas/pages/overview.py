"""The overview of the store, which every page reads first."""

from dataclasses import asdict
from typing import Any

from feature_store.atlas.data import AtlasData
from feature_store.atlas.page import title_of
from feature_store.atlas.pages.selections import measures
from feature_store.atlas.routes import Route, json_bytes
from feature_store.query.runs import created_of

TABLES = (
    "cells features feature_label feature_gene feature_geneset feature_token codes umap feature_umap feature_neighbour "
    "profile_umap feature_match comparison representation steering steering_map training module"
).split()


def overview(data: AtlasData) -> bytes:
    """Title, runs, numbers, labels (a label's id is its place), columns of cells, steering runs, what is missing.

    `panel` has n_panel and n_cells, and is null where the panel is all cells. `created` says when each run was made;
    the first is the run of most figures.
    """
    store = data.store
    panel = data.panel if data.has("cells") else None
    facts: dict[str, Any] = {
        "title": title_of(store),
        "store": str(store.layout.root),
        "runs": asdict(store.lineage),
        "name": store.layout.root.name,
        "created": created_of(store.layout, store.lineage),
        "tables": store.tables(),
        "missing": {table: store.made_by(table) for table in TABLES if not data.has(table)},
        "labels": data.labels.to_dicts(),
        "n_features": data.features.height if data.has("features") else 0,
        "n_cells": data.n_cells if data.has("cells") else {},
        "panel": None if panel is None else {"n_panel": panel.n_panel, "n_cells": panel.n_cells},
        "n_on_map": data.cells.height if data.has("cells") else 0,
        "label_columns": data.label_columns if data.has("cells") else [],
        "measures": measures(data),
    }
    return json_bytes(facts)


ROUTES = (Route(pattern="atlas.json", make=overview),)
