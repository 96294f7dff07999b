"""The Controls page: the SAE beside its baselines, p-values, agreement of donors, and matches in other SAEs.

Figures are of `test` cells; the best features were chosen on `select` cells (`feature_store.associations.comparison`).
"""

from typing import Any

import polars as pl

from feature_store.associations.claims import ALPHA, is_significant
from feature_store.associations.comparison import KEYS, STRONG, summarise
from feature_store.associations.held_out_units import limit_of_claims, unit_column, units_by_split
from feature_store.associations.matching import STABLE
from feature_store.associations.matching import summarise as summarise_matches
from feature_store.atlas.data import AtlasData
from feature_store.atlas.pages.probes import probes
from feature_store.atlas.routes import Route, json_bytes
from feature_store.errors import NotFoundError
from feature_store.query.store import FeatureStore

BINS = 20
MOST_TARGETS = 60
"""Targets of a kind up to which each is listed; of more (genes) a histogram of the excess is shown."""


def controls(data: AtlasData) -> bytes:
    """The sections of the page, each with its figures or with what is missing."""
    return json_bytes(
        {
            "alpha": ALPHA,
            "strong": STRONG,
            "stable": STABLE,
            "baselines": _baselines(data),
            "significance": _significance(data),
            "calibration": _calibration(data),
            "donors": _donors(data),
            "stability": _stability(data),
            "probes": probes(data),
        }
    )


def _baselines(data: AtlasData) -> dict[str, Any]:
    """Per target the best feature of every representation, and the excess of the SAE over each baseline."""
    if not data.has("comparison"):
        missing = data.missing("comparison")["missing"]
        return {"missing": {**missing, "command": f"scsae baseline {data.store.layout.store_option}"}}
    table = data.store.frame("comparison").collect()
    targets, counted = [], []
    for (kind, statistic), rows in table.group_by("target_kind", "statistic", maintain_order=True):
        if rows["target"].n_unique() > MOST_TARGETS:
            counted.append({"target_kind": kind, "statistic": statistic, **_excess(rows)})
        else:
            parts = rows.partition_by("target", maintain_order=True)
            targets += [{**part.select(KEYS).row(0, named=True), "rows": _listed(part)} for part in parts]
    return {
        "representations": data.store.frame("representation").collect().to_dicts(),
        "summary": summarise(table).to_dicts(),
        "targets": targets,
        "counted": counted,
    }


def _listed(rows: pl.DataFrame) -> list[dict[str, Any]]:
    names = "representation feature_id select test p q best excess low high n_units n_better".split()
    return rows.select(names).to_dicts()


def _excess(rows: pl.DataFrame) -> dict[str, Any]:
    """A histogram of the excess over the best baseline, over targets, in bins of .1 from -1 to 1."""
    excess = rows.filter(pl.col("best"))["excess"].drop_nulls()
    place = ((excess + 1) * 10).floor().clip(0, 19).cast(pl.Int64)
    return {"low": -1.0, "high": 1.0, "counts": _counts(place, 20), "n": len(excess)}


def _significance(data: AtlasData) -> dict[str, Any]:
    """Per label the share of features with q <= ALPHA on test cells, in the SAE and in each of its baselines."""
    if not data.has("feature_label"):
        return data.missing("feature_label")
    shares = [{"representation": "sae", "rows": _shares(data.store)}]
    if data.has("representation"):
        # by name: the order is that of the page
        runs = data.store.frame("representation").select("representation", "run").collect().sort("representation")
        own = data.store.lineage.associations
        for name, run in runs.filter(pl.col("run") != own).iter_rows():
            try:
                store = FeatureStore.open(data.store.layout.root, associations=run)
            except NotFoundError:
                continue  # its run was deleted since
            shares.append({"representation": name, "rows": _shares(store)})
    return {"of": shares, "command": f"scsae baseline --kind random {data.store.layout.store_option}"}


def _shares(store: FeatureStore) -> list[dict[str, Any]]:
    claimed = is_significant()
    rows = store.frame("feature_label").filter(pl.col("split") == "test")
    found = rows.group_by("label_kind", "label").agg(
        n=pl.len(),
        significant=claimed.mean(),
        strong=(claimed & (pl.col("rank_biserial").abs() > STRONG).fill_null(False)).mean(),
    )
    return found.sort("label_kind", "label").collect().to_dicts()


def _calibration(data: AtlasData) -> dict[str, Any]:
    """Per kind of label: p of all features and labels on test cells in BINS bins, and how many are at most ALPHA."""
    if not data.has("feature_label"):
        return data.missing("feature_label")
    rows = data.store.frame("feature_label").filter(pl.col("split") == "test").drop_nulls("p")
    tests = rows.select("label_kind", "label", "p", "q").collect()
    kinds = []
    for (kind,), part in sorted(tests.group_by("label_kind"), key=lambda item: str(item[0])):
        place = (part["p"] * BINS).floor().clip(0, BINS - 1).cast(pl.Int64)
        kinds.append(
            {
                "label_kind": kind,
                "n": part.height,
                "n_labels": part["label"].n_unique(),
                "counts": _counts(place, BINS),
                "n_small": int((part["p"] <= ALPHA).sum()),
                "n_claimed": int((part["q"] <= ALPHA).sum()),
                "p_min": part["p"].min(),
            }
        )
    return {"bins": BINS, "kinds": kinds}


def _donors(data: AtlasData) -> dict[str, Any]:
    """The donors (or batches, where no donor is known) of each split, and how many of them agree with each claim."""
    if not data.has("feature_label") or not data.has("cells"):
        return data.missing("feature_label" if data.has("cells") else "cells")
    cells = data.store.panel_cells().select("split", "donor", "batch").collect()
    limit = limit_of_claims(cells)
    rows = data.store.frame("feature_label").filter(pl.col("split") == "test").drop_nulls(["n_agree", "n_donors"])
    rows = rows.filter(pl.col("n_donors") > 0).with_columns(claimed=is_significant())
    agree = rows.group_by("label_kind", "n_donors", "n_agree", "claimed").agg(n=pl.len())
    held = (
        rows.filter("claimed")
        .group_by("label_kind")
        .agg(
            n_claimed=pl.len(),
            n_unanimous=(pl.col("n_agree") == pl.col("n_donors")).sum(),
            n_held=(pl.col("p_donor") <= ALPHA).sum(),
            most=pl.col("n_donors").max(),
        )
    )
    return {
        "unit": unit_column(cells),
        "units": units_by_split(cells),
        "limit": None if limit is None else f"{limit[0].upper()}{limit[1:]}.",
        "agree": agree.sort(pl.all()).collect().to_dicts(),
        "kinds": held.sort("label_kind").collect().to_dicts(),
    }


def _stability(data: AtlasData) -> dict[str, Any]:
    """Per other SAE, the similarity of nearest features in BINS bins of 0 to 1, beside that of chance."""
    if not data.has("feature_match"):
        return data.missing("feature_match")
    found = []
    for (other, method), rows in sorted(data.store.frame("feature_match").collect().group_by("other", "method")):
        compared = rows.drop_nulls("other_feature_id")
        tested = compared["similarity_test"].null_count() < compared.height
        reported = compared["similarity_test" if tested else "similarity"]
        counts = {}
        for name, mutual in (("mutual", True), ("one way", False)):
            values = reported.filter(compared["mutual"] == mutual).drop_nulls()
            place = (values * BINS).floor().clip(0, BINS - 1).cast(pl.Int64)
            counts[name] = _counts(place, BINS)
        figures = summarise_matches(rows)
        null_95 = compared["null_95"].median()
        found.append(
            {"other": other, "method": method, "tested": tested, **figures, "null_95": null_95, "counts": counts}
        )
    return {"bins": BINS, "others": found}


def _counts(place: pl.Series, n: int) -> list[int]:
    """How often each of 0 to n - 1 occurs."""
    counts = dict(place.value_counts().iter_rows())
    return [counts.get(i, 0) for i in range(n)]


ROUTES = (Route(pattern="controls.json", make=controls),)
