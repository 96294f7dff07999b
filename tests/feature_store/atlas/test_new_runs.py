"""A server and its pages show the runs that are committed while it answers."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import polars as pl
import pytest

from feature_store import FeatureStore
from feature_store.atlas.resources import Resources
from feature_store.storage import commit

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Page

    from feature_store.storage.layout import Layout


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the store at every request."""
    monkeypatch.setattr("feature_store.atlas.server.CHECK_S", 0.0)


@pytest.fixture
def own(store_without: Callable[..., FeatureStore]) -> FeatureStore:
    """A copy of the planted store."""
    return store_without()


def read(address: str, path: str) -> tuple[int, str | None, Any]:
    """Status, state of the store and content of a resource."""
    with contextlib.closing(http.client.HTTPConnection(urlsplit(address).netloc, timeout=100)) as connection:
        connection.request("GET", f"/data/{path}")
        got = connection.getresponse()
        return got.status, got.getheader("Atlas-State"), json.loads(got.read())


def commit_associations(layout: Layout, name: str, density: float) -> None:
    """Commit associations of the same codes, with another density of feature 3."""
    for table in sorted(layout.associations_dir("a550c").iterdir()):
        if (table / "MANIFEST.json").is_file():
            frame, plan = commit.read_table(table), commit.Run.open(table).plan
            if table.name == "features":
                frame = frame.with_columns(
                    density=pl.when(feature_id=3).then(density).otherwise("density").cast(pl.Float64)
                )
            commit.write_table(layout.associations_dir(name) / table.name, frame, plan)


def density_of_3(address: str) -> float:
    found: float = read(address, "features/3.json")[2]["about"]["density"]
    return found


def test_a_run_that_is_committed_is_shown_at_the_next_look(
    own: FeatureStore, serving: Callable[[FeatureStore], str]
) -> None:
    layout = own.layout
    address, named = serving(own), serving(FeatureStore.open(layout.root, associations="a550c"))
    _, before, _ = read(address, "atlas.json")
    first = density_of_3(address)
    assert read(address, "atlas.json")[1] == before
    commit_associations(layout, "beef", 0.123)
    assert density_of_3(address) == 0.123
    status, after, overview = read(address, "atlas.json")
    assert (status, overview["runs"]["associations"]) == (200, "beef")
    assert after != before
    # what was named stays
    assert density_of_3(named) == first
    # steering runs of the same SAE are added to both
    runs = own.lineage.steering
    shutil.copytree(layout.steering_dir(runs[0]), layout.steering_dir("57ee5"))
    for one in (address, named):
        assert set(read(one, "atlas.json")[2]["runs"]["steering"]) == {*runs, "57ee5"}
    # an export is of the store as it was opened, from the first resource to the last
    assert json.loads(Resources(own).get("features/3.json").body)["about"]["density"] == first


def test_the_same_store_is_kept_while_nothing_changes(own: FeatureStore) -> None:
    store = own
    assert store.renewed() is store
    commit_associations(own.layout, "beef", 0.5)
    found = store.renewed()
    assert found is not store
    assert found.lineage.associations == "beef"
    assert found.renewed() is found
    named = FeatureStore.open(own.layout.root, associations="a550c")
    assert named.renewed().lineage.associations == "a550c"


def test_many_requests_look_at_the_store_once_a_second(
    own: FeatureStore, serving: Callable[[FeatureStore], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("feature_store.atlas.server.CHECK_S", 1.0)
    looks: list[float] = []
    renewed = FeatureStore.renewed
    monkeypatch.setattr(FeatureStore, "renewed", lambda store: looks.append(time.monotonic()) or renewed(store))
    address = serving(own)
    started = time.monotonic()
    for _ in range(30):
        read(address, "atlas.json")
    assert len(looks) <= 1 + int(time.monotonic() - started)


def test_an_open_page_reads_everything_again(
    open_page: Callable[..., Page], own: FeatureStore, serving: Callable[[FeatureStore], str]
) -> None:
    address = serving(own)
    page = open_page("#/feature/3", address=address)
    commit_associations(own.layout, "beef", 0.123)
    with page.expect_event("load"):
        page.evaluate("location.hash = '#/feature/5'")
    page.wait_for_selector("main[data-ready='feature/5']")
    page.evaluate("location.hash = '#/feature/3'")
    page.wait_for_selector("main[data-ready='feature/3']")
    assert "12.3" in page.locator("main").inner_text()
