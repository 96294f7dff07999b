"""The static export: the same bytes as the server's, and the same page in a browser."""

from __future__ import annotations

import gzip
import http.server
import json
import re
import sys
import threading
import urllib.request
from functools import partial
from typing import TYPE_CHECKING

import pytest
from sampled import sampled

from feature_store.atlas import bundles, export
from feature_store.atlas.page import STATIC
from feature_store.atlas.resources import Resources
from feature_store.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from playwright.sync_api import Page

    from feature_store import FeatureStore

PAGES = ["#/atlas?color=auroc:1", "#/feature/3", "#/search?q=CD79A", "#/batch", "#/steering", "#/controls", "#/run"]
PAGES += ["#/label/cell_type:B", "#/modules", "#/cells?color=feature:3", "#/compare?f=3.6&n3=odd"]
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
    listed = json.loads(gzip.decompress((exported / "data" / bundles.INDEX).read_bytes()))["bundles"]
    assert {file.name for file in (exported / "data").iterdir()} == {bundles.INDEX, *(one["file"] for one in listed)}
    held = {}
    for one in listed:
        inside = bundles.unpacked((exported / "data" / one["file"]).read_bytes())
        assert list(inside) == one["paths"]
        held |= inside
    assert set(held) == set(resources.paths())
    for path, body in held.items():
        found = resources.get(path)
        assert found is not None
        assert body == found.body, path
    static = {file.relative_to(STATIC) for file in STATIC.rglob("*.*")}
    assert {file.relative_to(exported / "static") for file in (exported / "static").rglob("*.*")} == static
    with urllib.request.urlopen(f"{served}/") as page:
        bundled = page.read().replace(b'data-title="toy"', b'data-title="toy" data-bundled')
        assert (exported / "index.html").read_bytes() == bundled


def test_bundles_of_several_processes_are_those_of_one(
    atlas_store: FeatureStore, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # careful: in its package the module is hidden by the function of its name
    monkeypatch.setattr(sys.modules["feature_store.atlas.export"], "LEAST_FOR_PROCESSES", 2)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    export(atlas_store, tmp_path / "atlas")
    for file in (exported / "data").iterdir():
        assert (tmp_path / "atlas" / "data" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_bundle_gives_back_what_it_was_packed_of_and_knows_no_time() -> None:
    held = {"a/1.json": b"{}", "b.cols": bytes(range(256)), "empty.json": b""}
    assert bundles.unpacked(bundles.packed(list(held.items()))) == held
    assert bundles.packed(list(held.items())) == bundles.packed(list(held.items()))
    kinds = [("x.json", ["x.json"]), ("y/{id}.cols", [f"y/{i}.cols" for i in range(130)]), ("none/{id}.json", [])]
    assert [(name, len(paths)) for name, paths in bundles.planned(kinds)] == [
        ("first-0.gz", 1),
        ("y_id_cols-0.gz", 64),
        ("y_id_cols-1.gz", 64),
        ("y_id_cols-2.gz", 2),
    ]


@pytest.mark.parametrize("where", sampled(PAGES, keep=[PAGES[0], PAGES[1], PAGES[4], PAGES[-1]]))
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
    (folder / "data" / "left.gz").write_text("{}")
    export(small, folder)
    assert not (folder / "data" / "left.gz").exists()
