"""The Run page: data set, model, SAE and its training, and the runs and manifests behind every table."""

from dataclasses import asdict
from typing import Any

import numpy as np
import polars as pl

from feature_store.atlas.data import AtlasData
from feature_store.atlas.page import title_of
from feature_store.atlas.routes import Route, json_bytes
from feature_store.errors import NotFoundError

DENSITY_BINS = 30


def run(data: AtlasData) -> bytes:
    """The sections of the page, each with its facts or with the command that makes them."""
    store = data.store
    provenance = store.provenance()
    runs = {**provenance["runs"], **_several(data)}
    every = [run for ids in runs.values() for run in ([ids] if isinstance(ids, str) else ids)]
    return json_bytes(
        {
            "title": title_of(store),
            "data": _data(data),
            "sae": _sae(data),
            "training": _training(data),
            "density": _density(data),
            "runs": runs,
            "manifests": provenance["manifests"],
            "plans": provenance["plans"],
            "verify": [f"scsae verify {run} {store.layout.store_option}" for run in dict.fromkeys(every)],
        }
    )


def _several(data: AtlasData) -> dict[str, list[str]]:
    """The runs of the kinds of which the atlas may read several."""
    lineage = data.store.lineage
    several = {"steering": lineage.steering, "matches": lineage.matches}
    return {kind: list(runs) for kind, runs in several.items() if runs}


def _data(data: AtlasData) -> dict[str, Any]:
    """Cells, donors, batches and types of each split, and genes.

    Where the panel is not all cells, they are of the panel, n_of_all counts all cells, and `panel` says how it was
    drawn.
    """
    if not data.has("cells"):
        return data.missing("cells")
    columns = ("donor", "batch", "cell_type")
    cells = data.store.panel_cells().select("split", *columns).collect()
    counts = cells.group_by("split").agg(n_cells=pl.len(), **{c: pl.col(c).drop_nulls().n_unique() for c in columns})
    total = {"split": "all", "n_cells": cells.height, **{c: cells[c].drop_nulls().n_unique() for c in columns}}
    n_genes = data.store.frame("genes").select(pl.len()).collect().item() if data.has("genes") else None
    order = {split: counts.filter(split=split).to_dicts() for split in data.n_cells}
    splits = [row for rows in order.values() for row in rows] + [total]
    facts = {"dataset": data.store.lineage.dataset, "n_genes": n_genes, "label_columns": data.label_columns}
    if (panel := data.panel) is None:
        return {**facts, "splits": splits}
    n_of_all = {**data.n_cells, "all": panel.n_cells}
    return {
        **facts,
        "splits": [{**row, "n_of_all": n_of_all[row["split"]]} for row in splits],
        "panel": asdict(panel),
    }


def _sae(data: AtlasData) -> dict[str, Any]:
    try:
        return data.store.sae_facts()
    except NotFoundError:
        return data.missing("training")


def _training(data: AtlasData) -> dict[str, Any]:
    """The figures that training recorded, a list a column."""
    if not data.has("training"):
        return data.missing("training")
    return data.store.frame("training").collect().to_dict(as_series=False)


def _density(data: AtlasData) -> dict[str, Any]:
    """Features by log10 of the share of tokens on which they fire, a list of counts a class; dead ones apart."""
    if not data.has("features"):
        return data.missing("features")
    features = data.features.select("density", "dead", pl.col("class").fill_null("no class"))
    firing = features.filter(pl.col("density") > 0).with_columns(at=pl.col("density").log10())
    facts = {"n_features": features.height, "n_dead": features.height - firing.height, "classes": []}
    if not firing.height:
        return {**facts, "edges": []}
    at = firing["at"].to_numpy()
    edges = np.linspace(np.floor(at.min() * 4) / 4, min(0.0, np.ceil(at.max() * 4) / 4) + 1e-9, DENSITY_BINS + 1)
    counts = [
        {"class": name, "counts": np.histogram(part["at"].to_numpy(), edges)[0].tolist()}
        for (name,), part in sorted(firing.group_by("class"), key=lambda item: str(item[0]))
    ]
    quartiles = [firing["density"].quantile(q) for q in (0.25, 0.5, 0.75)]
    return {**facts, "edges": edges.tolist(), "classes": counts, "quartiles": quartiles}


ROUTES = (Route(pattern="run.json", make=run),)
