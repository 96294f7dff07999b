"""Modules: groups of features that fire together beyond their rates, each with its features, gene sets and stability.

They were found on `train` and `select` cells; coherence is that of `test` cells (`feature_store.modules`). Shuffled
codes give modules, too: what those reach is listed beside.
"""

from typing import Any

import polars as pl

from feature_store.associations.claims import is_significant
from feature_store.atlas.data import AtlasData
from feature_store.atlas.routes import Route, json_bytes

N_GENES = 3
"""Genes in the name of a module."""
MOST_SETS = 12
_FIGURES = "module n_features stability r r_test null_mean null_sd p q top_genes".split()
_ABOUT = ("class", "top_label", "top_label_kind", "top_genes")
_SET = "collection gene_set n_features n_known n_with_set n_all p q".split()


def modules(data: AtlasData) -> bytes:
    """The modules of the newest run, the largest first, and those of shuffled codes."""
    if not data.has("module") or not data.has("feature_module"):
        return json_bytes(data.missing("module"))
    run = newest_run(data)
    rows = data.store.frame("module").filter(run=run).collect()
    members = data.store.frame("feature_module").filter(run=run).select("module", "feature_id", "r").collect()
    known = [name for name in _ABOUT if data.has("features") and name in data.features.columns]
    if known:
        about = data.features.select("feature_id", *known)
        members = members.join(about, on="feature_id", how="left", maintain_order="left")
    members = members.sort("module", "r", "feature_id", descending=[False, True, False], nulls_last=True)
    sets = pl.DataFrame(schema={"module": pl.Int32, **dict.fromkeys(_SET, pl.Float64)})
    if data.has("module_gene_set"):
        sets = data.store.frame("module_gene_set").filter(run=run).select("module", *_SET).collect()
    own = rows.filter(pl.col("control").is_null()).select(_FIGURES)
    own = own.sort("n_features", "r_test", "module", descending=[True, True, False], nulls_last=True)
    shuffled = rows.filter(pl.col("control").is_not_null())
    return json_bytes(
        {
            "run": run,
            "modules": [
                {
                    **row,
                    "name": names(pl.DataFrame([row]))["name"][0],
                    "features": members.filter(module=row["module"]).drop("module").to_dicts(),
                    **_gene_sets(sets.filter(module=row["module"]).drop("module")),
                }
                for row in own.to_dicts()
            ],
            "shuffled": shuffled.select(_FIGURES).to_dicts(),
        }
    )


def newest_run(data: AtlasData) -> str:
    """The newest run of modules of the SAE."""
    return data.store.lineage.measured["modules"][0]


def names(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows of the table `module` as columns number and name: its number and its first genes."""
    genes = pl.col("top_genes").cast(pl.String).str.split(" ").list.head(N_GENES).list.join(" ")
    name = pl.concat_str([pl.col("module").cast(pl.String), genes], separator=": ", ignore_nulls=True)
    return rows.select(pl.col("module").alias("number"), name.alias("name"))


def of_features(data: AtlasData) -> pl.DataFrame:
    """feature_id and module (its name) of the features of the newest modules."""
    run = newest_run(data)
    own = data.store.frame("module").filter(pl.col("control").is_null(), run=run).collect()
    mine = data.store.frame("feature_module").filter(run=run).select("feature_id", number="module").collect()
    return mine.join(names(own), on="number").select("feature_id", module="name")


def _gene_sets(rows: pl.DataFrame) -> dict[str, Any]:
    """The gene sets of smallest p, and how many of all are significant."""
    ordered = rows.sort("p", "collection", "gene_set", nulls_last=True)
    return {
        "gene_sets": ordered.head(MOST_SETS).to_dicts(),
        "n_sets": rows.height,
        "n_significant": rows.filter(is_significant()).height,
    }


ROUTES = (Route(pattern="modules.json", make=modules),)
