"""A store whose panel is 120 of 400 cells: pages say which figures are of it, and all others are of all cells."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pytest

from feature_store.atlas.resources import Resources

if TYPE_CHECKING:
    from collections.abc import Callable

    from feature_store import FeatureStore

Open = "Callable[..., Page]"
FEATURE = 6
PAGES = (
    "#/atlas",
    f"#/feature/{FEATURE}",
    "#/batch",
    "#/controls",
    "#/run",
    "#/steering",
    "#/search?kind=gene&q=CD79A",
)


@pytest.fixture(scope="module")
def resources(panel_atlas: FeatureStore) -> Resources:
    return Resources(panel_atlas)


@pytest.fixture(scope="module")
def cells(panel_atlas: FeatureStore) -> pl.DataFrame:
    return panel_atlas.frame("cells").collect()


def found(resources: Resources, path: str) -> Any:
    resource = resources.get(path)
    assert resource is not None
    return json.loads(resource.body)


def test_the_numbers_of_the_panel_and_of_all_cells_are_told_apart(resources: Resources, cells: pl.DataFrame) -> None:
    assert found(resources, "atlas.json")["panel"] == {"n_panel": 120, "n_cells": 400}
    data = found(resources, "run.json")["data"]
    assert (data["panel"]["n_panel"], data["panel"]["n_cells"], data["panel"]["keep"]) == (120, 400, 16)
    assert (data["panel"]["drawn"]["seed"], data["panel"]["drawn"]["strata"]) == (7, ["split", "donor"])
    for row in data["splits"]:
        own = cells if row["split"] == "all" else cells.filter(split=row["split"])
        assert (row["n_cells"], row["n_of_all"]) == (own["panel"].sum(), own.height)
    batches = found(resources, "batch.json")["batches"]
    assert sum(row[split] for row in batches for split in ("train", "select", "test")) == 120


def test_firing_counts_and_top_cells_are_of_all_cells(
    resources: Resources, cells: pl.DataFrame, planted_codes: np.ndarray
) -> None:
    about, code = found(resources, f"features/{FEATURE}.json")["cells"], planted_codes[:, FEATURE]
    for split in ("test", "all"):
        inside = (cells["split"] == "test").to_numpy() if split == "test" else np.ones(400, dtype=bool)
        assert about["splits"][split] == {"n": inside.sum(), "n_firing": np.count_nonzero(code[inside])}
    strongest = np.lexsort((np.arange(400), -code))[:20]
    assert [row["cell_idx"] for row in about["top"]] == strongest.tolist()
    assert not cells["panel"].gather(strongest).all()
    for row in about["top"]:
        (own,) = cells.filter(cell_idx=row["cell_idx"]).to_dicts()
        assert row["value"] == code[row["cell_idx"]]
        assert {name: row[name] for name in ("cell_id", "split", "cell_type", "batch")} == {
            name: own[name] for name in ("cell_id", "split", "cell_type", "batch")
        }


def test_top_tokens_of_cells_outside_the_panel_have_their_labels(
    resources: Resources, cells: pl.DataFrame, panel_atlas: FeatureStore
) -> None:
    rows = found(resources, f"features/{FEATURE}.json")["tokens"]["rows"]
    stored = panel_atlas.frame("feature_token").filter(feature_id=FEATURE).sort("value", descending=True).collect()
    assert [row["cell_idx"] for row in rows] == stored["cell_idx"].to_list()
    assert [row["cell_type"] for row in rows] == cells["cell_type"].gather(stored["cell_idx"]).to_list()
    assert not cells["panel"].gather(stored["cell_idx"]).all()


@pytest.mark.parametrize("split", ["test", "all"])
def test_violins_are_of_the_panels_cells(
    resources: Resources, cells: pl.DataFrame, planted_codes: np.ndarray, split: str
) -> None:
    groups = found(resources, f"features/{FEATURE}.json")["cells"]["violins"][split]["cell_type"]["groups"]
    own = cells.with_columns(value=pl.Series(planted_codes[:, FEATURE])).filter("panel")
    own = own if split == "all" else own.filter(split="test")
    assert sum(group["n"] for group in groups) == own.height
    for group in groups:
        value = own.filter(cell_type=group["label"])["value"].to_numpy()
        assert (group["n"], group["n_firing"]) == (value.size, np.count_nonzero(value))
        assert group["mean"] == pytest.approx(value.mean())


def test_features_that_go_together_do_so_in_the_panels_cells(
    resources: Resources, cells: pl.DataFrame, planted_codes: np.ndarray
) -> None:
    rows = found(resources, f"features/{FEATURE}.json")["cells"]["together"]
    assert rows
    for split, name in (("select", "pearson_select"), ("test", "pearson")):
        codes = planted_codes[(cells["panel"] & (cells["split"] == split)).to_numpy()]
        for row in rows:
            r = np.corrcoef(codes[:, FEATURE], codes[:, row["feature_id"]])[0, 1]
            assert row[name] == pytest.approx(r, abs=1e-6)


def test_the_map_has_the_panels_cells_and_their_codes(
    resources: Resources, cells: pl.DataFrame, planted_codes: np.ndarray, decode: Callable[[bytes], pl.DataFrame]
) -> None:
    on_map, names, codes = (
        decode(resources.get(path).body) for path in ("cells.cols", "cell_names.cols", f"codes/{FEATURE}.cols")
    )
    panel = cells.filter("panel")
    assert on_map["cell_idx"].to_list() == panel["cell_idx"].to_list()
    assert on_map["batch"].to_list() == panel["batch"].to_list()
    assert names["cell_id"].to_list() == panel["cell_id"].to_list()
    value = np.zeros(120, np.float32)
    value[codes["place"].to_numpy()] = codes["value"].to_numpy()
    assert value.tolist() == planted_codes[panel["cell_idx"].to_numpy(), FEATURE].tolist()


def test_a_cell_has_all_its_codes_or_its_largest(
    resources: Resources, cells: pl.DataFrame, planted_codes: np.ndarray
) -> None:
    page = found(resources, "cell_features/0.json")
    assert (page["panel"], page["keep"]) == (cells["panel"].to_list(), 16)
    for cell in range(400):
        code = planted_codes[cell]
        largest = np.lexsort((np.arange(120), -code))[: np.count_nonzero(code)]
        kept = largest if page["panel"][cell] else largest[:16]
        others = planted_codes[[other for other in np.flatnonzero(page["panel"]) if other != cell]]
        share = {f: np.mean(others[:, f] < code[f]) + np.mean(others[:, f] == code[f]) / 2 for f in kept.tolist()}
        assert page["n_active"][cell] == len(kept)
        assert page["feature_id"][cell] == sorted(share, key=lambda f: (-share[f], -code[f], f))[:20]


def test_where_the_panel_is_all_cells_no_resource_names_it(atlas_store: FeatureStore) -> None:
    every = Resources(atlas_store)
    assert found(every, "atlas.json")["panel"] is None
    assert "panel" not in found(every, "run.json")["data"]
    assert not {"panel", "keep"} & set(found(every, "cell_features/0.json"))


def test_every_page_says_that_its_figures_are_of_the_panel(
    open_page: Open, panel_atlas: FeatureStore, serving: Callable[[FeatureStore], str]
) -> None:
    address = serving(panel_atlas)
    for where in PAGES:
        page = open_page(where, address=address)
        page.wait_for_function("document.querySelector('main').innerText.includes('120 of 400 cells')")
        if where.startswith("#/feature"):
            assert "Of all 400 cells, in the panel or not" in page.locator("main").inner_text()


def test_the_page_of_a_cell_outside_the_panel_says_that_its_largest_codes_are_kept(
    open_page: Open, panel_atlas: FeatureStore, serving: Callable[[FeatureStore], str], cells: pl.DataFrame
) -> None:
    page = open_page("#/search", address=serving(panel_atlas))
    outside, inside = (cells.filter(panel=is_in)["cell_id"][0] for is_in in (False, True))
    for name, said in ((outside, "only its 16 largest codes are kept"), (inside, "All its codes are kept")):
        page.get_by_role("combobox", name="Search genes").fill(name)
        page.wait_for_function("(said) => document.querySelector('.found').innerText.includes(said)", arg=said)
        assert page.locator(".found .rank-bar").count() > 10


@pytest.mark.slow
def test_no_page_names_the_panel_where_it_is_all_cells(open_page: Open) -> None:
    for where in (*PAGES, "#/search?kind=cell&q=AC0001-1"):
        page = open_page(where)
        if where.startswith("#/search"):
            page.wait_for_selector(".found .rank-bar")
        assert "panel" not in page.locator("main").inner_text()
