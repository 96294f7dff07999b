"""The page of the run: data set, SAE, training, density and provenance are those of the store."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from feature_store.atlas.resources import Resources

if TYPE_CHECKING:
    from collections.abc import Callable

    from feature_store import FeatureStore

Open = "Callable[..., Page]"


def run_of(store: FeatureStore) -> dict:
    found = Resources(store).get("run.json")
    assert found is not None
    return json.loads(found.body)


def test_cells_donors_and_types_are_counted_by_split(atlas_store: FeatureStore) -> None:
    found = run_of(atlas_store)["data"]
    cells = atlas_store.frame("cells").collect()
    assert [row["split"] for row in found["splits"]] == ["train", "select", "test", "all"]
    for row in found["splits"]:
        own = cells if row["split"] == "all" else cells.filter(split=row["split"])
        assert row["n_cells"] == own.height
        assert [row[name] for name in ("donor", "batch", "cell_type")] == [
            own[name].n_unique() for name in ("donor", "batch", "cell_type")
        ]
    assert found["n_genes"] == 40


def test_training_and_facts_are_those_of_the_sae(atlas_store: FeatureStore) -> None:
    found = run_of(atlas_store)
    assert found["training"] == atlas_store.frame("training").collect().to_dict(as_series=False)
    assert found["sae"] == atlas_store.sae_facts()


def test_every_firing_feature_is_in_one_bin_of_its_density(atlas_store: FeatureStore) -> None:
    found = run_of(atlas_store)["density"]
    features = atlas_store.frame("features").filter(pl.col("density") > 0).collect()
    assert (found["n_features"], found["n_dead"]) == (120, 1)
    for one in found["classes"]:
        density = np.log10(features.filter(pl.col("class") == one["class"])["density"].to_numpy())
        assert one["counts"] == np.histogram(density, found["edges"])[0].tolist()
    assert sum(sum(one["counts"]) for one in found["classes"]) == features.height


def test_provenance_names_every_run_and_how_to_verify_it(atlas_store: FeatureStore) -> None:
    found, known = run_of(atlas_store), atlas_store.provenance()
    assert (found["manifests"], found["plans"]) == (known["manifests"], known["plans"])
    assert found["runs"] == {**known["runs"], "steering": ["57ee4"], "matches": ["3a7c"]}
    runs = [command.split()[2] for command in found["verify"]]
    assert sorted(runs) == sorted(["toy", "c0de", "a550c", "5ae", "c09a", "57ee4", "3a7c"])


def test_the_page_shows_the_figures_and_a_curve_for_all_that_training_noted(
    open_page: Open, atlas_store: FeatureStore
) -> None:
    page = open_page("#/run")
    said = page.locator("main").inner_text()
    assert "12.50 % on test, 12.00 % on select" in said
    assert "15.9 on select" in said
    assert "400 of 64 tokens" in said
    assert page.locator(".run-curves svg.chart").count() == 5
    assert "at the end 0.125" in page.locator(".run-curves").inner_text()
    sha = atlas_store.provenance()["manifests"]["features"]
    assert page.locator(f'code[title="{sha}"]').inner_text() == sha[:16]
    page.locator("summary", has_text="associations").click()
    assert '"codes": "c0de"' in page.locator("details[open] pre").inner_text()


def test_features_that_are_silent_in_the_evaluation_are_not_called_dead(open_page: Open) -> None:
    text = open_page("#/run").locator("#main").inner_text()
    assert "Silent features\n1 of 120 on select tokens" in text
    assert "Dead features\n0" not in text


def test_dead_features_are_a_link_to_their_list(open_page: Open) -> None:
    page = open_page("#/run", width=390, height=844)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_role("link", name="1 is dead").click()
    page.wait_for_function("location.hash === '#/atlas?class=dead'")
    page.wait_for_function("document.querySelector('.map-status')?.textContent.startsWith('1 of 120')")


def test_a_curve_is_drawn_at_the_width_of_its_column(open_page: Open) -> None:
    page = open_page("#/run", width=390, height=844, dark=True)
    page.wait_for_function("""() => [...document.querySelectorAll('.run-curves .fitted')].every((box) =>
        Math.abs(box.querySelector('svg').viewBox.baseVal.width - box.clientWidth) <= 1)""")


def test_what_was_not_made_names_its_command(
    store_without: Callable[..., FeatureStore], serving: Callable[[FeatureStore], str], open_page: Open
) -> None:
    store = store_without("saes", "associations", "steering", "matches", "comparisons", "codes")
    page = open_page("#/run", address=serving(store))
    said = page.locator("main").inner_text()
    assert "scsae train --store" in said
    assert "scsae associate --store" in said
    assert "Data set" in said
    assert page.locator(".empty").count() == 3
