"""What a feature does, what makes it fire, and the features before and after it, for the page of the feature; and the
features that change the model's prediction of a gene, for the search.
"""

from collections.abc import Mapping
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
    rows = data.rows("feature_effect", feature)
    if rows.is_empty():
        return {"rows": {}, "summary": {}}
    run = rows["run"][0]
    mine = _by_p(rows.filter(run=run).lazy(), "gene").collect()
    lines = data.rows("feature_effect_summary", feature).filter(run=run)
    return {
        "rows": {
            str(name): part.head(N_GENES).select(_EFFECT).to_dicts()
            for (name,), part in mine.group_by("intervention", maintain_order=True)
        },
        "summary": {line["intervention"]: line for line in lines.select(_SUMMARY).to_dicts()},
    }


def inputs(data: AtlasData, feature: int) -> dict[str, Any]:
    """What makes it fire, of the newest run that has it: the genes whose tokens, left out, change its code most."""
    if not data.has("feature_input"):
        return data.missing("feature_input")
    rows = data.rows("feature_input", feature)
    if rows.is_empty():
        return {"rows": []}
    mine = rows.filter(run=rows["run"][0])
    largest = (
        mine.group_by("gene").agg(total=pl.col("share").sum().abs()).sort("total", "gene", descending=[True, False])
    )
    genes = []
    for gene in largest.head(N_GENES)["gene"]:
        paths = {row["path"]: row for row in mine.filter(pl.col("gene") == gene).select(_INPUT).iter_rows(named=True)}
        genes.append({"gene": gene, "paths": paths})
    return {"rows": genes}


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
