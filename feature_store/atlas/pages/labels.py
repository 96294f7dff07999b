"""One label, for example the cell type B cells: the features that stand for it, its profile over all features, and the
probe that tells its cells with few of them.

Features are ranked on `select` cells as labels are ranked for a feature (`claims.rank_order`), and listed where they
are significant on `test` cells, of which all figures are. The profile of a label is the AUROC of every feature for it;
two labels are alike where their profiles correlate.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import polars as pl

from feature_store.associations.claims import holds_on_test, is_significant, rank_order
from feature_store.atlas.data import AtlasData, path_number
from feature_store.atlas.pages.probes import probe_of_label
from feature_store.atlas.routes import Route, json_bytes
from feature_store.storage.schemas import SPLITS

MOST_LISTED = 30
"""Features that are listed on each side: those with larger codes in the label's cells, and those with smaller ones."""
BINS = 40
N_ALIKE = 6
_FIGURES = "auroc rank_biserial low high q p_max n_donors n_agree f1".split()
_ABOUT = ("class", "top_label", "top_genes", "density")


def label(data: AtlasData, text: str) -> bytes:
    """The sections of the page of a label, which is named by its place in `AtlasData.labels`."""
    place = path_number(text, data.labels.height)
    kind, name = data.labels.row(place)
    rows = data.store.frame("feature_label").filter(label_kind=kind, label=name).collect()
    test = rows.filter(split="test").drop_nulls("auroc")
    return json_bytes(
        {
            "label_kind": kind,
            "label": name,
            "units": data.units,
            "cells": _cells(data, kind, name),
            "n_tested": test.height,
            "above": _listed(data, rows, above=True),
            "below": _listed(data, rows, above=False),
            "profile": _histogram(test),
            "alike": _alike(data, kind, name),
            "probe": probe_of_label(data, kind, name),
        }
    )


def _cells(data: AtlasData, kind: str, name: str) -> dict[str, Any] | None:
    """Cells of the panel of each split that have the label, and that have any label of its kind, and their donors; None
    where the cell table has no such column.
    """
    if not data.has("cells") or kind not in data.store.frame("cells").collect_schema():
        return None
    is_label = pl.col(kind).cast(pl.String) == name
    counts = data.store.panel_cells().drop_nulls(kind).group_by("split")
    found = counts.agg(
        n=is_label.sum(), n_all=pl.len(), n_donors=pl.col("donor").filter(is_label).drop_nulls().n_unique()
    ).collect()
    return {row["split"]: row for split in SPLITS for row in found.filter(split=split).to_dicts()}


def _listed(data: AtlasData, rows: pl.DataFrame, *, above: bool) -> dict[str, Any]:
    """The significant features on one side of AUROC .5, the best on `select` cells first, and how many there are."""
    found = one_side(rows, _FIGURES, above=above)
    return {"n": found.height, "rows": with_features(data, found.head(MOST_LISTED)).to_dicts()}


def one_side(rows: pl.DataFrame, figures: Sequence[str], *, above: bool, key: str = "feature_id") -> pl.DataFrame:
    """The significant rows of `test` cells on one side of AUROC .5, the best on `select` cells first.

    rows: of one label, as in `feature_label`; key: the column that tells its rows apart. Columns: key, auroc_select,
    low_select, high_select, and the figures of `test` cells.
    """
    side = pl.col("auroc") > 0.5 if above else pl.col("auroc") < 0.5
    test = rows.filter(holds_on_test() & side)
    # below, the mirrored figures rank: the upper bound and the AUROC, the smallest first
    order = rank_order() if above else [is_significant(), -pl.col("high"), -pl.col("auroc")]
    ranked = rows.filter((pl.col("split") == "select") & side).sort(
        [*order, pl.col(key)], descending=[True, True, True, False], nulls_last=True
    )
    chosen = ranked.select(key, auroc_select="auroc", low_select="low", high_select="high")
    return chosen.join(test.select(key, *figures), on=key, how="inner", maintain_order="left")


def with_features(data: AtlasData, rows: pl.DataFrame) -> pl.DataFrame:
    """Rows about features, with the class, label, genes and density of each."""
    known = [name for name in _ABOUT if name in data.features.columns] if data.has("features") else []
    if not known:
        return rows
    return rows.join(data.features.select("feature_id", *known), on="feature_id", how="left", maintain_order="left")


def _histogram(test: pl.DataFrame) -> dict[str, Any]:
    """Features by their AUROC on `test` cells, significant ones apart from the others."""
    place = (pl.col("auroc") * BINS).floor().clip(0, BINS - 1).cast(pl.Int64)
    counted = test.group_by(place=place, significant=is_significant()).len()
    counts = {
        name: [counted.filter(place=i, significant=flag)["len"].sum() for i in range(BINS)]
        for name, flag in (("significant", True), ("other", False))
    }
    return {"low": 0.0, "high": 1.0, **counts}


def _alike(data: AtlasData, kind: str, name: str) -> list[dict[str, Any]]:
    """The labels of the same kind whose profiles correlate most with that of a label (Pearson, `test` cells)."""
    names, r = data.cached(_profiles).get(kind, ([], np.empty((0, 0))))
    if name not in names:
        return []
    own = r[names.index(name)]
    order = [i for i in np.argsort(-np.nan_to_num(own, nan=-2.0), kind="stable") if names[i] != name]
    return [{"label": names[i], "r": float(own[i])} for i in order[:N_ALIKE] if np.isfinite(own[i])]


def _profiles(data: AtlasData) -> dict[str, tuple[list[str], np.ndarray]]:
    """By kind of label, the names of the labels that were tested on `test` cells and the correlations of their profiles
    [n_labels n_labels].
    """
    columns = ("label_kind", "label", "feature_id", "auroc")
    rows = data.store.frame("feature_label").filter(pl.col("split") == "test").select(columns).collect()
    found = {}
    for (kind,), part in rows.group_by("label_kind"):
        wide = part.pivot("label", index="feature_id", values="auroc").drop("feature_id").drop_nulls()
        names = sorted(wide.columns)
        values = wide.select(names).to_numpy()
        with np.errstate(invalid="ignore", divide="ignore"):
            r = (
                np.atleast_2d(np.corrcoef(values, rowvar=False))
                if len(values) > 2
                else np.full((len(names),) * 2, np.nan)
            )
        found[str(kind)] = (names, r)
    return found


def _labels(data: AtlasData) -> Iterator[tuple[str]]:
    return ((str(i),) for i in range(data.labels.height))


ROUTES = (Route(pattern="label_pages/{id}.json", make=label, names=_labels),)
