"""The Steering page: what a run did, every figure of `test` cells beside its nulls, and the cells before and after."""

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import polars as pl

from feature_store.associations.claims import least_p, too_few_draws
from feature_store.atlas.columns import encode
from feature_store.atlas.data import AtlasData, NoSuchResource, path_number
from feature_store.atlas.routes import Route, json_bytes
from feature_store.cells import canonical_column
from feature_store.query.metrics import METRICS, metric_of
from feature_store.query.steering import (
    ALL,
    Role,
    SteeringResults,
    at_chosen_point,
    headline_of,
    of_role,
    p_column,
    steering_results,
)
from feature_store.storage.obs_columns import shown_name
from feature_store.storage.plans import SteeringResultsPlan

PLACES = ("pc1", "pc2", "x", "y", "gap")
"""Columns of the table `steering_map` that say where a cell lies; a store may have no `gap`."""
_ROW = "condition role n_features dose metric group n_draws n_cells value effect low high chosen".split()
_ABOUT = ("feature_id", "class", "top_genes", "top_label", "density")
_DONE: Mapping[str, str] = {
    "ablate": "ablate: the features are set to 0, without a dose",
    "clamp": "clamp: the features are set to dose × their 99th percentile on train cells",
    "add": "add: dose × their 99th percentile on train cells is added to the features",
    "scale": "scale: the features are multiplied by the dose",
    "toward": "toward: the features move by the share dose of the way to their mean in the cells moved toward",
    "shift": "shift: dose × the difference of the labels' mean codes is added to the features",
}
_EMBEDDING: Mapping[str | None, str] = {
    None: "the steered vector itself, as no model takes it further",
    "mean": "mean over gene tokens",
}
_CELLS: Mapping[str, str] = {
    "move": "{target} only; all others stay as they are",
    "edit": "all cells, {target} or not",
    "mix": "all cells",
}


def runs(data: AtlasData) -> bytes:
    """All steering runs of the SAE, newest first, each with its headline at the chosen point."""
    if not data.has("steering"):
        return json_bytes(data.missing("steering"))
    return json_bytes({"runs": [_summary(data, _results(data, run)) for run in data.store.lineage.steering]})


def document(data: AtlasData, run: str) -> bytes:
    """One run: its title, the measured points, its figures, its features, and its map."""
    results = _results(data, run)
    variants = _variants(data, run)
    rows = results.rows.filter(pl.col("role") != Role.TREND) if "role" in results.rows.columns else results.rows
    of_run = {
        **_summary(data, results),
        "plan": [{"name": name, "text": text} for name, text in _plan_in_words(results.plan)],
        "grid": results.plan.grid,
        "command": _command(data, results.plan),
        "features_given": bool(results.plan.feature),
        "metrics": [
            {"name": name, "words": metric_of(name).description, "better": metric_of(name).better}
            for name in _metrics(rows)
        ],
        "groups": _groups(rows),
        "nulls": _nulls(rows),
        "trends": _trends(results.rows),
        "rows": {name: rows[name].to_list() if name in rows.columns else None for name in (*_ROW, *_ps(rows))},
        "features": _features(data, results, variants),
        "variants": variants.drop("features").to_dicts(),
        "map": _about_map(data, run, variants),
    }
    return json_bytes(of_run)


def cells(data: AtlasData, run: str) -> bytes:
    """The cells on a run's map, by cell_idx: cell_idx, label, cell_type, whether the chosen point moves it, and its
    places unsteered.
    """
    table = _map(data, run)
    variants = _variants(data, run)
    before = _unsteered(table, variants)
    chosen = variants.filter("chosen")["variant"].implode()
    moved = table.filter(pl.col("variant").is_in(chosen)).select("cell_idx", moved=True).collect()
    kind = _results(data, run).plan.kind
    about = data.store.frame("cells").filter("panel") if data.has("cells") else before.lazy()
    known = about.collect_schema().names()
    labels = [pl.col(kind).alias("label") if kind in known else pl.lit(None, pl.String).alias("label")]
    labels += [pl.col("cell_type") if "cell_type" in known else pl.lit(None, pl.String).alias("cell_type")]
    own = about.select("cell_idx", *map(canonical_column, labels)).collect()
    found = before.join(own, on="cell_idx", how="left", maintain_order="left")
    found = found.join(moved, on="cell_idx", how="left", maintain_order="left")
    categories = pl.col("label", "cell_type").cast(pl.Categorical)
    places = [name for name in PLACES if name in found.columns]
    return encode(found.select("cell_idx", categories, pl.col("moved").fill_null(value=False), *places))


def places(data: AtlasData, run: str, variant: str) -> bytes:
    """The places of the cells of `cells`, in their order, under a variant; an unedited cell keeps its place."""
    table, variants = _map(data, run), _variants(data, run)
    chosen = variants.filter("on_map")["variant"]
    number = path_number(variant, int(chosen.max()) + 1 if len(chosen) else 0)  # type: ignore[arg-type]
    if number not in chosen.to_list():
        raise NoSuchResource(variant)
    before = _unsteered(table, variants)
    names = [name for name in PLACES if name in before.columns]
    after = table.filter(pl.col("variant") == number).select("cell_idx", *names).collect()
    both = before.join(after, on="cell_idx", how="left", maintain_order="left", suffix="_after")
    return encode(both.select(pl.coalesce(f"{name}_after", name).alias(name) for name in names))


def _results(data: AtlasData, run: str) -> SteeringResults:
    """The results of a run. Raises NoSuchResource for an id that names none."""
    if not data.has("steering") or run not in data.store.lineage.steering:
        raise NoSuchResource(run)
    return steering_results(data.store, run)


def _variants(data: AtlasData, run: str) -> pl.DataFrame:
    """variant, name, role, n_features, dose, draw, chosen and features of a run, and which are `on_map`; no rows where
    the store has none.
    """
    columns = ("variant", "name", "role", "n_features", "dose", "draw", "chosen", "features")
    if not data.has("steering_variants"):
        return pl.DataFrame(schema={**dict.fromkeys(columns, pl.Null()), "on_map": pl.Boolean()})
    found = data.store.frame("steering_variants").filter(pl.col("run") == run).select(columns).collect()
    laid_out = pl.Series([], dtype=pl.Int32)
    if data.has("steering_map"):
        laid_out = _map(data, run).select(pl.col("variant").unique()).collect()["variant"]
    return found.with_columns(on_map=pl.col("variant").is_in(laid_out.implode())).sort("variant")


def _map(data: AtlasData, run: str) -> pl.LazyFrame:
    if not data.has("steering_map"):
        raise NoSuchResource(run)
    return data.store.frame("steering_map").filter(pl.col("run") == run).drop("run")


def _unsteered(table: pl.LazyFrame, variants: pl.DataFrame) -> pl.DataFrame:
    """The rows of a map before steering, by cell_idx."""
    own = of_role(variants, Role.UNSTEERED)["variant"].implode()
    return table.filter(pl.col("variant").is_in(own)).drop("variant").sort("cell_idx").collect()


def _about_map(data: AtlasData, run: str, variants: pl.DataFrame) -> dict[str, Any]:
    """The number of cells on the map of a run and its bounds [x0, x1, y0, y1], or the command that makes the map."""
    if not data.has("steering_map"):
        return data.missing("steering_map")
    own = of_role(variants, Role.UNSTEERED, Role.GRID)["variant"].implode()
    rows = _map(data, run).filter(pl.col("variant").is_in(own)).collect()
    if rows.is_empty():
        return data.missing("steering_map")
    bounds = {
        name: [rows[x].min(), rows[x].max(), rows[y].min(), rows[y].max()]
        for name, (x, y) in (("pca", ("pc1", "pc2")), ("umap", ("x", "y")))
    }
    return {"n_cells": rows["cell_idx"].n_unique(), "bounds": bounds}


def _summary(data: AtlasData, results: SteeringResults) -> dict[str, Any]:
    """The title, the points measured on test cells, the chosen point, and the headline metric there."""
    plan, rows = results.plan, results.rows
    named = {name: getattr(plan, name) for name in ("question", "target", "toward", "intervention", "n_nulls")}
    grid = of_role(rows, Role.GRID)
    points = grid.select("n_features", "dose").unique().sort("n_features", "dose") if grid.height else pl.DataFrame()
    chosen = grid.filter("chosen") if grid.height else grid
    headline = headline_of(results)
    return {
        "run": results.run,
        **named,
        "kind": shown_name(plan.kind),
        "words": _title(plan),
        "points": points.to_dicts(),
        "chosen": chosen.select("n_features", "dose").row(0, named=True) if chosen.height else None,
        "headline": headline,
        "at_chosen": at_chosen_point(results, headline) if headline else None,
        "has_map": data.has("steering_map") and not _map(data, results.run).head(1).collect().is_empty(),
    }


def _title(plan: SteeringResultsPlan) -> str:
    """What the run did, as a heading."""
    if plan.toward is not None:
        return f"Move {plan.target} cells toward {plan.toward}"
    if plan.target == ALL:
        return f"Mix the labels of {shown_name(plan.kind).replace('_', ' ')}"
    return f"Edit the features of {plan.target}"


def _plan_in_words(plan: SteeringResultsPlan) -> Iterator[tuple[str, str]]:
    """Name and text of each part of the plan of a run."""
    means = "" if plan.by in (None, "none") else f"; means by {str(plan.by).replace('_', ' ')}"
    yield "Intervention", _DONE.get(plan.intervention, plan.intervention) + means
    cells = _CELLS.get(plan.question, "all cells").replace("{target}", plan.target)
    chosen = ", ".join(f"{shown_name(column)}={value}" for column, _, value in (c.partition("=") for c in plan.cells))
    yield "Cells", f"of {chosen}; of these {cells}" if chosen else cells
    if plan.readout is None:
        yield "Tokens", "none: one given vector a cell"
    else:
        yield "Tokens", f"those of {', '.join(plan.gene)}" if plan.gene else "those of every gene"
    given = "given by hand" if plan.feature else "ranked on select cells"
    yield "Features", f"{given}; number and dose chosen on select cells" if len(plan.grid) > 1 else given
    yield "Figures", "on test cells, on which nothing was chosen; intervals are 95 %"
    yield "Nulls", f"{plan.n_nulls} draws of each, at the chosen point"
    yield "Embedding", _EMBEDDING.get(plan.readout, str(plan.readout))
    yield "Site", plan.site


def _command(data: AtlasData, plan: SteeringResultsPlan) -> str:
    """The command that runs the same intervention again, without --n-features, --dose and --n-nulls."""
    words = ["scsae", "steer", "--store", str(data.store.layout.root), "--associations", plan.associations]
    for name in ("kind", "target", "toward", "intervention", "by", "readout", "seed"):
        value = shown_name(plan.kind) if name == "kind" else getattr(plan, name)
        if value is not None and (name, value) not in (("readout", "mean"), ("seed", 0)):
            words += [f"--{name}", str(value)]
    for name in ("feature", "gene"):
        for value in getattr(plan, name):
            words += [f"--{name}", str(value)]
    for column, _, value in (text.partition("=") for text in plan.cells):
        words += ["--cells", f"{shown_name(column)}={value}"]
    return shlex.join(words)


def _metrics(rows: pl.DataFrame) -> list[str]:
    """The names of the measured metrics, the most telling first."""
    known = rows["metric"].unique().to_list()
    return [*(name for name in METRICS if name in known), *sorted(set(known) - METRICS.keys())]


def _groups(rows: pl.DataFrame) -> list[str]:
    if "group" not in rows.columns:
        return [ALL]
    return sorted(rows["group"].drop_nulls().unique().to_list(), key=lambda name: (name != ALL, name))


def _ps(rows: pl.DataFrame) -> list[str]:
    return [name for name in rows.columns if name.startswith("p_")]


def _nulls(rows: pl.DataFrame) -> list[dict[str, Any]]:
    """Name, column of p, draws and least p of each null that was drawn; `too_few` is a text where no p can be small."""
    drawn = of_role(rows, Role.NULL).group_by("condition", maintain_order=True)
    return [
        {
            "name": name,
            "p": p_column(name),
            "n_draws": n_draws,
            "least_p": least_p(n_draws),
            "too_few": too_few_draws(n_draws),
        }
        for name, n_draws in drawn.agg(pl.col("n_draws").max()).iter_rows()
    ]


def _trends(rows: pl.DataFrame) -> list[dict[str, Any]]:
    """By axis, Spearman's correlation of the headline metric with it, Page's p, and the number of units."""
    found = {row["metric"]: row for row in of_role(rows, Role.TREND).iter_rows(named=True)}
    trends = []
    for axis in ("dose", "n_features"):
        if row := found.get(f"{axis}_spearman"):
            p = found.get(f"{axis}_page_p", {}).get("value")
            trends.append({"axis": axis, "spearman": row["value"], "p": p, "n_units": row["n_draws"]})
    return trends


def _features(data: AtlasData, results: SteeringResults, variants: pl.DataFrame) -> list[dict[str, Any]]:
    """The features of the largest point of the grid, best first; a smaller point takes the first of them."""
    grid = of_role(variants, Role.GRID).sort("n_features", descending=True)
    used = grid["features"][0].to_list() if grid.height else list(results.plan.features)
    order = pl.DataFrame({"feature_id": used}, schema={"feature_id": pl.Int32})
    known = [name for name in _ABOUT if name in data.features.columns] if data.has("features") else []
    if known:
        order = order.join(data.features.select(known), on="feature_id", how="left", maintain_order="left")
    if data.has("steering_scores"):
        scores = data.store.frame("steering_scores").filter(pl.col("run") == results.run).select("feature_id", "score")
        order = order.join(scores.collect(), on="feature_id", how="left", maintain_order="left")
    return order.to_dicts()


def _run_names(data: AtlasData) -> Iterator[tuple[str]]:
    return ((run,) for run in data.store.lineage.steering) if data.has("steering") else iter(())


def _mapped(data: AtlasData) -> Iterator[tuple[str]]:
    return ((run,) for (run,) in _run_names(data) if _variants(data, run)["on_map"].any())


def _mapped_variants(data: AtlasData) -> Iterator[tuple[str, str]]:
    for (run,) in _mapped(data):
        for variant in _variants(data, run).filter("on_map")["variant"].to_list():
            yield run, str(variant)


ROUTES = (
    Route(pattern="steering.json", make=runs),
    Route(pattern="steering/{run}.json", make=document, names=_run_names),
    Route(pattern="steering/{run}/map.cols", make=cells, names=_mapped),
    Route(pattern="steering/{run}/variants/{v}.cols", make=places, names=_mapped_variants),
)
