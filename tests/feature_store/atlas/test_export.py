"""The static export: the same bytes as the server's, and the same page in a browser."""

from __future__ import annotations

import http.server
import re
import threading
import urllib.request
from functools import partial
from typing import TYPE_CHECKING

import pytest

from feature_store.atlas import export
from feature_store.atlas.page import STATIC
from feature_store.atlas.resources import Resources
from feature_store.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from playwright.sync_api import Page

    from feature_store import FeatureStore

PAGES = ["#/atlas?color=auroc:1", "#/feature/3", "#/search?q=CD79A", "#/batch", "#/steering", "#/controls", "#/run"]
PICTURE = """() => Array.from(document.querySelectorAll('canvas.dots, svg.chart'),
    (e) => e.tagName === 'CANVAS' ? e.toDataURL() : e.outerHTML)"""


@pytest.fixture(scope="module")
def exported(atlas_store: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "atlas"
    export(atlas_store, folder)
    return folder


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Python's own server of files, without its log."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hosted(exported: Path) -> Iterator[str]:
    """Address of the exported folder on Python's own server of files."""
    handler = partial(Quiet, directory=str(exported))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_an_export_holds_what_the_server_answers_byte_for_byte(
    atlas_store: FeatureStore, exported: Path, served: str
) -> None:
    resources = Resources(atlas_store)
    paths = set(resources.paths())
    assert {str(file.relative_to(exported / "data")) for file in (exported / "data").rglob("*.*")} == paths
    for path in paths:
        found = resources.get(path)
        assert found is not None
        assert (exported / "data" / path).read_bytes() == found.body, path
    static = {file.relative_to(STATIC) for file in STATIC.rglob("*.*")}
    assert {file.relative_to(exported / "static") for file in (exported / "static").rglob("*.*")} == static
    with urllib.request.urlopen(f"{served}/") as page:
        assert (exported / "index.html").read_bytes() == page.read()


@pytest.mark.parametrize("where", PAGES)
def test_an_exported_page_renders_the_same_as_the_server_s(
    open_page: Callable[..., Page], hosted: str, where: str
) -> None:
    shown = []
    for page in (open_page(where), open_page(where, address=hosted)):
        page.wait_for_load_state("networkidle")
        page.wait_for_timeout(200)
        shown.append((page.locator("main").inner_text(), page.evaluate(PICTURE)))
    assert shown[0][0] == shown[1][0]
    assert shown[0][1] == shown[1][1]
    assert len(shown[0][0]) > 200


def test_an_export_replaces_an_earlier_one_and_nothing_else(
    store_without: Callable[..., FeatureStore], tmp_path: Path
) -> None:
    small = store_without("associations", "comparisons", "steering", "matches")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=re.escape(str(mine))):
        export(small, mine)
    assert (mine / "thesis.tex").read_text() == "years of work"
    with pytest.raises(InputError, match=r"thesis\.tex"):
        export(small, mine / "thesis.tex")
    folder = tmp_path / "empty"
    folder.mkdir()
    seen: list[tuple[int, int]] = []
    export(small, folder, progress=lambda *at: seen.append(at))
    assert seen[-1][0] == seen[-1][1] == len(seen)
    (folder / "data" / "left.json").write_text("{}")
    export(small, folder)
    assert not (folder / "data" / "left.json").exists()
