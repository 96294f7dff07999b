"""Figures as files: every chart and map of every page, as SVG and PNG, with what it is of in the metadata."""

from __future__ import annotations

from io import BytesIO
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest
from PIL import Image
from sampled import sampled

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Locator, Page

    from feature_store import FeatureStore

SVG = "{http://www.w3.org/2000/svg}"
DC = "{http://purl.org/dc/elements/1.1/}"
PAGES = {
    "#/": "associations a550c",
    "#/cells": "associations a550c",
    "#/modules": "associations a550c",
    "#/batch": "associations a550c",
    "#/steering": "steering 57ee4",
    "#/controls": "associations a550c",
    "#/run": "associations a550c",
    "#/feature/2": "associations a550c",
    "#/label/cell_type%3AB": "associations a550c",
    "#/compare?f=2.3": "associations a550c",
}


def saved(page: Page, button: Locator) -> bytes:
    # Chromium loses a download of a page that makes more than ten in a second
    page.wait_for_timeout(100)
    with page.expect_download() as download:
        button.click()
    return Path(download.value.path()).read_bytes()


def figures(page: Page) -> list[Locator]:
    return [box for box in page.locator(".fitted, .scatter").all() if box.is_visible()]


def texts_of(root: ElementTree.Element) -> list[str]:
    return [text for element in root.iter(f"{SVG}text") if (text := "".join(element.itertext()).strip())]


@pytest.mark.parametrize("where", sampled(PAGES, keep=["#/cells", "#/feature/2"]))
def test_every_figure_of_a_page_is_an_svg_that_says_what_it_is_of(
    open_page: Callable[..., Page], atlas_store: FeatureStore, where: str
) -> None:
    page = open_page(where)
    kind, run = PAGES[where].split()
    created = next(info.created for info in atlas_store.layout.runs(kind) if info.run == run)
    assert created is not None
    assert figures(page)
    for box in figures(page):
        root = ElementTree.fromstring(saved(page, box.get_by_role("button", name="Save this figure as SVG")))
        title = root.findtext(f"{SVG}title")
        facts = {element.tag.removeprefix(DC): element.text for element in root.iter() if element.tag.startswith(DC)}
        assert facts == {
            "title": title,
            "creator": "scsae",
            "source": f"store store, {kind} {run}",
            "date": created.isoformat(timespec="seconds"),
            "relation": where,
        }
        assert texts_of(root), "the text of a figure stays text"
        assert "".join(texts_of(root)[0].split()).startswith("".join((title or "").split())[:10])
        assert not {name for element in root.iter() for name in element.attrib} & {"class", "style", "onclick"}
        shapes = {f"{SVG}{name}" for name in ("circle", "rect", "line", "path", "polygon", "polyline")}
        assert {element.tag for element in root.iter()} & shapes


@pytest.mark.parametrize(
    ("where", "dark"),
    sampled(product(["#/", "#/feature/2", "#/steering"], [False, True]), keep=[("#/", False), ("#/feature/2", True)]),
)
def test_a_figure_is_a_png_of_the_same_picture_in_the_colours_that_are_shown(
    open_page: Callable[..., Page], where: str, dark: bool
) -> None:
    page = open_page(where, dark=dark)
    for box in figures(page)[:3]:
        root = ElementTree.fromstring(saved(page, box.get_by_role("button", name="Save this figure as SVG")))
        with Image.open(BytesIO(saved(page, box.get_by_role("button", name="Save this figure as PNG")))) as image:
            image.load()
            assert image.size == pytest.approx([3 * float(root.get(side) or 0) for side in ("width", "height")], abs=1)
            assert image.info["Title"] == root.findtext(f"{SVG}title")
            assert image.info["Source"] == f"store store, {PAGES[where]}"
            assert image.info["Comment"] == where
            assert image.info["Creation Time"][:2] == "20"
            paper = image.convert("RGB").getpixel((2, 2))
            colours = image.convert("RGB").getcolors(1 << 24)
        assert paper == ((20, 23, 27) if dark else (255, 255, 255))
        assert colours is not None
        assert len(colours) > 20


@pytest.mark.parametrize(
    ("where", "keys"),
    [
        ("#/feature/2", {"cell code 0", "silent", "other splits"}),
        ("#/cells", {"B 100", "T 100"}),
        ("#/batch", {"mixed 28"}),
        ("#/controls", {"sae", "pca"}),
        ("#/steering", {"stim 96", "mean of a cell type, before to after"}),
    ],
)
def test_a_file_of_a_figure_has_its_key(open_page: Callable[..., Page], where: str, keys: set[str]) -> None:
    page = open_page(where)
    save = figures(page)[0].get_by_role("button", name="Save this figure as SVG")
    texts = texts_of(ElementTree.fromstring(saved(page, save)))
    assert {key for key in keys if not any(text.startswith(key) for text in texts)} == set()


def test_more_dots_than_shapes_are_worth_are_an_image(open_page: Callable[..., Page]) -> None:
    page = open_page("#/")
    page.evaluate(
        """() => { const plot = document.querySelector('.scatter').scatter, n = 6000;
        plot.show(null); plot.order(null);
        const xs = Float64Array.from({ length: n }, (_, i) => i);
        plot.points(xs, xs.map((x) => x % 77)); }"""
    )
    root = ElementTree.fromstring(saved(page, page.get_by_role("button", name="Save this figure as SVG").first))
    (image,) = [one for one in root.iter(f"{SVG}image") if float(one.get("width") or 0) > 200]
    assert (image.get("href") or "").startswith("data:image/png;base64,")
