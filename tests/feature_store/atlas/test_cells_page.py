"""The page of the cells: groups of cells compared against scipy and the tables, and its map in a browser."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pytest
from matplotlib.path import Path as Polygon
from sampled import WINDOWS
from scipy import sparse
from scipy.stats import false_discovery_control, mannwhitneyu

from feature_store import FeatureStore
from feature_store.atlas.pages import selections
from feature_store.atlas.resources import Resources
from feature_store.cells.expression import panel_digest
from feature_store.query.expression import expression_of
from feature_store.storage import commit
from feature_store.storage.plans import ExpressionPlan

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Page

SQUARE = "p-20_-20_20_-20_20_0_-20_0"
"""A group: the lower half of the map."""


@pytest.fixture(scope="module")
def resources(atlas_store: FeatureStore) -> Resources:
    return Resources(atlas_store)


def compared(resources: Resources, a: str, b: str = "rest") -> Any:
    found = resources.get(f"selections/{a}/{b}.json")
    assert found is not None, (a, b)
    return json.loads(found.body)


def label(resources: Resources, name: str, kind: str = "cell_type") -> str:
    return f"l{resources.data.labels.rows().index((kind, name))}"


def test_a_group_of_a_label_has_the_features_whose_codes_a_rank_test_tells_apart(
    resources: Resources, atlas_store: FeatureStore, planted_codes: np.ndarray
) -> None:
    found = compared(resources, label(resources, "B"))
    cells = atlas_store.frame("cells").sort("cell_idx").collect()
    is_b = (cells["cell_type"] == "B").to_numpy()
    of = {split: (cells["split"] == split).to_numpy() for split in ("select", "test")}
    assert found["n"] == {
        split: {"a": int((is_b & mask).sum()), "b": int((~is_b & mask).sum())} for split, mask in of.items()
    }
    assert (found["unit"], found["n_both"]) == ("donor", 0)
    rows = {row["feature_id"]: row for side in "ab" for row in found["features"][side]["rows"]}
    assert len(rows) > 10
    for feature, row in rows.items():
        code, test = planted_codes[:, feature], of["test"]
        u = mannwhitneyu(code[test & is_b], code[test & ~is_b]).statistic
        assert row["auroc"] == pytest.approx(u / (is_b & test).sum() / (~is_b & test).sum())
        assert row["q"] <= 0.05
        # of each of the two donors with B cells
        assert row["n_donors"] == 2
    # what was planted in B cells is stronger in them
    assert {f % 4 for f in (row["feature_id"] for row in found["features"]["a"]["rows"])} == {0}
    assert found["features"]["n_tested"] == planted_codes.shape[1]


def test_a_group_of_chance_has_hardly_any_feature(resources: Resources) -> None:
    """The lower half of cells that are shuffled over the map: nothing distinguishes them."""
    cells = resources.data.cells
    shuffled = Resources(resources.data.store)
    order = np.random.default_rng(3).permutation(cells.height)
    shuffled.data.cells = cells.with_columns(x=cells["x"].gather(order), y=cells["y"].gather(order))
    found = compared(shuffled, SQUARE)
    assert found["features"]["a"]["n"] + found["features"]["b"]["n"] <= 2


def test_a_polygon_holds_the_cells_that_matplotlib_finds_in_it(rng: np.random.Generator) -> None:
    points = rng.normal(size=(2000, 2)).astype(np.float32)
    corners = rng.normal(size=(9, 2))
    inside = selections.is_inside(points[:, 0], points[:, 1], corners)
    closed = Polygon(np.vstack([corners, corners[:1]]), closed=True)
    crossings = np.array([odd_crossings(point, corners) for point in points.astype(np.float64)])
    assert (inside == crossings).all()
    convex = np.array([[-1, -1], [1, -1], [1.5, 0.3], [0, 1.2], [-1.2, 0.4]])
    found = selections.is_inside(points[:, 0], points[:, 1], convex)
    assert (found == Polygon(np.vstack([convex, convex[:1]]), closed=True).contains_points(points)).all()
    assert closed.vertices.shape == (10, 2)


def odd_crossings(point: np.ndarray, corners: np.ndarray) -> bool:
    """Whether a ray to the right crosses the sides of a polygon an odd number of times."""
    n = 0
    for a, b in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        low, high = sorted((a, b), key=lambda corner: corner[1])
        if low[1] <= point[1] < high[1]:
            share = (point[1] - low[1]) / (high[1] - low[1])
            n += low[0] + share * (high[0] - low[0]) > point[0]
    return n % 2 == 1


def test_two_groups_leave_out_other_cells_and_cells_of_both_belong_to_the_first(
    resources: Resources, atlas_store: FeatureStore
) -> None:
    found = compared(resources, label(resources, "B"), label(resources, "T"))
    assert found["n"]["test"] == {"a": 24, "b": 24}
    both = compared(resources, label(resources, "B"), label(resources, "stim", "condition"))
    cells = atlas_store.frame("cells").filter(pl.col("split").is_in(["select", "test"])).collect()
    assert both["n_both"] == cells.filter(cell_type="B", condition="stim").height
    assert both["n"]["test"]["a"] == 24


@pytest.mark.parametrize("name", ["l999", "p1_2_3", "p1_2_3_4_5_nan", "x", "rest", "p" + "1_" * 201])
def test_a_group_that_is_none_has_no_resource(resources: Resources, name: str) -> None:
    assert resources.get(f"selections/{name}/rest.json") is None


def test_too_small_a_group_is_said_and_not_tested(resources: Resources) -> None:
    found = compared(resources, "p0_0_0.001_0_0_0.001")
    assert found["too_few"]
    assert "features" not in found


def test_more_cells_than_are_compared_are_drawn_once_and_counted(
    atlas_store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selections, "MOST_CELLS", 120)
    found = [compared(Resources(atlas_store), "l2") for _ in range(2)]
    assert found[0] == found[1]
    assert (found[0]["n_compared"], found[0]["n_all"]) == (120, 192)


@pytest.fixture(scope="module")
def with_expression(atlas_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureStore, np.ndarray]:
    """The planted store with the expression of its 40 genes, of which gene 0 is high in B cells."""
    import shutil

    root = shutil.copytree(atlas_root, tmp_path_factory.mktemp("expressed") / "store")
    store = FeatureStore.open(root)
    cells = store.frame("cells").sort("cell_idx").collect()
    rng = np.random.default_rng(4)
    values = rng.poisson(0.6, (cells.height, 40)).astype(np.float32)
    values[:, 0] += 3 * (cells["cell_type"] == "B").to_numpy()
    panel = np.arange(cells.height)
    plan = ExpressionPlan(
        dataset="toy", digest="0" * 64, matrix="X", value_kind="counts", panel=panel_digest(panel), n_cells=len(panel),
        n_genes=40, shard_cells=len(panel), bounds=(0, 16, 40),
    )  # fmt: skip
    by_gene = sparse.coo_array(sparse.csc_array(values))
    order = np.lexsort((by_gene.row, by_gene.col))
    table = pl.DataFrame(
        {
            "gene_idx": by_gene.col[order].astype(np.int32),
            "cell_idx": by_gene.row[order].astype(np.int64),
            "value": by_gene.data[order],
        }
    )
    run = commit.Run.create(store.layout.expression_dir("toy"), plan.table("expression", n_shards=1))
    run.commit_shard(0, lambda path: table.write_parquet(path) or table.height, start=0, stop=len(panel))
    run.finalize()
    return FeatureStore.open(root), values


def test_the_genes_of_a_group_are_ranked_and_corrected_over_all_genes(
    with_expression: tuple[FeatureStore, np.ndarray],
) -> None:
    store, values = with_expression
    resources = Resources(store)
    found = compared(resources, label(resources, "B"))
    (first, *_) = found["genes"]["a"]["rows"]
    assert (first["gene"], found["genes"]["n_tested"]) == ("GENE0", 40)
    cells = store.frame("cells").sort("cell_idx").collect()
    is_b, test = (cells["cell_type"] == "B").to_numpy(), (cells["split"] == "test").to_numpy()
    u = mannwhitneyu(values[test & is_b, 0], values[test & ~is_b, 0]).statistic
    assert first["auroc"] == pytest.approx(u / (test & is_b).sum() / (test & ~is_b).sum())
    assert found["genes"]["a"]["n"] + found["genes"]["b"]["n"] <= 3
    assert false_discovery_control([first["q"]])[0] <= 0.05


def test_a_gene_s_expression_on_the_map_is_that_of_the_store(
    with_expression: tuple[FeatureStore, np.ndarray], decode: Any
) -> None:
    store, values = with_expression
    resources = Resources(store)
    listed = json.loads(resources.get("expression.json").body)["genes"]
    for gene in (0, 17, 39):
        found = decode(resources.get(f"expression/{gene}.cols").body)
        dense = np.zeros(400, dtype=np.float32)
        dense[found["place"].to_numpy()] = found["value"].to_numpy()
        assert np.array_equal(dense, values[:, gene])
    expression = expression_of(store)
    assert expression is not None
    assert expression.symbols == listed
    assert np.array_equal(expression.matrix(np.array([7, 3])).toarray(), values[[7, 3]])
    with pytest.raises(KeyError):
        expression.of("nobody")


def test_a_store_without_expression_names_the_command(resources: Resources, atlas_store: FeatureStore) -> None:
    found = json.loads(resources.get("expression.json").body)
    assert found["missing"]["command"] == f"scsae associate --store {atlas_store.layout.root}"
    assert resources.get("expression/0.cols") is None
    assert compared(resources, "l2")["genes"] is None


def test_the_numbers_of_the_cells_are_their_columns_and_their_tokens(
    resources: Resources, atlas_store: FeatureStore, decode: Any
) -> None:
    names = [one["name"] for one in json.loads(resources.get("atlas.json").body)["measures"]]
    assert names == ["n_counts", "n_tokens"]
    found = decode(resources.get("measures/0.cols").body)["value"]
    assert found.to_list() == atlas_store.frame("cells").sort("cell_idx").collect()["n_counts"].to_list()
    assert resources.get("measures/2.cols") is None


@pytest.mark.parametrize(("width", "dark"), WINDOWS)
def test_the_page_of_the_cells_fits_its_window(open_page: Callable[..., Page], width: int, dark: bool) -> None:
    page = open_page(f"#/cells?a={SQUARE}", width=width, height=844, dark=dark)
    page.wait_for_function("document.querySelector('.scatter').dataset.shown === '400'")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert "choice made after looking" in page.locator(".cells-warning").inner_text()
    assert page.locator(".cells-told h3").count() == 2


def test_no_panel_of_the_cells_is_empty_before_a_group_is_chosen(open_page: Callable[..., Page]) -> None:
    page = open_page("#/cells")
    page.get_by_text("Choose a group of cells, and the features").wait_for()
    assert all(text.strip() for text in page.locator("section.panel").all_inner_texts())


def test_a_lasso_becomes_a_group_that_is_saved_with_its_ids(
    open_page: Callable[..., Page], atlas_store: FeatureStore
) -> None:
    page = open_page("#/cells")
    page.get_by_role("button", name="Lasso").click()
    box = page.locator(".dots").bounding_box()
    assert box is not None
    corners = [(0.02, 0.02), (0.98, 0.02), (0.98, 0.5), (0.02, 0.5)]
    page.mouse.move(box["x"] + corners[0][0] * box["width"], box["y"] + corners[0][1] * box["height"])
    page.mouse.down()
    for x, y in corners[1:]:
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=5)
    page.mouse.up()
    page.wait_for_function("location.hash.includes('a=p')")
    page.wait_for_selector(".cells-told")
    with page.expect_download() as caught:
        page.get_by_role("button", name="CSV of the groups").click()
    with Path(caught.value.path()).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    umap = atlas_store.frame("umap").collect()
    text = page.evaluate("new URLSearchParams(location.hash.split('?')[1]).get('a')")
    inside = Polygon(np.array(text[1:].split("_"), dtype=float).reshape(-1, 2)).contains_points(
        umap.select("x", "y").to_numpy()
    )
    chosen = umap.filter(inside)["cell_idx"].to_list()
    assert [int(row["cell_idx"]) for row in rows] == chosen
    assert {row["group"] for row in rows} == {"A"}
    with page.expect_download() as caught:
        page.get_by_role("button", name="Ids of A").click()
    ids = Path(caught.value.path()).read_text().split()
    assert ids == atlas_store.cells_at(pl.Series(chosen)).sort("cell_idx")["cell_id"].to_list()


def test_a_name_in_the_legend_becomes_a_group_and_is_compared_with_another(open_page: Callable[..., Page]) -> None:
    page = open_page("#/cells?color=label:cell_type")
    page.locator(".cells-key button", has_text=re.compile("^T")).click()
    page.wait_for_selector(".cells-told")
    page.get_by_role("radio", name="Group B").check()
    page.locator(".cells-key button", has_text="NK, bright").click()
    page.wait_for_function("/b=l/.test(location.hash)")
    page.wait_for_function("document.querySelector('.cells-result')?.textContent.includes('NK, bright')")
    page.get_by_role("button", name="Clear B").click()
    page.wait_for_function("!/b=l/.test(location.hash)")


def test_the_map_is_coloured_by_a_gene_a_feature_or_a_number(
    open_page: Callable[..., Page], serving: Any, with_expression: tuple[FeatureStore, np.ndarray]
) -> None:
    page = open_page("#/cells?color=measure:n_counts", address=serving(with_expression[0]))
    assert "n counts" in page.locator(".ramp-legend").inner_text()
    page.locator("select[name=color]").select_option("gene:")
    page.locator("input[name=of]").fill("gene0")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('.ramp-legend')?.textContent.startsWith('gene0')")
    zeros = int((with_expression[1][:, 0] == 0).sum())
    assert f"zero{zeros}" in page.locator(".cells-key").inner_text().replace("\n", "")
    page.locator("input[name=of]").fill("nobody")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('.controls [role=status]').textContent.includes('No gene')")
    page.locator("select[name=color]").select_option("feature:")
    page.locator("input[name=of]").fill("3")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('.ramp-legend')?.textContent.includes('code of feature 3')")


def test_groups_of_cells_whose_place_is_not_known_have_no_recipe_and_the_page_says_so(
    open_page: Callable[..., Page],
) -> None:
    page = open_page(f"#/cells?a={SQUARE}")
    page.get_by_role("button", name="Recipe of the groups").click()
    page.wait_for_selector(".found-save [role=status]:not(:empty)")
    assert "where its cells are" in page.locator(".found-save [role=status]").inner_text()
