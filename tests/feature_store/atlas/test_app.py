"""The frame around the pages: theme, navigation by keyboard, and what it says while and where nothing is."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Page

PAPER = "getComputedStyle(document.body).backgroundColor"


def test_the_theme_follows_the_system_and_the_switch_is_remembered(open_page: Callable[..., Page]) -> None:
    page = open_page("#/run")
    light = page.evaluate(PAPER)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(PAPER)
    assert dark != light
    page.get_by_role("button", name="Switch between light and dark").click()
    assert page.evaluate(PAPER) == light
    page.reload()
    page.wait_for_selector("main[data-ready]")
    assert page.evaluate(PAPER) == light


def test_dots_change_their_colours_with_the_theme_of_the_system(open_page: Callable[..., Page]) -> None:
    page = open_page("#/atlas?color=auroc:0")
    dots = "document.querySelector('.dots').toDataURL()"
    page.wait_for_function("document.querySelector('.scatter').dataset.frames")
    before = page.evaluate(dots)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(
        f"before => document.querySelector('.scatter')?.dataset.frames && {dots} !== before", arg=before
    )


def test_pages_are_gone_through_with_the_keyboard_alone(open_page: Callable[..., Page]) -> None:
    page = open_page("")
    for name in ("Search", "Batch", "Steering", "Controls", "Run", "Atlas"):
        page.get_by_role("link", name=name, exact=True).focus()
        page.keyboard.press("Enter")
        page.wait_for_function(
            "name => document.querySelector('main').dataset.ready?.startsWith(name)", arg=name.lower()
        )
        current = page.locator("nav a[aria-current=page]").first
        assert current.inner_text() == name
        assert page.evaluate("document.querySelector('main').contains(document.activeElement)")
    page.keyboard.press("/")
    page.wait_for_function("document.activeElement.id === 'search-input'")


def test_an_unknown_page_leads_back(open_page: Callable[..., Page]) -> None:
    page = open_page("#/nowhere")
    assert "no page “nowhere”" in page.locator("[role=alert]").inner_text()
    page.get_by_role("link", name="Back to the atlas").click()
    page.wait_for_selector(".scatter[data-frames]")
