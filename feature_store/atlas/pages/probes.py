"""Probes as the pages of controls and of a label show them: how few features tell a label, and which.

Features were chosen on `train` cells and tuned on `select` cells; figures are of `test` cells (`feature_store.probes`).
"""

import shlex
from typing import Any

import polars as pl

from feature_store.atlas.data import AtlasData
from feature_store.query.probes import SAE, Probes, newest_probes
from feature_store.storage.obs_columns import shown_name

SHOWN_FEATURES = 5
"""Most features of a label's probe that are listed."""
_LABEL = ("label", "n", "auroc", "auroc_low", "auroc_high", "balanced_accuracy")
_FEATURE = ("feature_id", "name", "weight", "gain")
_POINT = ("k", "macro_f1", "macro_f1_low", "macro_f1_high", "balanced_accuracy", "auroc")


def probes(data: AtlasData) -> dict[str, Any]:
    """Scores of the newest probes by number of features, and the SAE's features of each label."""
    if not data.has("probe_score"):
        return data.missing("probe_score")
    return {"kinds": [_of_kind(kind, found) for kind, found in data.cached(_newest).items()]}


def probe_of_label(data: AtlasData, kind: str, label: str) -> dict[str, Any]:
    """The newest probe of one label: its AUROC by number of features in every representation, and the SAE's features.

    `missing` has the command that probes labels of the kind, where they were not probed or this one had too few cells.
    """
    command = f"scsae probe --label {shlex.quote(shown_name(kind))} {data.store.layout.store_option}"
    found = data.cached(_newest).get(kind) if data.has("probe_score") else None
    if found is None:
        return {"missing": {"table": "probe_score", "command": command}}
    own = found.scores.filter(label=label).sort("k")
    if own.is_empty():
        return {"too_few": True}
    shown = _shown(own)
    features = found.features.filter(representation=SAE, k=shown, label=label).sort("rank")
    columns = ("k", "auroc", "auroc_low", "auroc_high", "balanced_accuracy")
    return {
        "k": shown,
        "series": [
            {"of": name, "points": own.filter(representation=name).select(columns).to_dicts()}
            for name in found.representations()
        ],
        "features": features.select(_FEATURE).to_dicts(),
    }


def _newest(data: AtlasData) -> dict[str, Probes]:
    return newest_probes(data.store)


def _of_kind(kind: str, found: Probes) -> dict[str, Any]:
    every = found.scores.filter(pl.col("label").is_null()).sort("k")
    shown = _shown(every)
    own = found.scores.filter(pl.col("label").is_not_null(), representation=SAE, k=shown)
    features = found.features.filter(representation=SAE, k=shown).sort("rank")
    return {
        "label_kind": kind,
        "ks": every["k"].unique().sort().to_list(),
        "k": shown,
        "series": [
            {"of": name, "points": every.filter(representation=name).select(_POINT).to_dicts()}
            for name in found.representations()
        ],
        "labels": [
            {**row, "features": features.filter(label=row["label"]).select(_FEATURE).to_dicts()}
            for row in own.select(_LABEL).to_dicts()
        ],
    }


def _shown(scores: pl.DataFrame) -> Any:
    """The largest number of features that is listed."""
    return max((k for k in scores["k"] if k <= SHOWN_FEATURES), default=scores["k"].min())
