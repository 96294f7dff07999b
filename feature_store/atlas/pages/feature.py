"""One feature: what the store knows of it as one document, its code in the cells on the map, and where all came from.

What is listed is chosen on `select` cells, and its figures are those of `test` cells. A part whose table the store
lacks is the command that makes it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import polars as pl
from scipy.special import stdtrit

from feature_store.atlas.columns import encode
from feature_store.atlas.data import PLACES, AtlasData, NoSuchResource
from feature_store.atlas.pages.feature_codes import SPLITS, Codes
from feature_store.atlas.pages.feature_effects import edges, effects, inputs
from feature_store.atlas.pages.feature_words import in_words
from feature_store.atlas.pages.violins import short
from feature_store.atlas.routes import Route, json_bytes
from feature_store.errors import StoreError
from feature_store.query.metrics import metric_of
from feature_store.query.steering import SteeringResults, at_chosen_point, headline_of, steering_results, title_of

MOST_LABELS = 60
N_GENES, N_SETS, N_TOP = 15, 12, 20
_P = "p_"
_LABEL = (
    "label_kind label auroc rank_biserial low high q p p_donor p_max f1 mcc n n_label n_donors n_agree method"
).split()
_GENE = "gene pearson pearson_within_type identity_precision identity_recall lift q n nnz".split()
_SET = ("collection gene_set overlap n_set n_genes odds_ratio q q_matched rank_biserial q_rank").split()
_NAMES = ("class", "top_label", "top_genes")
_MATCH = ("other other_feature_id similarity similarity_test mutual rank null_95 p method").split()


def feature_id(data: AtlasData, text: str) -> int:
    """The feature that a path names. Raises NoSuchResource if there is none."""
    if not data.has("features") or not text.isascii() or not text.isdigit() or int(text) not in data.row_of:
        raise NoSuchResource(text)
    return int(text)


def document(data: AtlasData, text: str) -> bytes:
    """Everything in the store about one feature."""
    feature = feature_id(data, text)
    found = {
        "about": data.cached(_about).row(data.row_of[feature], named=True),
        "cells": _cells(data, feature),
        "labels": _labels(data, feature),
        "genes": _genes(data, feature),
        "gene_sets": _gene_sets(data, feature),
        "tokens": _tokens(data, feature),
        "in_order": _in_order(data, feature),
        "neighbours": _neighbours(data, feature),
        "effects": effects(data, feature),
        "inputs": inputs(data, feature),
        "edges": edges(data, feature),
        "matches": _matches(data, feature),
        "steering": _steering(data, feature),
    }
    return json_bytes({**found, "summary": in_words(data, feature, found)})


def _about(data: AtlasData) -> pl.DataFrame:
    """The table `features` without the coordinates on the maps."""
    return data.features.drop(chain(*PLACES.values()))


def codes_on_map(data: AtlasData, text: str) -> bytes:
    """Columns place (row of cells.cols) and value of the cells on the map in which a feature fires."""
    feature = feature_id(data, text)
    if not data.has("codes") or data.cells.is_empty():
        return encode(pl.DataFrame(schema={"place": pl.Int32, "value": pl.Float32}))
    found = data.cached(Codes).firing(feature)
    cells = data.cells["cell_idx"].to_numpy()
    at = np.minimum(np.searchsorted(cells, found.cell_idx), cells.size - 1)
    here = cells[at] == found.cell_idx
    place = pl.Series("place", at[here], dtype=pl.Int32)
    return encode(pl.DataFrame([place, pl.Series("value", found.value[here], dtype=pl.Float32)]))


def cells_on_map(data: AtlasData) -> bytes:
    """A row a cell on the map: cell_idx, x, y, split and label columns."""
    return encode(data.cells if data.has("cells") else pl.DataFrame())


def cell_names(data: AtlasData) -> bytes:
    """cell_id of each row of cells.cols, apart from it because it is read only when a user points at a cell."""
    if not data.has("cells"):
        return encode(pl.DataFrame())
    names = data.store.frame("cells").filter("panel").select("cell_idx", "cell_id").collect()
    return encode(data.cells.select("cell_idx").join(names, on="cell_idx", how="left").select("cell_id"))


def provenance(data: AtlasData) -> bytes:
    """The runs that are read, the sha of the manifest of each table, and the plans of the runs."""
    return json_bytes(data.store.provenance())


def _cells(data: AtlasData, feature: int) -> dict[str, Any]:
    """The cells in which it fires: their number and the strongest of all cells; of the panel's cells, violins by label
    column, and correlated features.
    """
    for table in ("codes", "cells", "feature_cell", "feature_firing"):
        if not data.has(table):
            return data.missing(table)
    codes = data.cached(Codes)
    together = codes.together(feature)
    return {
        "splits": _counts(data, feature),
        "top": _with_cells(data, data.rows("feature_cell", feature, _first_rows)),
        "histograms": {split: codes.histogram(feature, split) for split in SPLITS},
        "quantiles": _with_cells(data, codes.by_quantile(feature)),
        "violins": {split: codes.violins(feature, data.label_columns, split) for split in SPLITS},
        "together": together if together is None else [_named(data, row) for row in together],
    }


def _counts(data: AtlasData, feature: int) -> dict[str, dict[str, int]]:
    """All cells with tokens, and those in which a feature fires, of each split that a violin can be of."""
    n = data.n_with_tokens
    n_firing = {row["split"]: row["n_cells"] for row in data.rows("feature_firing", feature)}
    return {
        "test": {"n": n["test"], "n_firing": n_firing.get("test", 0)},
        "all": {"n": sum(n.values()), "n_firing": sum(n_firing.values())},
    }


def _first_rows(data: AtlasData, rows: pl.DataFrame) -> pl.DataFrame:
    return rows.group_by("feature_id", maintain_order=True).head(N_TOP)


def _with_cells(data: AtlasData, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows about cells, with the id, split and labels of each cell."""
    return [{**row, **cell} for row, cell in zip(rows, data.cells_at(row["cell_idx"] for row in rows), strict=True)]


def _labels(data: AtlasData, feature: int) -> dict[str, Any]:
    """The labels of largest effect on `select` cells, with their figures and null bands on `test` cells."""
    if not data.has("feature_label"):
        return data.missing("feature_label")
    rows = data.rows("feature_label", feature, _label_rows)
    seen = [row for row in rows if row["rank_biserial"] is not None]
    shown = seen[:MOST_LABELS]
    bands = _bands(data, feature, shown)
    return {
        "units": data.units,
        "n_labels": len(seen),
        "n_unseen": len(rows) - len(seen),
        "rows": [{**row, "null": bands.get((row["label_kind"], row["label"]))} for row in shown],
    }


def _label_rows(data: AtlasData, rows: pl.DataFrame) -> pl.DataFrame:
    order = ["feature_id", pl.col("select_rank_biserial").abs(), "label"]
    found = _of_test(rows, ["label_kind", "label"], "rank_biserial", _LABEL)
    return found.sort(order, descending=[False, True, False], nulls_last=True)


def _bands(data: AtlasData, feature: int, rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Any]:
    """The ends of the null band of each label that has one."""
    if not data.has("codes"):
        return {}
    methods = dict.fromkeys((row["label_kind"], row["method"]) for row in rows if row["method"] is not None)
    ends = {(kind, method): data.cached(Codes).null_ends(feature, kind, method) or {} for kind, method in methods}
    found = {}
    for row in rows:
        band = ends.get((row["label_kind"], row["method"]), {}).get(row["label"])
        if band is not None:
            found[row["label_kind"], row["label"]] = band
    return found


def _genes(data: AtlasData, feature: int) -> dict[str, Any]:
    """Genes by expression (largest |Pearson| on `select`) and by identity (largest precision on `select`)."""
    if not data.has("feature_gene"):
        return data.missing("feature_gene")
    shapes = {"expression": _expression_rows, "identity": _identity_rows}
    return {name: data.rows("feature_gene", feature, shape) for name, shape in shapes.items()}


def _expression_rows(data: AtlasData, rows: pl.DataFrame) -> pl.DataFrame:
    return _strongest_genes(rows, "pearson")


def _identity_rows(data: AtlasData, rows: pl.DataFrame) -> pl.DataFrame:
    return _strongest_genes(rows, "identity_precision")


def _strongest_genes(rows: pl.DataFrame, key: str) -> pl.DataFrame:
    strength = pl.col(f"select_{key}").abs()
    found = _of_test(rows, ["gene"], key, _GENE).filter(strength > 0)
    ordered = found.sort("feature_id", strength, "gene", descending=[False, True, False])
    return ordered.group_by("feature_id", maintain_order=True).head(N_GENES)


def _gene_sets(data: AtlasData, feature: int) -> dict[str, Any]:
    """The gene sets of smallest p on `select` cells, of those that share a gene with it there."""
    if not data.has("feature_geneset"):
        return data.missing("feature_geneset")
    return {"rows": data.rows("feature_geneset", feature, _set_rows)}


def _set_rows(data: AtlasData, rows: pl.DataFrame) -> pl.DataFrame:
    keys = ["collection", "gene_set"]
    chosen = rows.filter((pl.col("split") == "select") & (pl.col("overlap") > 0))
    shared = rows.join(chosen, on=["feature_id", *keys], how="semi")
    ordered = _of_test(shared, keys, "p", _SET).sort("feature_id", "select_p", *keys)
    return ordered.group_by("feature_id", maintain_order=True).head(N_SETS)


def _tokens(data: AtlasData, feature: int) -> dict[str, Any]:
    """The tokens on which it fires most, of all splits, with their cells."""
    if not data.has("feature_token"):
        return data.missing("feature_token")
    rows = data.rows("feature_token", feature, _token_rows)
    return {"rows": _with_cells(data, rows) if data.has("cells") else rows}


def _token_rows(data: AtlasData, rows: pl.DataFrame) -> pl.DataFrame:
    order = ["feature_id", "value", "cell_idx", "token_pos"]
    return _first_rows(data, rows.sort(order, descending=[False, True, False, False]))


def _in_order(data: AtlasData, feature: int) -> dict[str, Any]:
    """The tokens of the cell in which it fires most, in the order of the input: the cell, and columns of its tokens."""
    if not data.has("top_cell_token"):
        return data.missing("top_cell_token")
    rows = data.rows("top_cell_token", feature)
    if not rows:
        return {"cell": None, "tokens": {}}
    (cell,) = _with_cells(data, [{"cell_idx": rows[0]["cell_idx"]}]) if data.has("cells") else [{}]
    columns = {"position": "token_pos", "gene": "gene", "value": "value"}
    tokens: dict[str, list[Any]] = {name: [row[column] for row in rows] for name, column in columns.items()}
    tokens["value"] = [short(value) for value in tokens["value"]]
    return {"cell": cell, "tokens": tokens}


def _neighbours(data: AtlasData, feature: int) -> dict[str, Any]:
    """The nearest features of the same SAE by the cosine of decoder rows, and the cosine that chance gives."""
    if not data.has("feature_neighbour"):
        return data.missing("feature_neighbour")
    rows = sorted(data.rows("feature_neighbour", feature), key=lambda row: row["rank"])
    named = [_named(data, {"feature_id": row["other_feature_id"], "cosine": row["cosine"]}) for row in rows]
    return {"rows": named, "null_95": data.cached(_nearest_of_random)}


def _nearest_of_random(data: AtlasData) -> float | None:
    """See `nearest_of_random`, of as many directions as the SAE has features; None where its width is not known."""
    try:
        d_model = data.store.sae_facts()["sae"]["d_model"]
    except (StoreError, KeyError):
        return None
    return nearest_of_random(data.features.height - 1, d_model)


def nearest_of_random(n: int, d: int) -> float:
    """The cosine that the nearest of n uniformly random directions in d dimensions exceeds in one case of twenty.

    t sqrt(d - 1) / sqrt(1 - t^2) of a cosine t is Student's t with d - 1 degrees of freedom.
    """
    t = float(stdtrit(d - 1, 0.95 ** (1 / max(n, 1))))
    return t / math.sqrt(d - 1 + t * t)


def _matches(data: AtlasData, feature: int) -> dict[str, Any]:
    """Its nearest features in other SAEs: of another seed, layer or model."""
    if not data.has("feature_match"):
        return data.missing("feature_match")
    rows, others = data.rows("feature_match", feature, _match_rows), data.cached(_others)
    return {"rows": [{**row, **others[row["other"]]} for row in rows]}


def _match_rows(data: AtlasData, rows: pl.DataFrame) -> pl.DataFrame:
    ordered = rows.sort("similarity", "other", descending=[True, False], nulls_last=True)
    return ordered.select("feature_id", *_MATCH)


def _others(data: AtlasData) -> Mapping[str, Mapping[str, Any]]:
    """Model, site and seed of each SAE that features are matched with, as far as it is still in the store."""
    names = data.store.frame("feature_match").select(pl.col("other").unique()).collect()["other"]
    found: dict[str, Mapping[str, Any]] = {}
    for name in names:
        try:
            facts = data.store.sae_facts(name)
        except StoreError:
            facts = {}
        about = {key: facts.get(key) for key in ("model", "site", "dataset", "control")}
        found[name] = {**about, "seed": facts.get("train", {}).get("seed")}
    return found


def _steering(data: AtlasData, feature: int) -> dict[str, Any]:
    """The steering runs that used or ranked it, with its rank and the effect of all features of the run."""
    if not data.has("steering"):
        return data.missing("steering")
    uses, scores = data.cached(_uses), data.cached(_scores)
    runs = []
    for run in data.store.lineage.steering:
        used = [use for use in uses.get(run, []) if feature in use["features"]]
        rank = scores[run][feature] if run in scores and feature in scores[run] else None
        if used or rank:
            place = used[0]["features"].index(feature) + 1 if used else None
            runs.append({"run": run, "used": bool(used), "place": place, "rank": rank, **data.cached(_headlines)[run]})
    return {"runs": runs, "n_runs": len(data.store.lineage.steering)}


def _uses(data: AtlasData) -> Mapping[str, Sequence[Mapping[str, Any]]]:
    """The variants that were chosen on `select` cells, with their features, by run."""
    if not data.has("steering_variants"):
        return {}
    chosen = data.store.frame("steering_variants").filter(pl.col("chosen")).select("run", "features").collect()
    return {run: part.to_dicts() for (run,), part in chosen.group_by("run", maintain_order=True)}


def _scores(data: AtlasData) -> Mapping[str, Mapping[int, Mapping[str, Any]]]:
    """Rank and score of the features that a run ranked, by run and feature."""
    if not data.has("steering_scores"):
        return {}
    table = data.store.frame("steering_scores").select("run", "feature_id", "rank", "score", "n_units", "n_agree")
    return {
        run: {row.pop("feature_id"): {**row, "n_ranked": part.height} for row in part.drop("run").to_dicts()}
        for (run,), part in table.collect().group_by("run", maintain_order=True)
    }


def _headlines(data: AtlasData) -> Mapping[str, Mapping[str, Any]]:
    """By run, its title, and its headline metric on `test` cells at the chosen point with p against each null."""
    return {run: _headline(steering_results(data.store, run)) for run in data.store.lineage.steering}


def _headline(results: SteeringResults) -> dict[str, Any]:
    metric = headline_of(results)
    row = None if metric is None else at_chosen_point(results, metric)
    if metric is None or row is None:
        return {"title": title_of(results), "headline": None}
    names = ("condition", "metric", "value", "effect", "low", "high", "n_features", "dose", "n_cells")
    p = {name.removeprefix(_P): value for name, value in row.items() if name.startswith(_P) and value is not None}
    figures = {name: row.get(name) for name in names}
    return {"title": title_of(results), "headline": {**figures, "words": metric_of(metric).description, "p": p}}


def _of_test(rows: pl.DataFrame, keys: Sequence[str], key: str, columns: Sequence[str]) -> pl.DataFrame:
    """The rows of `test` cells: feature_id, the columns named, and `select_KEY`, the figure by which they are chosen.

    A row that `select` cells have alone is kept without figures: it was chosen, and is not seen on `test`.
    """
    keys = ["feature_id", *keys]
    known = [name for name in columns if name in rows.columns]
    test = rows.filter(pl.col("split") == "test").select("feature_id", *known)
    select = rows.filter(pl.col("split") == "select").select(*keys, pl.col(key).alias(f"select_{key}"))
    return select.join(test, on=keys, how="full", coalesce=True).with_columns(
        pl.lit(None).alias(name) for name in columns if name not in known
    )


def _named(data: AtlasData, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row about a feature, with its class, label and genes."""
    place = data.row_of.get(row["feature_id"])
    return {**row, **(dict.fromkeys(_NAMES) if place is None else data.cached(_names)[place])}


def _names(data: AtlasData) -> list[dict[str, Any]]:
    return data.features.select(_NAMES).to_dicts()


def _features(data: AtlasData) -> Iterator[tuple[str]]:
    return ((str(feature),) for feature in (data.row_of if data.has("features") else ()))


ROUTES = (
    Route(pattern="features/{id}.json", make=document, names=_features),
    Route(pattern="codes/{id}.cols", make=codes_on_map, names=_features),
    Route(pattern="cells.cols", make=cells_on_map),
    Route(pattern="cell_names.cols", make=cell_names),
    Route(pattern="provenance.json", make=provenance),
)
