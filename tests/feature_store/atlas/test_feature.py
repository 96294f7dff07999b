"""One feature: its document against the store and independent statistics, and its page in a browser."""

from __future__ import annotations

import json
import shutil
from itertools import combinations, product
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pytest
from planted_effects import STRONG
from scipy import sparse
from scipy.stats import gaussian_kde, rankdata

from feature_store.associations import Labels, Strata, associate_batch, associate_labels
from feature_store.atlas.pages.feature import nearest_of_random
from feature_store.atlas.pages.feature_codes import Codes, Columns, correlations
from feature_store.atlas.pages.feature_words import in_words
from feature_store.atlas.pages.null_bands import null_band
from feature_store.atlas.pages.violins import MOST_GROUPS, N_POINTS, Grouping, outlines, quantiles, spread, violins
from feature_store.atlas.resources import Resources
from feature_store.query.metrics import METRICS

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Page

    from feature_store import FeatureStore

DEAD = 119
GENES = [f"GENE{i}" for i in range(38)]


@pytest.fixture(scope="module")
def resources(atlas_store: FeatureStore) -> Resources:
    return Resources(atlas_store)


def document(resources: Resources, feature: int) -> Any:
    found = resources.get(f"features/{feature}.json")
    assert found is not None
    return json.loads(found.body)


def code_of(store: FeatureStore, feature: int) -> pl.DataFrame:
    """The cell table with the code of a feature, 0 where it is silent."""
    codes = store.frame("codes").filter(pl.col("feature_id") == feature).group_by("cell_idx").agg(pl.col("value").max())
    joined = store.frame("cells").join(codes, on="cell_idx", how="left").sort("cell_idx")
    return joined.with_columns(pl.col("value").cast(pl.Float64).fill_null(0.0)).collect()


@pytest.mark.parametrize("split", ["test", "all"])
@pytest.mark.parametrize("column", ["cell_type", "batch", "condition"])
def test_violins_are_of_every_cell_of_a_split(resources, atlas_store, split, column):
    cells = code_of(atlas_store, 6)
    cells = cells if split == "all" else cells.filter(split="test")
    groups = document(resources, 6)["cells"]["violins"][split][column]["groups"]
    assert sorted(group["label"] for group in groups) == cells[column].unique().sort().to_list()
    assert [group["mean"] for group in groups] == sorted((group["mean"] for group in groups), reverse=True)
    for group in groups:
        values = cells.filter(pl.col(column) == group["label"])["value"].to_numpy()
        fires = values[values != 0]
        assert (group["n"], group["n_firing"]) == (values.size, fires.size)
        assert group["mean"] == pytest.approx(values.mean())
        quartiles = [group[name] for name in ("low", "q25", "median", "q75", "high")]
        assert quartiles == pytest.approx(np.quantile(fires, (0, 0.25, 0.5, 0.75, 1)))


def test_outlines_are_the_densities_of_scipy_relative_to_their_peaks(rng):
    # more groups than are worked out at once
    groups = [np.sort(rng.gamma(3.0, 0.7, size)) for size in [4000, 21, 300, 2] * 20]
    shapes = outlines(np.repeat(np.arange(80), [len(one) for one in groups]), np.concatenate(groups), 80)
    for values, shape in zip(groups, shapes, strict=True):
        place = np.linspace(values.min(), values.max(), N_POINTS)
        width = max(values.std(ddof=1) * values.size**-0.2, place[1] - place[0])
        density = gaussian_kde(values, bw_method=width / values.std(ddof=1))(place)
        assert shape == pytest.approx(density / density.max(), abs=0.004)


def test_few_or_equal_firing_cells_are_dots_and_silent_labels_have_neither():
    values = [np.array([2.0, 0.5, 1.0]), np.empty(0), np.full(50, 1.5), np.linspace(1, 2, 50)]
    few, silent, equal, wide = spread(np.repeat(np.arange(4), [3, 0, 50, 50]), np.concatenate(values), 4)
    assert (few["dots"], few["outline"], few["n_firing"]) == ([0.5, 1.0, 2.0], None, 3)
    assert silent == {"n_firing": 0, "outline": None, "dots": None}
    assert equal["dots"] == [1.5]
    assert len(wide["outline"]) == N_POINTS
    assert spread(np.empty(0, np.int64), np.empty(0), 0) == []


def test_violins_are_of_the_labels_of_highest_mean_and_leave_out_cells_without_one():
    n, names = np.array([2] * MOST_GROUPS + [2, 0]), tuple(f"l{i:02d}" for i in range(MOST_GROUPS + 2))
    code = np.concatenate([np.repeat(np.arange(MOST_GROUPS + 1), 2), [-1]])
    fires = np.arange(0, code.size, 2)
    found = violins({"type": Grouping(names, code, n, 1)}, fires, 1.0 + code[fires])["type"]
    assert [group["label"] for group in found["groups"]] == list(names[MOST_GROUPS:0:-1])
    assert (found["n_unknown"], found["n_left_out"]) == (1, 1)
    assert (found["groups"][0]["n"], found["groups"][0]["mean"]) == (2, (1.0 + MOST_GROUPS) / 2)
    assert violins({"none": Grouping((), np.full(3, -1), np.empty(0, np.int64), 0)}, np.arange(2), np.ones(2)) == {
        "none": {"groups": [], "n_unknown": 0, "n_left_out": 0}
    }


@pytest.mark.parametrize("split", ["test", "all"])
def test_the_histogram_of_a_feature_counts_the_cells_in_which_it_fires(resources, atlas_store, split):
    cells = code_of(atlas_store, 6)
    values = (cells if split == "all" else cells.filter(split="test"))["value"].to_numpy()
    fires = values[values != 0]
    found = document(resources, 6)["cells"]["histograms"][split]
    assert (found["n"], found["n_firing"]) == (values.size, fires.size)
    assert found["counts"] == np.histogram(fires, len(found["counts"]), range=(0, fires.max()))[0].tolist()
    assert found["quartiles"] == pytest.approx(np.quantile(fires, (0.25, 0.5, 0.75)))


def test_cells_are_listed_from_every_fifth_of_those_in_which_a_feature_fires(resources, atlas_store):
    ordered = code_of(atlas_store, 6).filter(pl.col("value") > 0).sort("value", "cell_idx", descending=[True, False])
    found = document(resources, 6)["cells"]["quantiles"]
    fifths = np.array_split(np.arange(ordered.height), 5)
    assert [row["fifth"] for row in found] == [number for number in range(1, 6) for _ in range(4)]
    for row in found:
        place = ordered["cell_idx"].to_list().index(row["cell_idx"])
        assert place in fifths[row["fifth"] - 1]
        assert row["value"] == ordered["value"][place]
    assert {found[0]["cell_idx"], found[-1]["cell_idx"]} == {ordered["cell_idx"][0], ordered["cell_idx"][-1]}
    assert all(row["cell_id"] for row in found)


def test_quantiles_are_those_of_numpy(rng):
    groups, shares = [np.array([2.0]), rng.normal(size=2), rng.normal(size=101)], np.array([0, 0.1, 0.5, 0.77, 1])
    found = quantiles(
        np.concatenate([np.sort(one) for one in groups]), np.array([0, 1, 3]), np.array([1, 2, 101]), shares
    )
    for values, row in zip(groups, found, strict=True):
        assert row == pytest.approx(np.quantile(values, shares))


def test_a_feature_in_words_stands_on_the_figures_of_its_tables(resources, atlas_store):
    labels = atlas_store.frame("feature_label").filter(split="test", label_kind="cell_type").collect()
    for feature in (4, 5, 6, 7):
        about = document(resources, feature)["about"]
        summary = document(resources, feature)["summary"]
        (row,) = labels.filter(feature_id=feature, label=about["top_label"]).to_dicts()
        assert about["top_label"] in summary["text"]
        first = summary["checks"][0]
        assert f"AUROC {row['auroc']:.3f} for {about['top_label']}" in first["text"]
        assert first["holds"] == (row["q"] <= 0.05)
        donors = next(check for check in summary["checks"] if "donors agree" in check["text"])
        assert donors["text"].startswith(f"{row['n_agree']} of {row['n_donors']}")
        low, high = ((1 + row[name]) / 2 for name in ("low", "high"))
        assert donors["text"].endswith(f"AUROC {low:.2f} to {high:.2f} (95 %) across them")
        assert donors["holds"] == (row["n_agree"] == row["n_donors"] and row["low"] > 0)
        assert summary["grade"] in ("well supported", "partly supported")
    assert document(resources, DEAD)["summary"]["grade"] == "silent"


def about_of(**given: Any) -> dict[str, Any]:
    """A document with one feature of nothing but what is given."""
    names = "top_label top_label_kind top_genes top_identity_genes class class_confidence batch_effect".split()
    about = {"dead": False, **dict.fromkeys(names), "top_label_auroc_select": 0.9, **given}
    return {"about": about, "genes": {}, "gene_sets": {}, "matches": {}}


def test_a_feature_of_nothing_is_unexplained_and_a_grade_needs_every_check_to_hold(atlas_store):
    data = Resources(atlas_store).data
    nothing = in_words(data, 1, about_of(**{"class": "mixed"}))
    assert nothing["grade"] == "unexplained"
    assert nothing["text"].startswith("Nothing that was tested explains it")
    # of feature 4 four of four donors agree; another SAE or a firm class can only take that back
    label = {"top_label": "B", "top_label_kind": "cell_type", "class": "cell-context"}
    firm, shaky = (in_words(data, 4, about_of(**label, class_confidence=share)) for share in (0.95, 0.4))
    assert (firm["grade"], shaky["grade"]) == ("well supported", "partly supported")
    significant = "the association is significant on test cells"
    assert shaky["means"] == (
        f"{significant}, but this check fails: the class cell-context in 40 % of resampled data sets"
    )
    data.unit = "batch"
    alone = in_words(data, 4, about_of(**label, class_confidence=0.95))
    assert alone["means"] == f"{significant}, but neither donors nor another SAE could be asked"
    data.unit = "donor"
    other = {"other": "beef", "other_feature_id": 3, "similarity": 0.4, "mutual": False, "p": 0.4}
    lonely = in_words(data, 4, {**about_of(**label), "matches": {"rows": [other]}})
    assert lonely["grade"] == "partly supported"
    assert any("0 of 1 nearest features" in check["text"] and check["holds"] is False for check in lonely["checks"])
    batch = in_words(data, 1, about_of(batch_effect=0.31, **{"class": "batch"}))
    assert "tells batches apart" in batch["text"]
    assert "31 %" in batch["checks"][0]["text"]


def planted_cells(rng: np.random.Generator, n: int = 240) -> tuple[Any, Labels, Labels]:
    """Codes [n 3] with ties and zeros that follow type and donor, types (one unknown for some cells), donors."""
    donor, kind = rng.integers(0, 4, n), rng.integers(0, 3, n)
    values = np.round(np.maximum(rng.normal(size=(n, 3)) + 0.6 * (kind == 1)[:, None] + 0.5 * donor[:, None] - 1, 0), 1)
    names = np.array(["B", "T", "NK"], dtype=object)[kind]
    names[:17] = None
    return (
        sparse.csr_array(values),
        Labels.from_values("cell_type", names.tolist()),
        Labels.from_values("donor", [f"d{i}" for i in donor]),
    )


def test_the_effect_behind_a_null_band_is_the_one_of_the_table(rng):
    codes, kinds, donors = planted_cells(rng)
    rows = associate_labels(codes, kinds, {"select": np.ones(240, dtype=bool)}, donors).table
    mask = kinds.known
    blocks = Strata.of(int(mask.sum()), donors.take(mask))
    band = null_band(codes[np.flatnonzero(mask)], kinds.take(mask), blocks, within=False)
    for feature in range(3):
        for name, effect in zip(band.names, band.effect[:, feature], strict=True):
            (shown,) = rows.filter(feature_id=feature, label=name)["rank_biserial"]
            assert effect == pytest.approx(shown, abs=1e-12)


def test_the_effect_of_a_batch_is_that_within_types(rng):
    codes, kinds, donors = planted_cells(rng)
    batch = Labels.from_values("batch", [f"b{i % 2}" for i in range(240)])
    rows = associate_batch(codes, batch, {"select": np.ones(240, dtype=bool)}, kinds, units=donors).table
    band = null_band(codes, batch, Strata.of(240, kinds), within=True)
    assert band.mean == pytest.approx(np.zeros((2, 3)), abs=1e-12)
    for name, effect in zip(band.names, band.effect[:, 1], strict=True):
        (shown,) = rows.filter(feature_id=1, label=name)["rank_biserial"]
        assert effect == pytest.approx(shown, abs=1e-12)


@pytest.mark.parametrize("within", [False, True])
def test_a_null_band_has_the_moments_of_every_permutation(within):
    values = np.array([0, 0, 1, 3, 3, 2, 0, 5, 0.5, 4])
    block = np.array([0] * 5 + [1] * 4 + [2])
    is_label = np.array([1, 0, 0, 1, 0, 0, 1, 1, 0, 1])
    labels = Labels(kind="k", codes=is_label, names=("rest", "label"), known=np.ones(10, dtype=bool))
    band = null_band(sparse.csr_array(values[:, None]), labels, Strata(codes=block, n_strata=3), within=within)

    def effect(chosen: Any) -> float:
        u = pairs = 0.0
        for cells in [np.flatnonzero(block == b) for b in range(3)] if within else [np.arange(10)]:
            own = np.isin(cells, chosen)
            n, m = own.sum(), (~own).sum()
            u, pairs = u + rankdata(values[cells])[own].sum() - n * (n + 1) / 2, pairs + n * m
        return 2 * u / pairs - 1

    each = [combinations(np.flatnonzero(block == b), int(is_label[block == b].sum())) for b in range(3)]
    every = [effect(np.concatenate(chosen)) for chosen in product(*each)]
    assert band.effect[1, 0] == pytest.approx(effect(np.flatnonzero(is_label)))
    assert (band.mean[1, 0], band.sd[1, 0]) == pytest.approx((np.mean(every), np.std(every)))
    low, high = np.mean(every) - 1.96 * np.std(every), np.mean(every) + 1.96 * np.std(every)
    assert band.ends(0)["label"] == pytest.approx((max(low, -1), min(high, 1)), abs=1e-4)


def test_labels_tested_by_whole_donors_have_no_null_band(resources):
    codes = resources.data.cached(Codes)
    assert codes.null_ends(3, "condition", "unit-rank-permutation/1 units=donor") is None
    assert codes.null_ends(3, "condition", "something/2 blocks=donor") is None
    assert codes.null_ends(3, "condition", "van-elteren/1 blocks=nowhere") is None
    assert codes.null_ends(3, "condition", "van-elteren/1 blocks=none") is not None


def test_labels_are_chosen_on_select_and_shown_as_on_test(resources, atlas_store):
    mine = atlas_store.frame("feature_label").filter(pl.col("feature_id") == 6).collect()
    chosen = mine.filter(split="select").sort(pl.col("rank_biserial").abs(), descending=True)
    rows = document(resources, 6)["labels"]["rows"]
    assert [(row["label_kind"], row["label"]) for row in rows] == list(chosen.select("label_kind", "label").iter_rows())
    for row in rows:
        (shown,) = mine.filter(split="test", label_kind=row["label_kind"], label=row["label"]).to_dicts()
        for name in ("rank_biserial", "low", "high", "q", "p", "n", "n_label", "n_donors", "n_agree"):
            assert row[name] == shown[name]
        # the planted batches are constant within donors, and test cells are of one condition: nothing can be permuted
        assert (row["null"] is not None) == (row["label_kind"] == "cell_type")
        assert row["null"] is None or -1 <= row["null"][0] < row["null"][1] <= 1


def test_genes_are_chosen_on_select_and_shown_as_on_test(resources, atlas_store):
    mine = atlas_store.frame("feature_gene").filter(pl.col("feature_id") == 6).collect()
    genes = document(resources, 6)["genes"]
    for part, key in (("expression", "pearson"), ("identity", "identity_precision")):
        chosen = mine.filter(split="select").sort(pl.col(key).abs(), descending=True)["gene"].to_list()
        assert [row["gene"] for row in genes[part]] == chosen
        for row in genes[part]:
            (shown,) = mine.filter(split="test", gene=row["gene"]).to_dicts()
            assert {name: row[name] for name in ("pearson", "q", "identity_recall", "lift", "pearson_within_type")} == {
                name: shown[name] for name in ("pearson", "q", "identity_recall", "lift", "pearson_within_type")
            }


def test_gene_sets_tokens_neighbours_and_matches_are_the_stores(resources, atlas_store):
    found = document(resources, 6)

    def mine(table: str) -> pl.DataFrame:
        return atlas_store.frame(table).filter(pl.col("feature_id") == 6).collect()

    sets = mine("feature_geneset")
    assert [row["gene_set"] for row in found["gene_sets"]["rows"]] == sets.filter(split="select").sort("p")[
        "gene_set"
    ].to_list()
    for row in found["gene_sets"]["rows"]:
        assert row["q"] == sets.filter(split="test", gene_set=row["gene_set"])["q"].item()
    tokens = mine("feature_token").sort("value", descending=True)
    assert [row["gene"] for row in found["tokens"]["rows"]] == tokens["gene"].to_list()
    assert [row["cell_id"] for row in found["tokens"]["rows"]] == [f"AC{i:04d}-1" for i in tokens["cell_idx"]]
    near = mine("feature_neighbour").sort("rank")
    assert [row["feature_id"] for row in found["neighbours"]["rows"]] == near["other_feature_id"].to_list()
    (match,) = found["matches"]["rows"]
    assert match["other_feature_id"] == mine("feature_match")["other_feature_id"].item()
    # the other SAE is not in this store any more
    assert (match["other"], match["model"], match["seed"]) == ("07he5", None, None)


def test_the_tokens_of_one_cell_are_in_order_with_the_code_at_each(resources, atlas_store):
    found = document(resources, 6)["in_order"]
    (strongest,) = atlas_store.top_cells(6, 1).to_dicts()
    assert (found["cell"]["cell_idx"], found["cell"]["cell_id"]) == (strongest["cell_idx"], strongest["cell_id"])
    assert found["tokens"]["position"] == [0, 1, 2]
    assert max(found["tokens"]["value"]) == pytest.approx(strongest["value"], rel=1e-6)
    top = atlas_store.frame("top_cell_token").filter(feature_id=6).collect()
    assert found["tokens"]["gene"] == top["gene"].to_list()
    assert found["tokens"]["value"] == pytest.approx(top["value"].to_list(), rel=1e-6)
    assert document(resources, DEAD)["in_order"] == {"cell": None, "tokens": {}}


def test_a_match_says_what_the_other_autoencoder_is_of(store_without):
    store = store_without()
    shutil.copytree(store.layout.saes_dir("5ae"), store.layout.saes_dir("07he5"))
    (match,) = document(Resources(store), 6)["matches"]["rows"]
    assert (match["other"], match["model"], match["site"], match["seed"]) == ("07he5", "mini", "layer.2", 0)


def test_effects_are_the_genes_of_smallest_p_and_a_line_on_all(resources, atlas_store):
    found = document(resources, STRONG)["effects"]
    for way in ("ablate", "boost"):
        mine = atlas_store.frame("feature_effect").filter(feature_id=STRONG, intervention=way).sort("p").collect()
        assert [row["gene"] for row in found["rows"][way]] == mine["gene"].head(10).to_list()
        assert found["rows"][way][0]["effect"] == pytest.approx(mine["effect"][0])
        assert found["summary"][way]["n_down"] == 3
    assert document(resources, 50)["effects"] == {"rows": {}, "summary": {}}


def test_inputs_are_the_genes_that_take_most_of_the_code_with_both_paths(resources, atlas_store):
    found = document(resources, STRONG)["inputs"]["rows"]
    mine = atlas_store.frame("feature_input").filter(feature_id=STRONG).collect()
    total = mine.group_by("gene").agg(pl.col("share").sum()).sort("share", descending=True)
    assert [row["gene"] for row in found] == total["gene"].head(10).to_list()
    assert found[0]["gene"] == GENES[1]
    assert {path: row["share"] for path, row in found[0]["paths"].items()} == {"own token": 0.3, "other tokens": 0.4}
    assert document(resources, 50)["inputs"] == {"rows": []}


def test_edges_are_the_pairs_of_smallest_p_on_each_side(resources, atlas_store):
    found = document(resources, STRONG)["edges"]
    rows = atlas_store.frame("feature_edge").collect()
    later = rows.filter(from_sae="5ae", from_feature_id=STRONG).sort("p")
    assert [row["other_feature_id"] for row in found["downstream"]] == later["to_feature_id"].head(8).to_list()
    assert [(row["relation"], row["other_sae"]) for row in found["downstream"][:2]] == [
        ("excites", "1a7e"),
        ("inhibits", "1a7e"),
    ]
    earlier = rows.filter(to_sae="5ae", to_feature_id=STRONG).sort("p")
    assert [row["other_feature_id"] for row in found["upstream"]] == earlier["from_feature_id"].head(8).to_list()
    assert {row["other_sae"] for row in found["upstream"]} == {"07he5"}
    assert document(resources, 50)["edges"] == {"upstream": [], "downstream": []}


def test_a_gene_names_the_features_that_change_it(resources, atlas_store):
    names = json.loads(resources.get("names.json").body)["genes"]
    gene = names.index(GENES[0])
    found = json.loads(resources.get(f"genes/{gene}.json").body)["changed_by"]
    mine = atlas_store.frame("feature_effect").filter(gene=GENES[0]).sort("p").collect()
    assert [row["feature_id"] for row in found] == mine["feature_id"].head(20).to_list()
    assert {(row["feature_id"], row["q"] <= 0.05) for row in found[:2]} == {(STRONG, True)}


def test_top_cells_are_those_of_the_look_up(resources, atlas_store):
    top = atlas_store.top_cells(6, 20)
    rows = document(resources, 6)["cells"]["top"]
    assert [(row["cell_idx"], row["cell_id"], row["cell_type"]) for row in rows] == list(
        top.select("cell_idx", "cell_id", "cell_type").iter_rows()
    )


def test_features_of_the_same_cells_correlate_as_numpy_says(resources, atlas_store):
    codes = atlas_store.to_anndata(X=None).obsm["X_sae"].toarray()
    split = atlas_store.frame("cells").sort("cell_idx").collect()["split"].to_numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        select, test = (np.corrcoef(codes[split == name], rowvar=False)[6] for name in ("select", "test"))
    rows = document(resources, 6)["cells"]["together"]
    order = np.argsort(-np.nan_to_num(select, nan=-1.0))
    assert [row["feature_id"] for row in rows] == [i for i in order if i != 6][: len(rows)]
    assert [row["pearson"] for row in rows] == pytest.approx([test[row["feature_id"]] for row in rows], abs=1e-5)
    constant = Columns.of(sparse.csc_array(np.array([[1.0, 0], [2, 0], [3, 0]])))
    assert np.isnan(correlations(constant, 0, 2)).tolist() == [[False, True], [True, True]]


def test_the_nearest_of_random_directions_is_as_simulated(rng):
    n, d = 50, 12
    draws = rng.normal(size=(4000, n, d))
    nearest = (draws[:, :, 0] / np.linalg.norm(draws, axis=2)).max(axis=1)
    assert nearest_of_random(n, d) == pytest.approx(np.quantile(nearest, 0.95), abs=0.01)


def test_steering_says_what_the_run_did_and_the_rank_of_the_feature(resources):
    used, ranked, neither = (document(resources, feature)["steering"] for feature in (4, 15, 60))
    (run,) = used["runs"]
    assert (run["run"], run["used"], run["place"], run["rank"]["rank"], run["rank"]["n_ranked"]) == (
        ("57ee4", True, 3, 3, 20)
    )
    assert (run["headline"]["metric"], run["headline"]["words"]) == ("remaining", METRICS["remaining"].description)
    assert run["headline"]["effect"] == pytest.approx(-0.4)
    assert run["headline"]["p"] == {"random_features": 0.048, "random_direction": 0.048, "shuffled_labels": 0.19}
    assert (ranked["runs"][0]["used"], ranked["runs"][0]["rank"]["rank"]) == (False, 14)
    assert neither == {"runs": [], "n_runs": 1}


def test_codes_on_the_map_are_those_of_the_store(resources, atlas_store, decode):
    cells, names = (decode(resources.get(path).body) for path in ("cells.cols", "cell_names.cols"))
    table = atlas_store.frame("cells").sort("cell_idx").collect()
    assert names["cell_id"].to_list() == table["cell_id"].to_list()
    assert cells["cell_type"].to_list() == table["cell_type"].to_list()
    codes = decode(resources.get("codes/6.cols").body)
    shown = np.zeros(cells.height)
    shown[codes["place"].to_numpy()] = codes["value"].to_numpy()
    assert shown == pytest.approx(code_of(atlas_store, 6)["value"].to_numpy())


def test_codes_of_cells_that_are_not_on_the_map_are_left_out(store_without, decode):
    store = store_without()
    umap = pl.read_parquet(next(store.layout.umap_dir("c0de").glob("*.parquet")))
    resources = Resources(store)
    resources.data.__dict__["cells"] = umap.filter(pl.col("cell_idx") % 3 == 1).sort("cell_idx")
    codes = decode(resources.get("codes/6.cols").body)
    cells = resources.data.cells["cell_idx"].to_numpy()[codes["place"].to_numpy()]
    expected = code_of(store, 6).filter((pl.col("value") > 0) & (pl.col("cell_idx") % 3 == 1))
    assert cells.tolist() == expected["cell_idx"].to_list()


def test_cells_are_described_in_the_order_asked_however_few_are_kept(atlas_store, monkeypatch):
    data = Resources(atlas_store).data
    table = atlas_store.frame("cells").sort("cell_idx").select("cell_id", "split", "batch").collect().to_dicts()
    monkeypatch.setattr("feature_store.atlas.data.MOST_DESCRIBED", 5)
    for places in ([7, 3, 7, 399], [3, 4, 5, 6, 7, 8, 9], [], [9, 1]):
        found = data.cells_at(places)
        assert [{name: row[name] for name in ("cell_id", "split", "batch")} for row in found] == [
            table[i] for i in places
        ]
    assert data.cells_at([400, 2])[0]["cell_id"] is None


def test_a_document_is_the_same_bytes_whenever_it_is_made(resources, atlas_store):
    again = Resources(atlas_store)
    for feature in (90, 6, DEAD):
        assert again.get(f"features/{feature}.json") == resources.get(f"features/{feature}.json")


def test_a_dead_feature_has_a_document_of_nothing(resources, decode):
    found = document(resources, DEAD)
    assert found["about"]["dead"]
    assert found["cells"]["top"] == found["cells"]["together"] == found["labels"]["rows"] == []
    assert found["genes"] == {"expression": [], "identity": []}
    assert decode(resources.get(f"codes/{DEAD}.cols").body).is_empty()


@pytest.mark.parametrize("name", ["120", "-1", "x", "1e2", "00000000000000000000", "²"])
def test_other_features_are_no_resources(resources, name):
    assert resources.get(f"features/{name}.json") is None or name.strip("0") == ""
    assert resources.get(f"codes/{name}.cols") is None or name.strip("0") == ""


def test_provenance_is_the_stores(resources, atlas_store):
    found = json.loads(resources.get("provenance.json").body)
    assert found == json.loads(json.dumps(atlas_store.provenance()))
    assert len(found["manifests"]["features"]) == 64


def test_parts_of_missing_tables_name_their_commands(store_without, decode):
    of_codes = ("codes/c0de/umap", "codes/c0de/top_cells")
    store = store_without("matches", "steering", "effects", "inputs", "circuits", "saes/5ae/map", *of_codes)
    found = document(Resources(store), 6)
    for part, table in (
        ("in_order", "top_cell_token"),
        ("neighbours", "feature_neighbour"),
        ("matches", "feature_match"),
        ("steering", "steering"),
        ("effects", "feature_effect"),
        ("inputs", "feature_input"),
        ("edges", "feature_edge"),
    ):
        assert found[part] == {"missing": {"table": table, "command": store.made_by(table)}}
    assert decode(Resources(store).get("codes/6.cols").body).is_empty()


def panel(page: Page, name: str) -> Any:
    return page.locator(f"section[aria-label='{name}']")


def test_the_page_shows_every_part_and_hostile_names_as_text(open_page, hostile):
    page = open_page("#/feature/6")
    assert page.locator("h1").inner_text().startswith("Feature 6: ")
    assert hostile in panel(page, "Labels it separates").text_content()
    assert hostile in panel(page, "Its code by label").text_content()
    assert hostile in panel(page, "Gene sets").inner_text()
    assert page.locator("svg.feature-chart").count() == 5
    assert page.evaluate("window.hacked") is None
    for name in (
        "Where it fires",
        "Genes",
        "Gene sets",
        "Where it fires most",
        "Nearest in direction",
        "In the same cells",
    ):
        assert panel(page, name).is_visible()
    assert "place 5 of 10 features" in panel(page, "Steering with this feature").inner_text()
    assert "p 0.190 against shuffled labels" in panel(page, "Steering with this feature").inner_text()
    assert "07he5" in panel(page, "Similar features in other SAEs").inner_text()
    assert "3 down at q ≤ 0.05" in panel(page, "What it does").inner_text()
    assert "30.0 %" in panel(page, "What makes it fire").inner_text()
    beside = panel(page, "Upstream and downstream")
    assert beside.locator("path.edge").count() == 16
    assert beside.locator("path.edge.inhibits:not(.weak)").count() == 1
    assert "07he5" in beside.inner_text()


def test_a_colour_is_in_the_address_and_back_undoes_it(open_page, hostile):
    page = open_page("#/feature/6")
    where = panel(page, "Where it fires")
    assert "Fires in" in where.inner_text()
    where.locator("select[name=color]").select_option("cell_type")
    assert page.url.endswith("#/feature/6?color=cell_type")
    assert hostile in where.locator(".legend").inner_text()
    where.locator("select[name=split]").select_option("all")
    assert page.url.endswith("color=cell_type&split=all")
    assert panel(page, "Its code by label").locator("select[name=split]").input_value() == "all"
    page.go_back()
    page.go_back()
    assert "Fires in" in where.inner_text()
    again = open_page("#/feature/6?color=cell_type&split=all&by=condition")
    assert hostile in panel(again, "Where it fires").locator(".legend").inner_text()
    assert panel(again, "Its code by label").locator("h3").all_inner_texts() == ["By condition"]


def test_a_cell_says_which_it_is_and_leads_to_its_features(open_page, atlas_store):
    page = open_page("#/feature/6")
    page.locator(".cell-map").scroll_into_view_if_needed()
    at = page.evaluate(
        "() => { const s = document.querySelector('.cell-map .scatter').scatter, p = s.places;"
        " const b = s.canvas.getBoundingClientRect(); return [b.left + p.x(s.xs[50]), b.top + p.y(s.ys[50])]; }"
    )
    page.mouse.move(*at)
    page.wait_for_selector(".cell-map .tip:not([hidden])")
    tip = page.locator(".cell-map .tip").inner_text()
    assert "AC0" in tip
    page.mouse.click(*at)
    page.wait_for_selector(".picked a")
    name = page.locator(".picked a").inner_text()
    assert name in tip
    assert page.locator(".picked a").get_attribute("href") == f"#/search?kind=cell&q={name}"
    page.get_by_role("button", name="Zoom in").click()
    page.wait_for_function("location.hash.includes('view=')")
    again = open_page(page.evaluate("location.hash"))
    again.wait_for_selector(".picked a")
    assert again.locator(".picked a").inner_text() == name
    assert again.locator(".cell-map .ring").count() == 1
    assert again.evaluate("document.querySelector('.cell-map .scatter').scatter.view.zoom") == 1.5
    again.get_by_role("link", name="Next ›").click()
    again.wait_for_selector("main[data-ready='feature/7']")
    again.wait_for_selector(f".picked a:text-is('{name}')")


def test_the_tokens_of_a_cell_are_chips_that_say_their_code_to_pointer_and_keys(open_page, resources):
    tokens = document(resources, 6)["in_order"]["tokens"]
    page = open_page("#/feature/6")
    box = panel(page, "One cell, token by token")
    names = [gene or "special token" for gene in tokens["gene"]]
    assert box.locator("ol.chips li").all_inner_texts() == names
    fires = [code > 0 for code in tokens["value"]]
    assert box.locator("ol.chips li").evaluate_all("(all) => all.map((one) => one.className === 'chip fires')") == fires
    box.locator("ol.chips").focus()
    page.keyboard.press("End")
    assert box.locator(".chip-said").inner_text().startswith(f"{names[-1]}, position 2: ")
    page.keyboard.press("ArrowLeft")
    said = box.locator(".chip-said").inner_text()
    assert said.startswith(f"{names[1]}, position 1: ")
    assert ("silent" in said) == (not fires[1])
    box.locator("ol.chips li").first.hover()
    assert box.locator(".chip-said").inner_text().startswith(f"{names[0]}, position 0: ")
    box.locator("summary").click()
    assert box.locator("table tbody tr").count() == sum(fires)


def test_the_neighbours_in_the_list_keep_the_view(open_page):
    page = open_page("#/feature/6?color=batch")
    page.get_by_role("link", name="Next ›").click()
    page.wait_for_selector("main[data-ready='feature/7']")
    assert page.url.endswith("#/feature/7?color=batch")
    page.get_by_role("button", name="Random").click()
    page.wait_for_function("!location.hash.startsWith('#/feature/7?')")
    assert page.url.endswith("?color=batch")
    page.go_back()
    page.wait_for_selector("main[data-ready='feature/7']")
    assert page.get_by_role("link", name="Show on the Atlas").get_attribute("href") == "#/atlas?mark=7"


def test_the_strongest_label_is_filled_and_the_others_hollow(open_page):
    page = open_page("#/feature/5")
    scores = panel(page, "Labels it separates").locator("g.score")
    assert scores.count() == 7
    assert 1 <= panel(page, "Labels it separates").locator("g.score:not(.weak)").count() < 7
    # a band of each type, and the one of the key
    assert panel(page, "Labels it separates").locator("rect.null-band").count() == 4 + 1
    assert "of 7 have q ≤ 0.05" in panel(page, "Labels it separates").inner_text()


def test_all_can_be_done_with_the_keyboard(open_page):
    page = open_page("#/feature/6")
    page.locator("details.provenance summary").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("details.provenance table")
    assert len(page.locator("details.provenance tr:has-text('feature_label') code").last.inner_text()) == 64
    page.get_by_role("button", name="Copy as JSON").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("/copied|selected/.test(document.querySelector('details.provenance').innerText)")
    select = panel(page, "Its code by label").locator("select[name=by]")
    select.focus()
    page.keyboard.press("End")
    page.wait_for_function("location.hash.includes('by=')")
    assert page.evaluate("document.activeElement.name") == "by"


def test_a_dead_feature_says_so(open_page):
    page = open_page(f"#/feature/{DEAD}")
    assert "This feature is dead" in page.locator("main").inner_text()
    assert "It fires in no cell." in page.locator("main").inner_text()


@pytest.mark.parametrize("name", ["4000", "-1", "abc", "3.5", ""])
def test_an_unknown_feature_says_which_there_are(open_page, name):
    page = open_page(f"#/feature/{name}")
    assert "they are 0 to 119" in page.locator("[role=alert]").inner_text()


def test_without_associations_a_feature_names_their_command(open_page, store_without, serving):
    page = open_page("#/feature/3", address=serving(store_without("associations", "comparisons", "steering")))
    assert "scsae associate --store" in page.locator("main .empty").inner_text()


def test_what_is_missing_names_its_command(open_page, store_without, serving):
    store = store_without("matches", "steering", "effects", "inputs", "circuits", "saes/5ae/map", "codes/c0de/umap")
    page = open_page("#/feature/6", address=serving(store))
    for name, table in (
        ("What it does", "feature_effect"),
        ("What makes it fire", "feature_input"),
        ("Upstream and downstream", "feature_edge"),
        ("Where it fires", "umap"),
        ("Nearest in direction", "feature_neighbour"),
        ("Steering with this feature", "steering"),
        ("Similar features in other SAEs", "feature_match"),
    ):
        assert store.made_by(table) in panel(page, name).inner_text()
    assert panel(page, "Its code by label").locator("svg").count() == 1


@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_wider_than_a_phone(open_page: Callable[..., Page], dark):
    page = open_page("#/feature/6", width=390, height=844, dark=dark)
    page.wait_for_selector("svg.feature-chart")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("[...document.querySelectorAll('svg.feature-chart')].every((s) => s.clientWidth <= 360)")
