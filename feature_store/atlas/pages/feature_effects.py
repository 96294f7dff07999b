"""What a feature does, what makes it fire, and the features before and after it, for the page of the feature; and the
features that change the model's prediction of a gene, for the search.
"""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import polars as pl

from feature_store.atlas.data import AtlasData
from feature_store.query.edges import SIDES, edges_beside, site_of

N_GENES, N_EDGES, N_CHANGERS = 10, 8, 20
_EFFECT = "gene effect null null_mean null_sd direct z q n_cells".split()
_SUMMARY = "intervention n_genes n_up n_down strength_ratio specificity specificity_null direct_spearman".split()
_INPUT = "gene path change share gradient null_mean null_sd z q n_cells".split()
_CHANGER = "feature_id intervention effect null_mean null_sd z q n_cells".split()


def effects(data: AtlasData, feature: int) -> dict[str, Any]:
    """What it does to predictions of hidden genes, of the newest run that has it: by intervention, the genes of
    smallest p and a line on all genes.
    """
    if not data.has("feature_effect"):
        return data.missing("feature_effect")
    rows = data.rows("feature_effect", feature, _effect_rows)
    lines = data.rows("feature_effect_summary", feature)
    return {
        "rows": {
            str(name): [{key: row[key] for key in _EFFECT} for row in part]
            for name, part in groupby(rows, lambda row: row["intervention"])
        },
        "summary": {
            line["intervention"]: {key: line[key] for key in _SUMMARY}
            for line in lines
            if rows and line["run"] == rows[0]["run"]
        },
    }


def _effect_rows(data: AtlasData, rows: pl.DataFrame) -> pl.DataFrame:
    """Of the newest run of each feature, by intervention, the genes of smallest p; the newest run comes first."""
    ordered = _by_p(_of_newest_run(rows).lazy(), "gene").collect()
    # interventions in the order of the smallest p, as genes are
    first = ordered.group_by("feature_id", "intervention", maintain_order=True).head(N_GENES)
    places = first.select("feature_id", "intervention").unique(maintain_order=True).with_row_index("place")
    return first.join(places, on=["feature_id", "intervention"], how="left", maintain_order="left").sort(
        "place", maintain_order=True
    )


def _of_newest_run(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.filter(pl.col("run") == pl.col("run").first().over("feature_id"))


def inputs(data: AtlasData, feature: int) -> dict[str, Any]:
    """What makes it fire, of the newest run that has it: the genes whose tokens, left out, change its code most."""
    if not data.has("feature_input"):
        return data.missing("feature_input")
    genes: dict[str, dict[str, Any]] = {}
    for row in data.rows("feature_input", feature, _input_rows):
        paths = genes.setdefault(row["gene"], {})
        paths[row["path"]] = {key: row[key] for key in _INPUT}
    return {"rows": [{"gene": gene, "paths": paths} for gene, paths in genes.items()]}


def _input_rows(data: AtlasData, rows: pl.DataFrame) -> pl.DataFrame:
    """Of the newest run of each feature, all paths of the genes that take the largest share of its code."""
    mine, pair = _of_newest_run(rows), ["feature_id", "gene"]
    total = mine.group_by(pair).agg(total=pl.col("share").sum().abs())
    largest = total.sort("feature_id", "total", "gene", descending=[False, True, False])
    largest = largest.group_by("feature_id", maintain_order=True).head(N_GENES).drop("total").with_row_index("place")
    return mine.join(largest, on=pair, how="inner", maintain_order="left").sort("place", maintain_order=True)


def edges(data: AtlasData, feature: int) -> dict[str, Any]:
    """The features of other layers that it changes, and those that change it: the ones of smallest p on each side."""
    if not data.has("feature_edge"):
        return data.missing("feature_edge")
    found = data.cached(_edges)
    return {side: found[side].get(feature, []) for side in SIDES}


def changers(data: AtlasData, gene: str) -> list[dict[str, Any]] | None:
    """The features whose ablation or boost changes the prediction of a gene, by p; None where none was measured."""
    return data.cached(_changers).get(gene, []) if data.has("feature_effect") else None


def _changers(data: AtlasData) -> Mapping[str, list[dict[str, Any]]]:
    pair = ["feature_id", "intervention", "gene"]
    # the newest run comes first
    rows = data.store.frame("feature_effect").select(*_CHANGER, "gene", "p")
    rows = _by_p(rows.unique(pair, keep="first", maintain_order=True), "feature_id", "intervention")
    best = rows.group_by("gene", maintain_order=True).head(N_CHANGERS).collect()
    return {str(gene): part.select(_CHANGER).to_dicts() for (gene,), part in best.group_by("gene", maintain_order=True)}


def _edges(data: AtlasData) -> Mapping[str, Mapping[int, list[dict[str, Any]]]]:
    """The strongest edges of every feature of the SAE, by side."""
    found: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for side in SIDES:
        rows = edges_beside(data.store, side, n=N_EDGES)
        sites = {sae: site_of(data.store, sae) for sae in rows["other_sae"].unique()}
        rows = rows.with_columns(site=pl.col("other_sae").replace_strict(sites, default=None, return_dtype=pl.String))
        parts = rows.partition_by("feature_id", as_dict=True, include_key=False)
        found[side] = {int(feature): part.to_dicts() for (feature,), part in parts.items()}
    return found


def _by_p(rows: pl.LazyFrame, *ties: str) -> pl.LazyFrame:
    """Rows of a table of effects by their p, then by |z|, then by further columns."""
    return rows.sort("p", pl.col("z").abs(), *ties, descending=[False, True, *(False for _ in ties)], nulls_last=True)
