"""Features that are kept and compared: the list in the address, in the browser and in a file."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from sampled import WINDOWS

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Page

KEPT = "JSON.parse(localStorage.getItem('scsae-kept-5ae') ?? '[]')"


def heads(page: Page) -> list[str]:
    return page.locator(".compare-head a").all_inner_texts()


def test_a_feature_that_is_kept_on_its_page_stands_in_the_list_with_its_note(open_page: Callable[..., Page]) -> None:
    page = open_page("#/feature/3")
    page.get_by_role("button", name="Keep").click()
    assert page.evaluate(KEPT) == [{"id": 3, "note": ""}]
    assert page.get_by_role("button", name="Kept").get_attribute("aria-pressed") == "true"
    page.get_by_role("link", name="Compare (1)").click()
    page.wait_for_selector(".compare-head")
    page.get_by_label("Number of a feature to add").fill("6")
    page.keyboard.press("Enter")
    page.wait_for_function("location.hash.includes('f=3.6')")
    page.wait_for_function("document.querySelectorAll('.compare-head').length === 2")
    page.get_by_label("Note on feature 6").fill("the strong one, & odd")
    page.wait_for_function("location.hash.includes('n6=')")
    assert page.evaluate(KEPT) == [{"id": 3, "note": ""}, {"id": 6, "note": "the strong one, & odd"}]
    other = open_page(page.url.split("/", 3)[3])
    assert heads(other) == ["Feature 3", "Feature 6"]
    assert other.get_by_label("Note on feature 6").input_value() == "the strong one, & odd"
    page.get_by_role("button", name="Move feature 6 to the left").click()
    page.wait_for_function("location.hash.includes('f=6.3')")
    page.get_by_role("button", name="Remove feature 3").click()
    page.wait_for_function("document.querySelectorAll('.compare-head').length === 1")
    assert heads(page) == ["Feature 6"]


def test_a_list_that_somebody_sent_does_not_replace_one_s_own(open_page: Callable[..., Page]) -> None:
    page = open_page("#/compare?f=3.4")
    page.evaluate("location.hash = '#/compare?f=7'")
    page.wait_for_selector(".compare-foreign:not([hidden])")
    page.wait_for_function("document.querySelectorAll('.compare-head').length === 1")
    assert heads(page) == ["Feature 7"]
    assert [one["id"] for one in page.evaluate(KEPT)] == [3, 4]
    page.get_by_role("button", name="Keep these instead").click()
    assert [one["id"] for one in page.evaluate(KEPT)] == [7]
    assert page.locator(".compare-foreign").is_hidden()


def test_a_file_takes_the_list_to_another_browser_and_one_of_another_sae_is_refused(
    open_page: Callable[..., Page], tmp_path: Path
) -> None:
    page = open_page("#/compare?f=3.6&n3=odd")
    with page.expect_download() as caught:
        page.get_by_role("button", name="Save to a file").click()
    saved = json.loads(Path(caught.value.path()).read_text())
    assert saved["sae"] == "5ae"
    assert saved["features"] == [{"id": 3, "note": "odd"}, {"id": 6, "note": ""}]
    (tmp_path / "kept.json").write_text(json.dumps(saved))
    (tmp_path / "other.json").write_text(json.dumps({**saved, "sae": "beef"}))
    (tmp_path / "thesis.json").write_text("years of work")
    other = open_page("#/compare")
    field = other.locator("input[type=file]")
    for name, said in (("other.json", "SAE beef"), ("thesis.json", "no file of kept features")):
        field.set_input_files(tmp_path / name)
        other.wait_for_function(
            "text => document.querySelector('.controls [role=status]').textContent.includes(text)", arg=said
        )
        assert heads(other) == []
    field.set_input_files(tmp_path / "kept.json")
    other.wait_for_function("document.querySelectorAll('.compare-head').length === 2")
    assert other.get_by_label("Note on feature 3").input_value() == "odd"
    with other.expect_download() as caught:
        other.get_by_role("button", name="CSV").click()
    with Path(caught.value.path()).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["feature_id"], row["note"]) for row in rows] == [("3", "odd"), ("6", "")]
    assert rows[0]["in_words"]


def test_features_side_by_side_say_how_their_codes_correlate(
    open_page: Callable[..., Page], planted_codes: np.ndarray
) -> None:
    page = open_page("#/compare?f=3.7")
    page.wait_for_function("document.querySelectorAll('.compare-map .dots').length === 2")
    r = np.corrcoef(planted_codes[:, 3], planted_codes[:, 7])[0, 1]
    row = page.locator("tr", has=page.locator("th", has_text="r with the others"))
    assert f"7: {r:.2f}" in row.locator("td").first.inner_text()


@pytest.mark.parametrize(("width", "dark"), WINDOWS)
def test_the_page_of_kept_features_fits_its_window(open_page: Callable[..., Page], width: int, dark: bool) -> None:
    page = open_page("#/compare?f=3.6.119", width=width, height=844, dark=dark)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert heads(page) == ["Feature 3", "Feature 6", "Feature 119"]
