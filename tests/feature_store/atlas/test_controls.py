"""The page of controls: its figures are the store's, it says what they mean, and what is missing names its command."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import pytest
from toy_plans import toy_table

from feature_store import FeatureStore
from feature_store.associations.comparison import summarise
from feature_store.associations.held_out_units import limit_of_claims
from feature_store.atlas.resources import Resources
from feature_store.storage import commit
from feature_store.storage.layout import ASSOCIATION_TABLES
from feature_store.storage.plans import AssociationsPlan

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


Open = "Callable[..., Page]"


def controls_of(store: FeatureStore) -> dict:
    found = Resources(store).get("controls.json")
    assert found is not None
    return json.loads(found.body)


def of_test(store: FeatureStore) -> pl.DataFrame:
    return store.frame("feature_label").filter(pl.col("split") == "test").collect()


@pytest.fixture
def with_random(atlas_root: Path, tmp_path: Path) -> FeatureStore:
    """The planted store with the associations of its random directions, half of whose tests are significant."""
    root = shutil.copytree(atlas_root, tmp_path / "random")
    own = root / "associations" / "a550c"
    plan = toy_table(AssociationsPlan, codes="c0de", dataset="toy", sae="5ae", control_of="random")
    labels = commit.read_table(own / "feature_label").with_columns(
        q=pl.when(pl.col("feature_id") % 2 == 0).then(0.01).otherwise(0.5), rank_biserial=pl.lit(0.7)
    )
    commit.write_table(root / "associations" / "4a2d" / "feature_label", labels, plan)
    for table in set(ASSOCIATION_TABLES) - {"feature_label"}:
        commit.write_table(root / "associations" / "4a2d" / table, commit.read_table(own / table), plan)
    return FeatureStore.open(root)


def test_the_summary_is_that_of_the_comparison_and_every_target_is_listed(atlas_store: FeatureStore) -> None:
    found = controls_of(atlas_store)["baselines"]
    table = atlas_store.frame("comparison").collect()
    assert found["summary"] == json.loads(json.dumps(summarise(table).to_dicts()))
    assert sorted(row["target"] for row in found["targets"]) == sorted(table["target"].unique())
    for target in found["targets"]:
        rows = table.filter(target_kind=target["target_kind"], target=target["target"])
        assert [row["test"] for row in target["rows"]] == rows["test"].to_list()
        assert [row["excess"] for row in target["rows"]] == rows["excess"].to_list()


def test_of_many_targets_their_excess_is_counted(atlas_root: Path, tmp_path: Path) -> None:
    root = shutil.copytree(atlas_root, tmp_path / "genes")
    folder = root / "comparisons" / "c09a" / "comparison"
    kept, plan = commit.read_table(folder), commit.Run.open(folder).plan
    excess = np.random.default_rng(0).uniform(-0.9, 0.9, 100)
    genes = pl.concat(
        kept.filter(target_kind="cell_type", target="B").with_columns(
            target_kind=pl.lit("gene"),
            target=pl.lit(f"GENE{i}"),
            statistic=pl.lit("pearson"),
            excess=pl.when(pl.col("excess").is_not_null()).then(value),
        )
        for i, value in enumerate(excess)
    )
    shutil.rmtree(folder)
    commit.write_table(folder, pl.concat([kept, genes]), plan)
    (counted,) = controls_of(FeatureStore.open(root))["baselines"]["counted"]
    assert (counted["target_kind"], counted["n"]) == ("gene", 100)
    assert counted["counts"] == np.histogram(excess, bins=20, range=(-1, 1))[0].tolist()


def test_shares_of_significant_features_are_counted_in_the_sae_and_in_random_directions(
    with_random: FeatureStore,
) -> None:
    sae, random = controls_of(with_random)["significance"]["of"]
    assert (sae["representation"], random["representation"]) == ("sae", "random")
    rows = of_test(with_random)
    for row in sae["rows"]:
        own = rows.filter(label_kind=row["label_kind"], label=row["label"])
        assert row["significant"] == pytest.approx((own["q"].to_numpy() <= 0.05).mean())
        strong = (own["q"].to_numpy() <= 0.05) & (np.abs(own["rank_biserial"].to_numpy()) > 0.5)
        assert row["strong"] == pytest.approx(strong.mean())
    assert {row["significant"] for row in random["rows"]} == {60 / 119}


def test_a_baseline_whose_run_was_deleted_is_left_out(atlas_store: FeatureStore) -> None:
    assert [one["representation"] for one in controls_of(atlas_store)["significance"]["of"]] == ["sae"]


def test_p_values_are_counted_by_twentieths_and_those_of_one_belong_to_the_last(atlas_store: FeatureStore) -> None:
    found = controls_of(atlas_store)["calibration"]
    rows = of_test(atlas_store)
    for kind in found["kinds"]:
        p = rows.filter(label_kind=kind["label_kind"])["p"].to_numpy()
        assert kind["counts"] == np.histogram(p, bins=20, range=(0, 1))[0].tolist()
        assert (kind["n"], kind["n_small"]) == (len(p), int((p <= 0.05).sum()))


def test_donors_that_agree_are_counted_for_claims_and_for_the_rest(atlas_store: FeatureStore) -> None:
    found = controls_of(atlas_store)["donors"]
    rows = of_test(atlas_store).with_columns(claimed=pl.col("q") <= 0.05)
    assert (found["unit"], found["units"]["test"]) == ("donor", 4)
    limit = limit_of_claims(atlas_store.panel_cells().collect())
    assert limit is not None
    assert found["limit"].lower() == f"{limit}.".lower()
    assert sum(row["n"] for row in found["agree"]) == rows.height
    for kind in found["kinds"]:
        claims = rows.filter("claimed", label_kind=kind["label_kind"])
        assert kind["n_claimed"] == claims.height
        assert kind["n_unanimous"] == claims.filter(pl.col("n_agree") == pl.col("n_donors")).height
        assert kind["n_held"] == claims.filter(pl.col("p_donor") <= 0.05).height == 0


def test_matches_are_counted_by_similarity_mutual_ones_apart(atlas_store: FeatureStore) -> None:
    (found,) = controls_of(atlas_store)["stability"]["others"]
    rows = atlas_store.frame("feature_match").collect()
    for name, mutual in (("mutual", True), ("one way", False)):
        values = rows.filter(pl.col("mutual") == mutual)["similarity"].to_numpy()
        assert found["counts"][name] == np.histogram(values, bins=20, range=(0, 1))[0].tolist()
    assert found["compared"] == 120
    assert found["mutual"] == pytest.approx(rows["mutual"].mean())
    assert found["beyond null"] == pytest.approx((rows["p"].to_numpy() <= 0.05).mean())


def test_probes_have_a_line_for_each_representation_and_the_features_of_each_label(atlas_store: FeatureStore) -> None:
    (found,) = controls_of(atlas_store)["probes"]["kinds"]
    assert (found["label_kind"], found["ks"], found["k"]) == ("cell_type", [1, 3], 3)
    assert [one["of"] for one in found["series"]] == ["sae", "genes", "permuted labels"]
    assert [point["macro_f1"] for point in found["series"][1]["points"]] == pytest.approx([0.61, 0.63])
    table = atlas_store.frame("feature_probe").filter(representation="sae", k=3).collect()
    for one in found["labels"]:
        mine = table.filter(label=one["label"]).sort("rank")
        assert [feature["feature_id"] for feature in one["features"]] == mine["feature_id"].to_list()
        assert [feature["weight"] for feature in one["features"]] == mine["weight"].to_list()


def test_a_probe_names_its_features_with_their_signs_and_links_to_them(open_page: Open) -> None:
    page = open_page("#/controls")
    said = page.locator("#controls-probes").inner_text()
    assert "With one feature a label, cell type is told with macro-F1 0.71 by the SAE and 0.61 by genes." in said
    row = page.locator("#controls-probes tr", has_text="− 1 (CD79A MS4A1)").first
    assert "+ 0 (CD79A MS4A1)" in row.inner_text()
    row.get_by_text("− 1 (CD79A MS4A1)").click()
    page.wait_for_url("**/#/feature/1*")


def test_the_page_states_the_figures_with_what_they_mean_and_what_would_be_worrying(open_page: Open) -> None:
    page = open_page("#/controls")
    said = page.locator("main").inner_text()
    assert "AUROC 0.940 against 0.900" in said
    donors = page.locator("#controls-donors .controls-finding").inner_text()
    assert "4 donors" in donors
    assert "0.125" in donors
    assert "67 %" in page.locator("#controls-stability").inner_text()
    assert said.count("What it means:") == said.count("Worrying:") == 6
    assert page.locator("svg.chart[aria-label]").count() == page.locator("svg.chart").count() >= 10
    assert page.locator("svg.chart").evaluate_all("all => all.every(c => c.querySelector('title').textContent)")


def test_random_directions_stand_beside_the_sae(
    with_random: FeatureStore, serving: Callable[[FeatureStore], str], open_page: Open
) -> None:
    page = open_page("#/controls", address=serving(with_random))
    said = page.locator("#controls-significance").inner_text()
    assert "of random directions 50 %" in said
    assert page.locator("#controls-significance .empty").count() == 0


def test_a_hostile_label_is_text_in_charts_and_tables(open_page: Open, hostile: str) -> None:
    page = open_page("#/controls", width=390, height=844)
    assert page.locator("svg.chart text > title").get_by_text(hostile, exact=True).count() >= 2
    page.locator("summary", has_text="The figures as a table").first.click()
    page.locator("#controls-baselines td", has_text=hostile).first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize(
    ("folder", "section", "command"),
    [
        ("probes", "probes", "scsae probe --store"),
        ("comparisons", "baselines", "scsae baseline --store"),
        ("comparisons", "significance", "scsae baseline --kind random --store"),
        ("matches", "stability", "scsae match --other SAE --store"),
    ],
)
def test_a_section_without_its_table_names_the_command(
    store_without: Callable[..., FeatureStore],
    serving: Callable[[FeatureStore], str],
    open_page: Open,
    folder: str,
    section: str,
    command: str,
) -> None:
    page = open_page("#/controls", address=serving(store_without(folder)))
    assert command in page.locator(f"#controls-{section} .empty").inner_text()
    assert page.locator("#controls-calibration svg.chart").count() == 3


def test_a_store_of_nothing_but_cells_says_what_to_run_in_every_section(
    store_without: Callable[..., FeatureStore], serving: Callable[[FeatureStore], str], open_page: Open
) -> None:
    folders = ("associations", "comparisons", "matches", "probes", "steering", "codes", "saes")
    page = open_page("#/controls", address=serving(store_without(*folders)))
    assert page.locator(".controls-panel .empty").count() == 6
