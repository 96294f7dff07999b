"""The page of modules: what it lists and draws is what the store holds."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from sampled import WINDOWS

from feature_store.atlas.resources import Resources

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Page

    from feature_store import FeatureStore


def read(store: FeatureStore) -> Any:
    found = Resources(store).get("modules.json")
    assert found is not None
    return json.loads(found.body)


def test_modules_are_those_of_the_store_with_their_features_and_those_of_shuffled_codes_apart(
    atlas_store: FeatureStore,
) -> None:
    found = read(atlas_store)
    assert found["run"] == "m0d"
    assert [(one["module"], one["name"]) for one in found["modules"]] == [
        (0, "0: CD3D IL32 LCK"),
        (1, "1: CD3D IL32 LCK"),
    ]
    assert [[row["feature_id"] for row in one["features"]] for one in found["modules"]] == [
        list(range(5)),
        list(range(5, 9)),
    ]
    assert {row["class"] for row in found["modules"][0]["features"]} <= {"gene-identity", "cell-context"}
    assert [row["n_features"] for row in found["shuffled"]] == [5]
    assert found["modules"][0]["stability"] == 0.9


def test_a_store_without_modules_says_what_to_run(store_without: Callable[..., FeatureStore]) -> None:
    store = store_without("modules")
    assert read(store)["missing"]["command"] == f"scsae modules --store {store.layout.root}"


@pytest.mark.parametrize(("width", "dark"), WINDOWS)
def test_the_page_of_modules_fits_its_window(open_page: Callable[..., Page], width: int, dark: bool) -> None:
    page = open_page("#/modules", width=width, height=844, dark=dark)
    page.wait_for_function("document.querySelector('.scatter').dataset.shown === '120'")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("h1").inner_text() == "2 modules of features that fire together"
    assert page.locator(".ring").count() == 5


def test_a_module_is_opened_from_the_list_and_leads_to_its_features_on_the_atlas(
    open_page: Callable[..., Page],
) -> None:
    page = open_page("#/modules")
    page.get_by_role("link", name="1: CD3D IL32 LCK").click()
    page.wait_for_selector("main[data-ready='modules/1']")
    assert page.locator("#own-module h2").inner_text() == "Module 1: CD3D IL32 LCK"
    page.get_by_role("link", name="Its features on the Atlas").click()
    page.wait_for_function("document.querySelector('.map-status')?.textContent.includes('4 of 120 features')")
    assert page.locator("select[name=module]").input_value() == "1: CD3D IL32 LCK"
