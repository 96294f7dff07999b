"""Every page, in both themes and at three widths, without a serious finding of axe-core (WCAG 2 and best practices)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from axe_playwright_python.base import AXE_SCRIPT

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Page

PAGES = [
    "#/",
    "#/?sort=density",
    "#/cells",
    "#/modules",
    "#/search?q=GENE",
    "#/compare?f=2.3",
    "#/batch",
    "#/steering",
    "#/controls",
    "#/run",
    "#/feature/2",
    "#/label/cell_type%3AB",
    "#/nowhere",
]
SERIOUS = """async ({ exclude, options }) => (await axe.run({ include: ['html'], exclude }, options)).violations
    .filter(({ impact }) => impact === 'serious' || impact === 'critical')
    .flatMap(({ id, nodes }) => nodes.map(({ target, failureSummary }) => `${id}: ${target} ${failureSummary}`))"""
STRUCTURE = {"exclude": [], "options": {"resultTypes": ["violations"], "rules": {"color-contrast": {"enabled": False}}}}
# careful: axe-core cannot tell what lies behind the text of an SVG, and takes long to find that out
CONTRAST = {"exclude": ["svg"], "options": {"resultTypes": ["violations"], "runOnly": ["color-contrast"]}}
WIDTHS = (1440, 1024, 390)


def findings(page: Page, where: str) -> list[str]:
    """The serious and critical findings: of contrast in both themes, of all else, which no theme changes, in one."""
    page.evaluate(AXE_SCRIPT)
    found = []
    for scheme, checks in (("light", [STRUCTURE, CONTRAST]), ("dark", [CONTRAST])):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_selector("main[data-ready]")
            # a chart is drawn again a frame after its width changed
            page.wait_for_timeout(200)
            for check in checks:
                said: list[Any] = page.evaluate(SERIOUS, check)
                found += [f"{where} {scheme} {width}: {one}" for one in said]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("where", PAGES)
def test_a_page_has_no_serious_finding(open_page: Callable[..., Page], where: str) -> None:
    assert findings(open_page(where), where) == []


@pytest.mark.slow
def test_the_help_has_no_serious_finding(open_page: Callable[..., Page]) -> None:
    page = open_page("#/")
    page.get_by_role("button", name="Help: a short tour and the glossary").click()
    assert findings(page, "help") == []


def test_what_is_wrong_is_found(open_page: Callable[..., Page]) -> None:
    page = open_page("#/nowhere")
    page.evaluate(
        """() => { const text = document.createElement('p'), image = document.createElement('img');
        image.src = 'static/icon.svg';
        text.textContent = 'pale'; text.style.color = '#777'; text.style.background = '#888';
        document.body.append(text, image); }"""
    )
    found = findings(page, "planted")
    assert sum("image-alt" in one for one in found) == len(WIDTHS)
    assert sum("color-contrast" in one for one in found) == 2 * len(WIDTHS)
