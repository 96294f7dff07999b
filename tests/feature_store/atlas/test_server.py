"""The server: what it answers, what it refuses, and what it sends with every answer."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import socket
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import polars as pl
import pytest

from feature_store.atlas import serve
from feature_store.atlas.resources import ROUTES, Resources
from feature_store.atlas.server import listen, waiting_page
from feature_store.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from feature_store import FeatureStore


def answer(address: str, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body; the path goes over the wire as it is."""
    with contextlib.closing(http.client.HTTPConnection(urlsplit(address).netloc, timeout=100)) as connection:
        connection.request(method, path, headers=headers)
        got = connection.getresponse()
        return got.status, {key.lower(): value for key, value in got.getheaders()}, got.read()


@pytest.mark.parametrize("path", ["/", "/index.html", "/static/js/app.js", "/data/atlas.json", "/data/features.cols"])
def test_every_answer_carries_a_policy_that_lets_nothing_in_from_elsewhere(served: str, path: str) -> None:
    status, headers, _ = answer(served, path)
    assert status == 200
    policy = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert (policy["script-src"], policy["style-src"], policy["connect-src"]) == ("'self'",) * 3
    assert policy["frame-ancestors"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    "path",
    [
        "/data/../plan.json",
        "/data/..%2f..%2fetc%2fpasswd",
        "/data/%2e%2e/%2e%2e/etc/passwd",
        "/data//etc/passwd",
        "/data/features/..%2f..%2f3.json",
        "/data/labels/9999.cols",
        "/data/labels/-1.cols",
        "/data/labels/1e3.cols",
        "/static/..%2f..%2fresources.py",
        "/static/%2e%2e/resources.py",
        "/static/../resources.py",
        "/static/",
        "/cells/toy/plan.json",
    ],
)
def test_no_path_leads_out_of_what_the_atlas_lists(served: str, path: str) -> None:
    status, _, body = answer(served, path)
    assert status == 404
    assert b"root:" not in body
    assert b"import" not in body


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize("path", ["/", "/data/atlas.json", "/static/js/app.js"])
def test_it_answers_only_questions(served: str, method: str, path: str) -> None:
    assert answer(served, path, method)[0] == 405


def test_it_is_bound_to_this_machine_and_answers_to_its_own_name_alone(served: str) -> None:
    assert urlsplit(served).hostname == "127.0.0.1"
    assert answer(served, "/data/atlas.json", Host="evil.example")[0] == 400
    assert answer(served, "/data/atlas.json", Host="localhost")[0] == 200


def test_a_port_that_is_taken_is_named_with_what_to_type(atlas_store: FeatureStore) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"127\.0\.0\.1:{port}\b.*--port"):
            serve(atlas_store, port=port)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "0.0.0.0"])
def test_the_address_that_it_names_is_the_one_that_it_answers_at(
    atlas_store: FeatureStore, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    # in the process's main thread the server would run until it is interrupted
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: None)
    try:
        listening = listen(host, 0)
    except InputError:
        pytest.skip(f"this machine has no {host}")
    said: list[str] = []
    serve(atlas_store, host=host, listening=listening, ready=lambda address: said.extend((address, connected(address))))
    assert said[1] == "connected"
    assert listening.fileno() == -1


def test_a_page_that_is_opened_while_maps_are_made_names_the_map_and_asks_again() -> None:
    with listen("127.0.0.1", 0) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with waiting_page(listening) as making:
            assert b"is making the maps of the atlas, once" in answer(address, "/")[2]
            making("the map of <b>cells</b>")
            status, headers, body = answer(address, "/data/atlas.json")
        assert (status, headers["retry-after"], headers["cache-control"]) == (503, "2", "no-cache")
        assert b"is making the map of &lt;b&gt;cells&lt;/b&gt;, once" in body
        assert b'http-equiv="refresh" content="2"' in body
        # a request after the block waits for the server
        with socket.create_connection(listening.getsockname(), timeout=60):
            connection, _ = listening.accept()
            connection.close()


def test_a_visitor_who_asks_nothing_does_not_keep_the_atlas_from_being_served() -> None:
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname(), timeout=60):
        # would never end if the page waited for the request
        with waiting_page(listening):
            pass
        assert listening.gettimeout() is None


def connected(address: str) -> str:
    with socket.create_connection((urlsplit(address).hostname, urlsplit(address).port), timeout=60):
        return "connected"


def test_a_title_from_the_data_is_escaped(
    serving: Callable[[FeatureStore], str], atlas_store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("feature_store.atlas.page.title_of", lambda _: "\"><script>alert('x')</script>")
    body = answer(serving(atlas_store), "/")[2].decode()
    assert "<script>alert" not in body
    assert "&lt;script&gt;" in body


def test_a_damaged_store_is_said_and_not_a_page_of_nothing(
    serving: Callable[[FeatureStore], str], store_without: Callable[..., FeatureStore]
) -> None:
    store = store_without()
    for part in (store.layout.associations_dir("a550c") / "features").glob("*.parquet"):
        part.write_bytes(part.read_bytes()[:-100])
    status, _, body = answer(serving(store), "/data/features.cols")
    assert status == 500
    assert "scsae verify" in json.loads(body)["error"]


MAPS = ("codes/c0de/umap", "saes/5ae/map", "associations/a550c/map", "steering/57ee4/map")
RUNS = ("associations", "cells", "codes", "comparisons", "matches", "saes", "steering")
LESS = {
    "nothing": (),
    "the maps": MAPS,
    "what a baseline has not": (*MAPS[:3], "comparisons", "matches", "steering"),
    "the SAE": ("saes", "comparisons"),
    "associations": ("associations", "comparisons", "matches", "steering"),
    "all but cells": tuple(kind for kind in RUNS if kind != "cells"),
    "all but steering": tuple(kind for kind in RUNS if kind != "steering"),
    "parts of steering": tuple(f"steering/57ee4/{part}" for part in ("scores", "variants", "per_cell")),
}


@pytest.mark.parametrize("less", LESS)
def test_every_resource_that_is_listed_is_there_whatever_the_store_lacks(
    store_without: Callable[..., FeatureStore], less: str
) -> None:
    resources = Resources(store_without(*LESS[less]))
    paths = list(resources.paths())
    assert len(paths) == len(set(paths)) > 9
    every = [list(route.paths(resources.data)) for route in ROUTES]
    # of many of a kind the first, one in ten, and the last: in the planted store the last feature is dead
    for path in [path for kind in every for path in (*kind[: -1 : 1 if len(kind) < 20 else 10], *kind[-1:])]:
        found = resources.get(path)
        assert found is not None, path
        if path.endswith(".json"):
            json.loads(found.body, parse_constant=pytest.fail)


def test_a_feature_has_its_place_on_both_maps_and_a_dead_one_none_by_labels(
    atlas_store: FeatureStore, store_without: Callable[..., FeatureStore], decode: Callable[[bytes], pl.DataFrame]
) -> None:
    found = Resources(atlas_store).get("features.cols")
    less = Resources(store_without("associations/a550c/map")).get("features.cols")
    assert found is not None
    assert less is not None
    table = decode(found.body)
    for name, (x, y) in {"feature_umap": ("x", "y"), "profile_umap": ("px", "py")}.items():
        points = atlas_store.frame(name).collect()
        living = table.filter(pl.col("feature_id").is_in(points["feature_id"].implode()))
        assert living.select(x, y).rows() == points.select("x", "y").rows()
    assert table.select("px", "py").row(119) == (pytest.approx(math.nan, nan_ok=True),) * 2
    assert decode(less.body).select("px", "py").select(pl.all().is_nan()).to_numpy().all()
    assert decode(less.body).drop("px", "py").equals(table.drop("px", "py"), null_equal=True)


def test_serving_writes_nothing_to_the_store(
    served: str, atlas_root: Path, folder_hashes: Callable[[Path], dict[str, str]]
) -> None:
    before = folder_hashes(atlas_root)
    for path in ("/", "/data/atlas.json", "/data/features.cols", "/data/labels/0.cols"):
        answer(served, path)
    assert folder_hashes(atlas_root) == before
