"""The page of all features, in a browser: what it draws, lists and saves is what the store holds."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pytest
from matplotlib.path import Path as Polygon

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Page

    from feature_store import FeatureStore

Open = "Callable[..., Page]"
STATUS = ".map-status"
NAME_OF_FOCUS = "(e => e.name || e.getAttribute('aria-label') || e.textContent)(document.activeElement)"
SHOWN = "document.querySelector('.scatter').dataset.shown"


def features_of(store: FeatureStore) -> pl.DataFrame:
    """The table of features with their places, q of their best label on test cells, and the name of their module."""
    tests = (
        store.frame("feature_label")
        .filter(split="test")
        .select("feature_id", top_label_kind="label_kind", top_label="label", top_label_q="q")
    )
    keys = ["feature_id", "top_label_kind", "top_label"]
    features = (
        store.frame("features").join(tests, on=keys, how="left").join(store.frame("feature_umap"), on="feature_id")
    )
    name = pl.col("module").cast(pl.String) + ": CD3D IL32 LCK"
    modules = store.frame("feature_module").select("feature_id", module=name)
    return features.join(modules, on="feature_id", how="left").sort("feature_id").collect()


def listed(page: Page) -> list[int]:
    """The ids of the rows in sight."""
    return [int(text) for text in page.locator(".vt-row [role=gridcell]:first-child").all_inner_texts()]


def wait_for_status(page: Page, text: str) -> None:
    page.wait_for_function("text => document.querySelector('.map-status').textContent.includes(text)", arg=text)


def saved(page: Page) -> pl.DataFrame:
    """The table that the button saves, as the store has it."""
    with page.expect_download() as caught:
        page.get_by_role("button", name=re.compile("^CSV")).click()
    with Path(caught.value.path()).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return pl.DataFrame(rows)


def as_written(frame: pl.DataFrame, columns: list[str]) -> list[dict[str, Any]]:
    """Rows as a CSV file has them: texts, numbers to be compared as numbers, "" for what is unknown."""
    texts = frame.select(
        pl.col(name).cast(pl.String).fill_null("") if not frame.schema[name].is_float() else pl.col(name)
        for name in columns
    )
    return texts.to_dicts()


def assert_same(found: pl.DataFrame, wanted: pl.DataFrame) -> None:
    columns = [name for name in wanted.columns if name not in ("x", "y")]
    assert sorted(found.columns) == sorted(columns)
    for a, b in zip(found.to_dicts(), as_written(wanted, columns), strict=True):
        for name in columns:
            same = float(a[name]) == b[name] if isinstance(b[name], float) else a[name] == b[name]
            assert same or (a[name] == "" and b[name] is None), (name, a[name], b[name])


def test_every_feature_is_drawn_and_listed_best_first(open_page: Open, atlas_store: FeatureStore) -> None:
    page = open_page("")
    assert page.locator("h1").inner_text() == "120 features of toy"
    page.wait_for_function(f"{SHOWN} === '120'")
    best = (
        features_of(atlas_store)
        .sort("top_label_auroc_select", descending=True, nulls_last=True)["feature_id"]
        .to_list()
    )
    assert listed(page)[:10] == best[:10]
    assert page.locator("[role=grid]").get_attribute("aria-rowcount") == "121"


@pytest.mark.parametrize("address", ["", "#/?color=auroc:0", "#/?sort=top_label_auroc", "#/batch"])
def test_the_column_with_the_mark_shows_the_values_by_which_the_rows_are_sorted(open_page: Open, address: str) -> None:
    page = open_page(address)
    marked = page.locator("[aria-sort]")
    marked.wait_for()
    assert marked.count() == 1
    direction = marked.get_attribute("aria-sort")
    place = page.locator("[role=columnheader]").all_inner_texts().index(marked.inner_text())
    shown = page.evaluate(
        "(i) => [...document.querySelectorAll('.vt-row')].map((row) => row.children[i].textContent)", place
    )
    values = [float(text) for text in shown if re.fullmatch(r"-?[\d.]+", text)]
    assert len(values) > 5
    assert values == sorted(values, reverse=direction == "descending")


@pytest.mark.parametrize("width", [1440, 1280, 1024, 390])
@pytest.mark.parametrize("address", ["", "#/?color=auroc:0", "#/?sort=density", "#/?sort=class", "#/batch"])
def test_the_table_is_no_wider_than_its_box_and_a_button_shows_the_columns_without_room(
    open_page: Open, address: str, width: int
) -> None:
    page = open_page(address, width=width)
    marked, heads, more = page.locator("[aria-sort]"), page.locator("[role=columnheader]"), page.locator(".vt-more")
    marked.wait_for()
    hidden_px = "(element) => element.scrollWidth - element.clientWidth"
    assert page.locator(".vt-scroll").evaluate(hidden_px) == 0
    assert [head.inner_text() for head in heads.all() if head.evaluate(hidden_px) > 0] == []
    shown, sorted_by = heads.all_inner_texts(), marked.inner_text()
    assert any(head.startswith("genes") for head in shown)
    assert more.is_visible() == (width < 1280 or (width == 1280 and address != "#/batch"))
    if not more.is_visible():
        return
    more.click()
    every = heads.all_inner_texts()
    assert set(shown) < set(every)
    assert more.get_attribute("aria-pressed") == "true"
    assert page.locator(".vt-scroll").evaluate(hidden_px) > 0
    more.click()
    assert (heads.all_inner_texts(), marked.inner_text()) == (shown, sorted_by)


def test_a_lasso_lists_the_features_within_it_and_saves_them_as_the_store_has_them(
    open_page: Open, atlas_store: FeatureStore
) -> None:
    page = open_page("")
    page.get_by_role("button", name=re.compile("^Lasso")).click()
    box = page.locator(".dots").bounding_box()
    assert box is not None
    middle = (box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5)
    page.mouse.move(*middle)
    page.mouse.down()
    for dx, dy in ((0, -1), (0.46, -1), (0.46, 0.3), (0.1, 0.3)):
        page.mouse.move(middle[0] + dx * box["width"] / 1.0, middle[1] + dy * box["height"] * 0.48, steps=4)
    page.mouse.up()
    wait_for_status(page, "in the lasso")
    corners = page.evaluate("location.hash.match(/lasso=([^&]*)/)[1]").replace("%2C", ",").replace("%3B", ";")
    polygon = Polygon([tuple(map(float, corner.split(","))) for corner in corners.split(";")])
    features = (
        features_of(atlas_store).drop("x", "y").join(atlas_store.frame("profile_umap").collect(), on="feature_id")
    )
    inside = features.filter(polygon.contains_points(features.select("x", "y").to_numpy()))
    assert 5 < inside.height < 115
    assert page.locator(STATUS).inner_text().startswith(f"{inside.height} in the lasso")
    wanted = inside.sort(pl.col("top_label_auroc_select"), descending=True, nulls_last=True)
    assert_same(saved(page), wanted)


def test_an_address_opens_the_same_view_and_back_returns(open_page: Open) -> None:
    page = open_page("")
    page.locator("select[name=color]").select_option("density")
    page.locator("select[name=density]").select_option("0.01~0.1")
    page.get_by_role("columnheader", name="id").get_by_role("button").click()
    page.wait_for_function("location.hash.includes('sort=feature_id')")
    page.locator(".dots").focus()
    page.keyboard.press("+")
    page.wait_for_function("location.hash.includes('view=')")
    address, first, status = page.url, listed(page), page.locator(STATUS).inner_text()
    other = open_page(address.split("/", 3)[3])
    assert (listed(other), other.locator(STATUS).inner_text()) == (first, status)
    assert other.locator("select[name=color]").input_value() == "density"
    pixels = "document.querySelector('.dots').toDataURL()"
    assert other.evaluate(pixels) == page.evaluate(pixels)
    page.go_back()
    page.wait_for_function("!location.hash.includes('sort=')")
    page.go_back()
    page.wait_for_function("!location.hash.includes('density=0.01')")
    wait_for_status(page, "120 features")
    assert page.locator("select[name=density]").input_value() == ""


@pytest.mark.parametrize(
    ("query", "condition"),
    [
        ("class=dead", pl.col("dead")),
        ("off=batch,mixed", ~pl.col("class").is_in(["batch", "mixed"])),
        ("q=cd79a", pl.col("top_genes").str.contains("CD79A")),
        ("density=0.01~0.1", pl.col("density").is_between(0.01, 0.1, closed="left")),
        ("label=NK%2C+bright", pl.col("top_label") == "NK, bright"),
    ],
)
def test_a_facet_leaves_what_the_store_has_of_it(
    open_page: Open, atlas_store: FeatureStore, query: str, condition: pl.Expr
) -> None:
    page = open_page(f"#/atlas?{query}&sort=feature_id")
    wanted = features_of(atlas_store).filter(condition)
    wait_for_status(page, f"{wanted.height} of 120 features")
    page.wait_for_function(f"{SHOWN} === '{wanted.height}'")
    assert_same(saved(page), wanted)


def test_a_label_ranks_features_on_select_cells_and_shows_them_on_test_cells(
    open_page: Open, atlas_store: FeatureStore, hostile: str
) -> None:
    page = open_page("")
    page.locator("select[name=color]").select_option(label=hostile)
    page.wait_for_function("location.hash.includes('auroc')")
    labels = atlas_store.frame("feature_label").filter(label=hostile, label_kind="cell_type").collect()
    best = labels.filter(split="select").sort("auroc", descending=True)
    test = dict(labels.filter(split="test").select("feature_id", "auroc").iter_rows())
    page.wait_for_function(
        "id => document.querySelector('.vt-row a')?.textContent === id", arg=str(best["feature_id"][0])
    )
    assert listed(page)[:8] == best["feature_id"].to_list()[:8]
    first = page.locator(".vt-row").first.locator("[role=gridcell]").all_inner_texts()
    assert first[1:3] == [f"{best['auroc'][0]:.3f}", f"{test[best['feature_id'][0]]:.3f}"]
    assert hostile in page.locator(".ramp-legend").inner_text()


def test_rows_are_gone_through_and_opened_with_the_keyboard(open_page: Open) -> None:
    page = open_page("#/atlas?sort=feature_id")
    page.locator("[role=grid]").focus()
    for _ in range(4):
        page.keyboard.press("ArrowDown")
    assert page.locator("[aria-selected=true] [role=gridcell]").first.inner_text() == "3"
    assert page.locator(".ring").count() == 1
    page.keyboard.press("End")
    page.wait_for_selector("[aria-selected=true] >> text=119")
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    page.wait_for_function("location.hash === '#/feature/0'")


def test_who_is_at_a_control_stays_there_when_it_is_drawn_anew(open_page: Open) -> None:
    page = open_page("")
    page.locator("button.legend-entry", has_text="mixed").focus()
    page.keyboard.press("Enter")
    wait_for_status(page, "92 of 120 features")
    assert page.evaluate(NAME_OF_FOCUS).startswith("mixed")
    page.keyboard.press("Space")
    wait_for_status(page, "120 features")
    page.get_by_role("columnheader", name="id").get_by_role("button").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('[aria-sort]').textContent.startsWith('id')")
    assert page.evaluate(NAME_OF_FOCUS).startswith("id")


def test_every_control_is_reached_with_tab(open_page: Open) -> None:
    page = open_page("")
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate(NAME_OF_FOCUS))
    for wanted in ("color", "label", "density", "q", "Random feature", "CSV of 120", "Features", "Zoom in", "Steering"):
        assert any(wanted in str(name) for name in reached), (wanted, reached)


def test_a_random_feature_is_one_that_is_listed_and_alive(open_page: Open, atlas_store: FeatureStore) -> None:
    page = open_page("#/atlas?off=gene-identity,cell-context,batch")
    page.get_by_role("button", name="Random feature").click()
    page.wait_for_function("location.hash.startsWith('#/feature/')")
    chosen = int(page.evaluate("location.hash.split('/')[2]"))
    found = features_of(atlas_store).filter(feature_id=chosen)
    assert (found["class"][0], found["dead"][0]) == ("mixed", False)


def test_a_dot_tells_its_feature_and_opens_it(open_page: Open, atlas_store: FeatureStore) -> None:
    page = open_page("#/atlas?q=cd79a&off=dead")
    wait_for_status(page, "of 120 features")
    feature = listed(page)[0]
    place = page.evaluate(
        """id => { const plot = document.querySelector('.scatter').scatter, at = plot.places;
                   return [at.x(plot.xs[id]), at.y(plot.ys[id])]; }""",
        feature,
    )
    box = page.locator(".dots").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + place[0], box["y"] + place[1])
    assert page.locator(".tip strong").inner_text().startswith(f"{feature}: ")
    page.mouse.click(box["x"] + place[0], box["y"] + place[1])
    page.wait_for_function(f"location.hash === '#/feature/{feature}'")


def test_a_store_without_map_or_associations_says_what_to_run(
    open_page: Open, serving: Any, store_without: Callable[..., FeatureStore]
) -> None:
    store = store_without("associations", "saes/5ae/map", "comparisons", "steering")
    page = open_page("", address=serving(store))
    assert f"scsae associate --store {store.layout.root}" in page.locator(".empty").inner_text()


def test_a_store_without_a_map_of_its_features_lists_them_all_the_same(
    open_page: Open, serving: Any, store_without: Callable[..., FeatureStore]
) -> None:
    page = open_page(
        "#/atlas?sort=feature_id", address=serving(store_without("saes/5ae/map", "associations/a550c/map"))
    )
    assert "scsae serve" in page.locator(".empty").inner_text()
    assert listed(page)[:5] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_its_window(open_page: Open, width: int, dark: bool) -> None:
    page = open_page("#/atlas?color=auroc:0", width=width, height=844, dark=dark)
    page.wait_for_function(f"{SHOWN} === '120'")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = page.evaluate("['color', 'backgroundColor'].map((name) => getComputedStyle(document.body)[name])")
    assert contrast(ink, paper) > 7


def contrast(a: str, b: str) -> float:
    """Contrast of two CSS colours, 1 to 21 (WCAG 2.1)."""

    def luminance(text: str) -> float:
        rgb = np.array([int(value) / 255 for value in re.findall(r"\d+", text)[:3]])
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_modules_colour_the_map_by_their_number_and_first_genes(open_page: Open) -> None:
    page = open_page("#/atlas?color=module")
    key = page.locator(".map-key").inner_text()
    assert "0: CD3D IL32 LCK" in key
    assert "1: CD3D IL32 LCK" in key
    assert page.get_by_label("Colour").input_value() == "module"
