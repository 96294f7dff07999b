"""What frames every page: help, focus, the phone's navigation, maps and wheels, new results, and a page from a file."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from feature_store.atlas import export

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from playwright.sync_api import Browser, Page

    from feature_store import FeatureStore

FOCUS = "document.activeElement.getAttribute('aria-label') ?? document.activeElement.textContent"


def test_a_question_mark_opens_a_tour_of_every_page_and_a_glossary(open_page: Callable[..., Page]) -> None:
    page = open_page("#/run")
    page.keyboard.press("?")
    dialog = page.locator("dialog[open]")
    named = set(dialog.locator(".tour a").all_inner_texts())
    assert {text.split(" (")[0] for text in page.locator("nav a").all_inner_texts()} >= named
    assert len(named) == 9
    dialog.get_by_label("Find a term in the glossary").fill("rank-bis")
    assert dialog.locator(".terms dt").all_inner_texts() == ["rank-biserial"]
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0
    page.get_by_role("button", name="Help").click()
    dialog.get_by_role("link", name="Modules").click()
    page.wait_for_selector("main[data-ready='modules/']")
    assert page.locator("dialog[open]").count() == 0


def test_back_returns_to_the_control_and_the_place_that_were_left(open_page: Callable[..., Page]) -> None:
    page = open_page("#/controls")
    link = page.locator("#controls-probes td a").nth(2)
    wanted = link.inner_text()
    link.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("main[data-ready^='feature/'], main[data-ready^='label/']")
    page.go_back()
    page.wait_for_selector("main[data-ready='controls/']")
    assert page.evaluate(FOCUS) == wanted
    assert page.evaluate("scrollY") > 200


def test_back_returns_to_the_row_of_a_table(open_page: Callable[..., Page]) -> None:
    page = open_page("#/atlas?sort=feature_id")
    page.locator("[role=grid]").focus()
    for _ in range(5):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_selector("main[data-ready='feature/4']")
    page.go_back()
    page.wait_for_selector("main[data-ready='atlas/']")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "grid"
    assert page.locator("[aria-selected=true] [role=gridcell]").first.inner_text() == "4"


def test_a_page_that_takes_the_focus_has_no_line_around_it(open_page: Callable[..., Page]) -> None:
    page = open_page("#/run")
    page.get_by_role("link", name="Controls").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("main[data-ready='controls/']")
    assert page.evaluate("document.activeElement.id") == "main"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "none"


def test_every_page_is_within_reach_on_a_phone(open_page: Callable[..., Page]) -> None:
    page = open_page("#/run", width=390, height=844)
    for link in page.locator("nav a").all():
        box = link.bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390


@pytest.mark.parametrize("where", ["#/atlas", "#/batch", "#/cells", "#/feature/3", "#/steering"])
def test_no_tool_lies_over_a_map_and_no_tip_beyond_it(open_page: Callable[..., Page], where: str) -> None:
    page = open_page(where)
    page.wait_for_selector(".scatter[data-frames]")
    boxes = page.evaluate(
        """() => [...document.querySelectorAll('.scatter')].map((one) => ['.dots', '.tools'].map((name) => {
            const { left, right } = one.querySelector(name).getBoundingClientRect(); return [left, right]; }))"""
    )
    assert boxes
    for (_, right), (left, _) in boxes:
        assert right <= left + 1
    inside = page.evaluate(
        """async () => {
            const plot = document.querySelector('.scatter').scatter, field = plot.field.getBoundingClientRect();
            const found = [];
            plot.says = () => ['a long text about a dot that would reach beyond the edge of the map '.repeat(2)];
            const [right, bottom] = [field.width - 2, field.height - 2];
            for (const [x, y] of [[2, 2], [right, 2], [2, bottom], [right, bottom]]) {
                await plot.point(0, x, y);
                const tip = plot.tip.getBoundingClientRect();
                const isWide = tip.left < field.left || tip.right > field.right;
                found.push(!isWide && tip.top >= field.top && tip.bottom <= field.bottom);
            }
            return found;
        }"""
    )
    assert inside == [True] * 4


def test_the_wheel_scrolls_the_page_and_zooms_with_ctrl_or_after_a_click(open_page: Callable[..., Page]) -> None:
    page = open_page("#/cells", height=500)
    box = page.locator(".dots").bounding_box()
    assert box is not None
    zoom = "document.querySelector('.scatter').scatter.view?.zoom ?? 1"
    page.mouse.move(box["x"] + 100, box["y"] + 100)
    page.mouse.wheel(0, 120)
    page.wait_for_function("scrollY > 50")
    assert page.evaluate(zoom) == 1
    assert page.locator(".zoom-hint").is_visible()
    page.keyboard.down("Control")
    page.mouse.wheel(0, -120)
    page.keyboard.up("Control")
    page.wait_for_function(f"({zoom}) > 1.05")
    before = page.evaluate(zoom)
    page.locator(".dots").focus()
    page.mouse.wheel(0, -120)
    page.wait_for_function(f"({zoom}) > {before} + 0.05")


def test_new_results_are_announced_on_a_page_that_stays_open(
    open_page: Callable[..., Page],
    store_without: Callable[..., FeatureStore],
    serving: Callable[[FeatureStore], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("feature_store.atlas.server.CHECK_S", 0.0)
    own = store_without()
    page = open_page("#/run", address=serving(own))
    page.clock.install()
    page.reload()
    page.wait_for_selector("main[data-ready='run/']")
    (run,) = own.lineage.steering
    shutil.copytree(own.layout.steering_dir(run), own.layout.steering_dir("57ee5"))
    assert page.locator(".news").is_hidden()
    page.clock.fast_forward(16_000)
    page.wait_for_selector(".news:not([hidden])")
    with page.expect_event("load"):
        page.get_by_role("button", name="Reload").click()
    page.wait_for_selector("main[data-ready='run/']")
    assert "57ee5" in page.locator("main").inner_text()


def test_a_page_that_is_opened_as_a_file_says_how_to_serve_it(
    browser: Browser, store_without: Callable[..., FeatureStore], tmp_path: Path
) -> None:
    export(store_without("associations", "comparisons", "steering", "matches"), tmp_path / "atlas")
    context = browser.new_context()
    page = context.new_page()
    page.goto((tmp_path / "atlas" / "index.html").as_uri())
    page.wait_for_selector(".unready", state="visible")
    assert "python -m http.server" in page.locator(".unready").inner_text()
    context.close()
