"""What features of Kang's cells do to the mini model's predictions and to features of a later layer, beside baselines.

python docs/studies/effects.py --data $SCSAE_DATA --genesets FOLDER --store ROOT --out docs

An SAE of layer 1 of the mini model is trained on the cells of eight donors in two conditions (docs/findings.md), and
neurons, principal components and random directions take its place in the same tables. Of each, the features that go
best with stimulated cells and with B cells are chosen on `select` cells, and a sample is drawn from those that fire.
`scsae effects` measures all of them on `test` cells. A set of genes counts as changed by a feature if its genes change
more than genes that were hidden in as many cells, by more than under every null direction of the feature (features of
B cells are measured once more for this, in all cells, because few cells have their genes); the same is asked of the
targets of each regulator (docs/regulators.md), and of such lists with genes exchanged. Then the features
of the SAE are ablated and those of an SAE of layer 3 are read (`scsae circuit`).

The section of docs/effects.md between its two marks is written anew.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from findings_study.cells import STIMULATED, StudyFiles, prepare
from findings_study.page import markdown
from findings_study.runs import BASELINES, cell_type_recipe, run_baselines, run_cell_types
from regulators import FILE, N_PERMUTED, permuted_sets, read_sets, strata_of_genes
from scipy.stats import spearmanr

from feature_store import FeatureStore
from feature_store.associations.multiple_testing import benjamini_hochberg
from feature_store.storage import commit
from pipelines.circuit import circuit
from pipelines.config import CircuitOptions, EffectsOptions, Recipe
from pipelines.effects import effects
from pipelines.effects.actors import NULLS
from pipelines.recipe import run_recipe

QUESTIONS = (("condition", STIMULATED, "INTERFERON_RESPONSE"), ("cell_type", "B cells", "B_CELL"))
"""Label kind, label, and the set of genes that features of it are asked for."""
N_CHOSEN, N_SAMPLE, CELLS, N_NULLS = 10, 40, 48, 4
CELLS_OF_LABEL = {"B cells": 512}
"""Cells in which the features of a label are measured for its set, where they are not the CELLS of all: of these data
more than there are `test` cells."""
N_MATCHED = 10
LATER_LAYER = "3"
BEGIN, END = "<!-- kang: begin -->", "<!-- kang: end -->"
Q = 0.05


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study and write its section."""
    parser = argparse.ArgumentParser(description="Study what features do to predictions of genes in real cells.")
    parser.add_argument("--data", type=Path, required=True, help="folder with the .h5ad files ($SCSAE_DATA)")
    parser.add_argument("--genesets", type=Path, required=True, help=f"folder with {FILE}")
    parser.add_argument("--store", type=Path, required=True, help="folder of the store")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder with effects.md")
    options = parser.parse_args(arguments)

    files = prepare(options.data, options.store / "data")
    found = run_cell_types(files, options.store)
    stores = {"SAE": found, **dict(zip(BASELINES, run_baselines(found).values(), strict=True))}
    targets, strata = read_sets(options.genesets / FILE), strata_of_genes(found)
    permuted = [permuted_sets(targets, strata, seed) for seed in range(N_PERMUTED)]
    tables = {name: measured(store, [targets, *permuted]) for name, store in stores.items()}
    later = run_recipe(later_recipe(files), options.store)
    later_sae = next(result.run for result in later if result.kind == "saes")
    edges = edges_of(found, later_sae)
    page = options.out / "effects.md"
    text = page.read_text()
    before, after = text[: text.index(BEGIN)], text[text.index(END) + len(END) :]
    page.write_text(f"{before}{BEGIN}\n{section(tables, edges)}\n{END}{after}")


def later_recipe(files: StudyFiles) -> Recipe:
    """The recipe of the cells at a later layer, up to the training."""
    recipe = cell_type_recipe(files)
    extract = recipe.extract.model_copy(update={"layer": (LATER_LAYER,)})
    return recipe.model_copy(update={"extract": extract, "encode": None, "associate": None})


def chosen_features(store: FeatureStore) -> dict[str, list[int]]:
    """The features of each label with the smallest p on `select` cells, stronger in its cells, and under "sample" a
    seeded draw of those that fire.
    """
    labels = (
        store.frame("feature_label").filter((pl.col("split") == "select") & (pl.col("rank_biserial") > 0)).collect()
    )
    found = {}
    for kind, label, _ in QUESTIONS:
        own = labels.filter((pl.col("label_kind") == kind) & (pl.col("label") == label))
        found[label] = own.sort("p", "feature_id")["feature_id"].head(N_CHOSEN).to_list()
    alive = store.frame("features").filter(~pl.col("dead") & (pl.col("p99") > 0)).collect()["feature_id"].sort()
    n = min(N_SAMPLE, len(alive))
    found["sample"] = np.random.default_rng(0).choice(alive.to_numpy(), n, replace=False).tolist()
    return found


def measured(store: FeatureStore, regulators: Sequence[Mapping[str, Sequence[str]]]) -> dict[str, Any]:
    """The figures of a dictionary: features that change a gene, what the chosen ones do to their sets, and how often
    features change the targets of a regulator (the first of `regulators`) or such lists permuted (the others).
    """
    chosen = chosen_features(store)
    sets = dict(store.frame("gene_sets").select("gene_set", "genes").collect().iter_rows())
    everything = effects_of(store, [feature for some in chosen.values() for feature in some], CELLS)
    changes = {}
    for _, label, name in QUESTIONS:
        cells = CELLS_OF_LABEL.get(label, CELLS)
        joined = everything.joined if cells == CELLS else effects_of(store, chosen[label], cells).joined
        found = (SetChanges(joined, feature).of(sets[name]) for feature in chosen[label])
        changes[label] = [change for change in found if change]
    is_sampled = pl.col("feature_id").is_in(chosen["sample"])
    sampled = [SetChanges(everything.joined, feature) for feature in chosen["sample"]]
    return {
        "sample": shares(everything.table.filter(is_sampled), chosen["sample"]),
        "strength": everything.summary.filter(is_sampled),
        "sets": changes,
        "regulators": [regulator_share(sampled, lists) for lists in regulators],
    }


class Measured(NamedTuple):
    """Tables of a run of `scsae effects`: genes, features, and the genes beside their null draws."""

    table: pl.DataFrame
    summary: pl.DataFrame
    joined: pl.DataFrame


def effects_of(store: FeatureStore, features: Iterable[int], cells: int) -> Measured:
    """Measure some features in at most so many cells each."""
    every = tuple(sorted(set(features)))
    result = effects(
        EffectsOptions(sae=store.lineage.sae, feature=every, cells=cells, n_nulls=N_NULLS), store.layout.root
    )
    table, summary, draws = (
        commit.read_table(result.path / name) for name in ("feature_effect", "feature_effect_summary", "draws")
    )
    genes = table.select("feature_id", "intervention", "gene", "n_cells", "effect")
    return Measured(table, summary, with_draws(genes, draws))


def regulator_share(sampled: Sequence["SetChanges"], lists: Mapping[str, Sequence[str]]) -> tuple[float, int]:
    """The share of pairs of an ablated feature and a list in which the list changes by more than under all nulls of the
    feature, and the number of pairs; both are of lists of three genes or more that were hidden.
    """
    found = [changes.of(genes) for changes in sampled for genes in lists.values()]
    beyond = [change["beyond"] for change in found if change]
    return (float(np.mean(beyond)) if beyond else float("nan"), len(beyond))


def with_draws(genes: pl.DataFrame, draws: pl.DataFrame) -> pl.DataFrame:
    """The rows of `feature_effect` beside their null draws; a feature under an intervention has its genes in the same
    order in both tables.
    """
    pair = ["feature_id", "intervention"]
    rows, drawn = (frame.sort(pair, maintain_order=True) for frame in (genes, draws))
    assert rows.select(*pair, "n_cells").equals(drawn.select(*pair, pl.col("n_cells").cast(pl.Int64)))
    return rows.with_columns(drawn.select(NULLS))


def shares(table: pl.DataFrame, features: Sequence[int]) -> dict[str, float]:
    """The share of features with a gene at q <= .05 when ablated: against both nulls, and against random ones alone."""
    own = table.filter(intervention="ablate")
    q = pl.Series("q_random", benjamini_hochberg(own["p_random"].to_numpy()))
    own = own.with_columns(q, q_both=pl.Series(benjamini_hochberg(own["p"].to_numpy())))
    n = max(len(features), 1)
    return {
        "both nulls": own.filter(pl.col("q_both") <= Q)["feature_id"].n_unique() / n,
        "random directions": own.filter(pl.col("q_random") <= Q)["feature_id"].n_unique() / n,
        "features": n,
    }


class SetChanges:
    """How a feature's ablation changes sets of genes, beside genes hidden in as many cells."""

    def __init__(self, joined: pl.DataFrame, feature: int) -> None:
        rows = joined.filter(feature_id=feature, intervention="ablate")
        self._place = {gene: place for place, gene in enumerate(rows["gene"])}
        self._n_cells = rows["n_cells"].to_numpy().astype(np.int64)
        drawn = [rows[null].to_numpy() for null in NULLS]
        self._values = np.concatenate([rows["effect"].to_numpy()[:, None], *drawn], axis=1).astype(np.float64)
        self._nearest = cache(self._genes_by_distance)

    def _genes_by_distance(self, n_cells: int) -> np.ndarray:
        return np.argsort(np.abs(self._n_cells - n_cells), kind="stable")

    def of(self, genes: Sequence[str]) -> dict[str, float] | None:
        """The change of a set; None where fewer than three of its genes were hidden, or too few others.

        change: mean effect on the set less that on the matched genes. beyond: whether it lies outside what all null
        draws of the feature do. ratio: mean |effect| on the set over that on the matched genes; null_ratio: its mean
        over draws.
        """
        own = np.array(sorted({self._place[gene] for gene in genes if gene in self._place}), dtype=np.int64)
        if len(own) < 3 or len(own) + N_MATCHED > len(self._n_cells):
            return None
        is_own = np.zeros(len(self._n_cells), dtype=bool)
        is_own[own] = True
        by_distance = (self._nearest(int(self._n_cells[place])) for place in own)
        matched = np.stack([order[~is_own[order]][:N_MATCHED] for order in by_distance])
        values = self._values
        change = values[own].mean(0) - values[matched].mean((0, 1))
        ratio = np.abs(values[own]).mean(0) / np.abs(values[matched]).mean((0, 1))
        return {
            "change": float(change[0]),
            "beyond": float(abs(change[0]) > np.abs(change[1:]).max()),
            "lowered": float(change[0] < change[1:].min()),
            "ratio": float(ratio[0]),
            "null_ratio": float(ratio[1:].mean()),
            "genes": float(len(own)),
        }


def edges_of(store: FeatureStore, later_sae: str) -> dict[str, Any]:
    """Figures of the edges between the sampled features and those of the later SAE."""
    chosen = chosen_features(store)
    every = tuple(sorted({feature for some in chosen.values() for feature in some}))
    options = CircuitOptions(from_sae=store.lineage.sae, to_sae=later_sae, feature=every, cells=CELLS, n_nulls=N_NULLS)
    result = circuit(options, store.layout.root)
    edges, draws = (commit.read_table(result.path / name) for name in ("feature_edge", "draws"))
    strong = edges.filter(pl.col("q") <= Q)
    fired = draws.group_by("to_feature_id").agg(pl.col("n_cells_fired").sum()).sort("to_feature_id")
    raw = draws.filter(pl.col("effect").abs() >= draws["effect"].abs().quantile(1 - strong.height / draws.height))
    degree = {
        name: fired.join(frame.group_by("to_feature_id").agg(n=pl.len()), on="to_feature_id", how="left")[
            "n"
        ].fill_null(0)
        for name, frame in (("significant", strong), ("as many of largest effect", raw))
    }
    return {
        "pairs": draws.height,
        "edges": strong.height,
        "features": len(every),
        "from": strong["from_feature_id"].n_unique(),
        "excite": strong.filter(relation="excites").height,
        "agree": strong.filter(pl.col("n_agree") == pl.col("n_donors")).height,
        "modules": commit.read_table(result.path / "edge_module")["module"].n_unique(),
        "degree": {
            name: float(spearmanr(values, fired["n_cells_fired"]).statistic) if strong.height else float("nan")
            for name, values in degree.items()
        },
    }


def median_of(rows: Sequence[Mapping[str, float]], key: str) -> float | None:
    """The median of a figure over features."""
    return float(np.median([row[key] for row in rows])) if rows else None


def section(tables: Mapping[str, Mapping[str, Any]], edges: Mapping[str, Any]) -> str:
    """The section: a table of shares, one of sets, and the edges."""
    rows = []
    for name, table in tables.items():
        sample, strength = table["sample"], table["strength"]
        ablated = strength.filter(intervention="ablate")
        rows.append(
            {
                "representation": name,
                "features": int(sample["features"]),
                "change a gene, both nulls": sample["both nulls"],
                "random directions alone": sample["random directions"],
                "strength over the harder null": ablated["strength_ratio"].median(),
                "direct path, rank correlation": ablated["direct_spearman"].median(),
            }
        )
    sets = []
    for _, label, name in QUESTIONS:
        for of, table in tables.items():
            own = table["sets"][label]
            sets.append(
                {
                    "features of": label,
                    "genes": name,
                    "representation": of,
                    "features": len(own),
                    "beyond all null draws": int(sum(row["beyond"] for row in own)),
                    "lower the set": int(sum(row["lowered"] for row in own)),
                    "set over matched genes": median_of(own, "ratio"),
                    "nulls": median_of(own, "null_ratio"),
                }
            )
    targets = []
    for of, table in tables.items():
        (share, n_pairs), *others = table["regulators"]
        permuted = [other for other, _ in others]
        targets.append(
            {
                "representation": of,
                "pairs of a feature and a regulator": n_pairs,
                "beyond all null draws": share,
                "permuted lists": f"{np.mean(permuted):.3f} ({min(permuted):.3f} to {max(permuted):.3f})",
            }
        )
    degree = edges["degree"]
    return f"""
`python docs/studies/effects.py --data $SCSAE_DATA --genesets FOLDER --store ROOT --out docs` writes this section: Kang
et al. 2018, 2,000 PBMC of eight donors, control and IFN-beta, SAE of layer 1 of the mini model (docs/findings.md),
{CELLS} `test` cells a feature, {N_NULLS} directions of each null. {N_SAMPLE} features that fire were drawn of each
representation and ablated. Shares are of features with at least one gene at q <= .05 among these; medians are over
features.

{markdown(pl.DataFrame(rows))}
The {N_CHOSEN} features of each label with the smallest p on `select` cells, ablated; those of
{" and ".join(CELLS_OF_LABEL)} in all `test` cells in which they fire. A feature goes beyond all null
draws where its set of genes changes, against genes hidden in as many cells, more than under each of its {2 * N_NULLS}
null directions; one in {2 * N_NULLS + 1} would by chance. A feature is left out if fewer than three genes of the set
were hidden in five of its cells.

{markdown(pl.DataFrame(sets))}
The sampled features and the targets of each of the 329 regulators of TRRUST v2 ([regulators](regulators.md)), beside
the same lists with genes exchanged inside strata of detection and co-expression, {N_PERMUTED} times (mean and range):

{markdown(pl.DataFrame(targets))}
Edges from {edges["features"]} of the SAE's features to those of an SAE of layer {LATER_LAYER}: of {edges["pairs"]:,}
pairs {edges["edges"]:,} are significant, from {edges["from"]} features; {edges["excite"]:,} excite, and in
{edges["agree"]:,} all donors agree in sign. They fall into {edges["modules"]} modules. The number of edges that come
to a later feature goes with how often it fires with a rank correlation of {degree["significant"]:.2f}; for as many
pairs of the largest raw effect it is {degree["as many of largest effect"]:.2f}."""


if __name__ == "__main__":
    main()
