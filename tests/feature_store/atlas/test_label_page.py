"""The page of a label: its resource against the store and scipy, and its page in a browser."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pytest
from sampled import WINDOWS
from scipy.stats import pearsonr

from feature_store.atlas.pages.labels import BINS, MOST_LISTED, one_side
from feature_store.atlas.resources import Resources

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Page

    from feature_store import FeatureStore


@pytest.fixture(scope="module")
def resources(atlas_store: FeatureStore) -> Resources:
    return Resources(atlas_store)


def page_of(resources: Resources, label: str, kind: str = "cell_type") -> Any:
    place = resources.data.labels.rows().index((kind, label))
    found = resources.get(f"label_pages/{place}.json")
    assert found is not None
    return json.loads(found.body)


def test_the_features_of_a_label_are_significant_on_test_cells_and_ranked_by_the_lower_bound_on_select_cells(
    resources: Resources, atlas_store: FeatureStore
) -> None:
    rows = atlas_store.frame("feature_label").filter(label_kind="cell_type", label="B").collect()
    test, select = ({row["feature_id"]: row for row in rows.filter(split=s).to_dicts()} for s in ("test", "select"))
    found = page_of(resources, "B")
    above = [f for f, row in test.items() if row["q"] <= 0.05 and row["auroc"] > 0.5 and select[f]["auroc"] > 0.5]
    above.sort(key=lambda f: (select[f]["q"] > 0.05, -select[f]["low"], -select[f]["auroc"], f))
    assert found["above"]["n"] == len(above) > 20
    assert [row["feature_id"] for row in found["above"]["rows"]] == above[:MOST_LISTED]
    first = found["above"]["rows"][0]
    assert first["auroc"] == test[above[0]]["auroc"]
    assert first["low_select"] == select[above[0]]["low"]
    assert found["n_tested"] == len(test)
    assert found["units"] == "donors"


def test_a_wide_interval_ranks_below_a_narrow_one_whose_effect_is_smaller() -> None:
    rows = [
        {"feature_id": f, "split": split, "auroc": auroc, "low": low, "high": 1.0, "q": 0.01}
        for f, auroc, low in ((0, 0.99, 0.1), (1, 0.9, 0.6), (2, 0.2, -0.9))
        for split in ("select", "test")
    ]
    frame = pl.DataFrame(rows)
    assert one_side(frame, ["auroc"], above=True)["feature_id"].to_list() == [1, 0]
    assert one_side(frame, ["auroc"], above=False)["feature_id"].to_list() == [2]
    weak = frame.with_columns(q=pl.when(pl.col("split") == "test").then(0.2).otherwise("q"))
    assert one_side(weak, ["auroc"], above=True).is_empty()


def test_a_profile_counts_every_feature_once_and_labels_are_alike_where_their_aurocs_correlate(
    resources: Resources, atlas_store: FeatureStore, hostile: str
) -> None:
    found = page_of(resources, "B")
    rows = atlas_store.frame("feature_label").filter(split="test", label_kind="cell_type").collect()
    own = rows.filter(label="B")
    counted = np.array(found["profile"]["significant"]) + np.array(found["profile"]["other"])
    assert counted.tolist() == np.histogram(own["auroc"], BINS, range=(0, 1))[0].tolist()
    assert sum(found["profile"]["significant"]) == (own["q"] <= 0.05).sum()
    expected = {
        label: pearsonr(own.sort("feature_id")["auroc"], rows.filter(label=label).sort("feature_id")["auroc"])[0]
        for label in ("T", hostile, "NK, bright")
    }
    assert {row["label"]: row["r"] for row in found["alike"]} == pytest.approx(expected)
    assert [row["r"] for row in found["alike"]] == pytest.approx(sorted(expected.values(), reverse=True))


def test_the_cells_of_a_label_are_counted_by_split(resources: Resources, atlas_store: FeatureStore) -> None:
    found = page_of(resources, "B")["cells"]
    cells = atlas_store.frame("cells").collect()
    for split, row in found.items():
        mine = cells.filter(split=split)
        own = mine.filter(cell_type="B")
        assert (row["n"], row["n_all"], row["n_donors"]) == (own.height, mine.height, own["donor"].n_unique())


def test_the_probe_of_a_label_has_its_features_in_order_or_the_command_that_makes_one(
    resources: Resources, atlas_store: FeatureStore
) -> None:
    probe = page_of(resources, "B")["probe"]
    rows = atlas_store.frame("feature_probe").filter(representation="sae", label="B", k=3).sort("rank").collect()
    assert probe["k"] == 3
    assert [row["feature_id"] for row in probe["features"]] == rows["feature_id"].to_list()
    assert [series["of"] for series in probe["series"]] == ["sae", "genes", "permuted labels"]
    missing = page_of(resources, "stim", "condition")["probe"]["missing"]
    assert missing["command"] == f"scsae probe --label condition --store {atlas_store.layout.root}"


@pytest.mark.parametrize(("width", "dark"), WINDOWS)
def test_the_page_of_a_label_fits_its_window(open_page: Callable[..., Page], width: int, dark: bool) -> None:
    page = open_page("#/label/cell_type:B", width=width, height=844, dark=dark)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert "B = + 0 (CD79A MS4A1), − 1 (CD79A MS4A1)" in page.locator(".label-probe").inner_text()


def test_the_interval_beside_an_auroc_is_of_an_auroc(open_page: Callable[..., Page], atlas_store: FeatureStore) -> None:
    page = open_page("#/label/cell_type:B", width=1440)
    table = page.locator(".page-label table:has(th:text-is('agree'))").first
    heads, row = (table.locator(f"{place} tr").first for place in ("thead", "tbody"))
    names = [name.split("\n")[0] for name in heads.locator("th").all_inner_texts()]
    shown = dict(zip(names, row.locator("td").all_inner_texts(), strict=True))
    (known,) = (
        atlas_store.frame("feature_label")
        .filter(label_kind="cell_type", label="B", split="test", feature_id=int(shown["id"]))
        .collect()
        .to_dicts()
    )
    assert float(shown["AUROC"]) == round(known["auroc"], 3)
    assert shown["95 %"] == f"{(1 + known['low']) / 2:.2f} to {(1 + known['high']) / 2:.2f}"
    assert heads.locator("th", has_text="95 %").get_attribute("title") == (
        "Interval of the AUROC across donors, on test cells"
    )


def test_a_label_of_any_name_has_a_page_that_its_features_and_controls_lead_to(
    open_page: Callable[..., Page], hostile: str, atlas_store: FeatureStore
) -> None:
    page = open_page("#/controls")
    page.locator("#controls-probes td a", has_text=hostile).first.click()
    page.wait_for_function("location.hash.startsWith('#/label/')")
    page.wait_for_selector("main[data-ready^='label/']")
    assert page.locator("h1").inner_text().startswith(hostile)
    page.locator(".page-label td a", has_text="2").first.click()
    page.wait_for_selector("main[data-ready^='feature/']")
    page.locator(".facts a").first.click()
    page.wait_for_selector("main[data-ready^='label/']")
    page.get_by_role("link", name="Its cells on the map").click()
    page.wait_for_selector("main[data-ready='cells/']")


def test_an_unknown_label_is_named(open_page: Callable[..., Page]) -> None:
    page = open_page("#/label/cell_type:nobody")
    assert "nobody" in page.locator("[role=alert]").inner_text()
