"""The page of batch against biology: what it chooses is what the store holds, and what it exports is a recipe."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
import pytest
import yaml
from deleted_runs import forget_deleted
from matplotlib.path import Path as Polygon
from printed_commands import refusal

from feature_store import FeatureStore
from feature_store.atlas.resources import Resources
from feature_store.storage import commit

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Page

Open = "Callable[..., Page]"


def json_of(store: FeatureStore, path: str) -> dict:
    found = Resources(store).get(path)
    assert found is not None
    return json.loads(found.body)


def firing(store: FeatureStore) -> pl.DataFrame:
    return store.frame("features").filter(~pl.col("dead") & (pl.col("density") > 0)).collect()


def strongest_first(features: pl.DataFrame) -> list[int]:
    return features.sort("batch_effect", "feature_id", descending=[True, True])["feature_id"].to_list()


def listed(page: Page) -> list[int]:
    """Ids of the rows in sight."""
    return [int(text) for text in page.locator(".vt-row a").all_inner_texts()]


def wait_for_status(page: Page, text: str) -> None:
    page.wait_for_function("text => document.querySelector('.batch-list-head h2').textContent === text", arg=text)


def exported(page: Page) -> Path:
    with page.expect_download() as caught:
        page.get_by_role("button", name="Export as steering recipe").click()
    assert caught.value.suggested_filename == "batch-recipe.yaml"
    return Path(caught.value.path())


@pytest.fixture
def store_with_cells(atlas_root: Path, tmp_path: Path) -> Callable[..., FeatureStore]:
    """The planted store with other values in the columns of its cells."""

    def make(**columns: pl.Expr) -> FeatureStore:
        root = shutil.copytree(atlas_root, tmp_path / "other")
        cells = FeatureStore.open(atlas_root).frame("cells").collect().with_columns(**columns)
        shutil.rmtree(root / "cells" / "toy")
        commit.write_table(root / "cells" / "toy", cells, {"table": "cells", "dataset": "toy"})
        forget_deleted(root)
        return FeatureStore.open(root)

    return make


def test_the_batch_of_a_feature_is_chosen_on_select_and_its_figures_are_of_test(
    atlas_store: FeatureStore, decode: Callable[[bytes], pl.DataFrame]
) -> None:
    found = Resources(atlas_store).get("batch.cols")
    assert found is not None
    table = decode(found.body)
    rows = atlas_store.frame("feature_label").filter(pl.col("label_kind") == "batch").collect()
    assert table.height == 120
    for feature, row in enumerate(table.iter_rows(named=True)):
        own = rows.filter(feature_id=feature)
        if own.is_empty():
            assert row["batch"] is None
            continue
        select = own.filter(split="select").to_dicts()
        best = max(select, key=lambda one: abs(one["auroc"] - 0.5))
        test = own.filter(split="test", label=best["label"]).row(0, named=True)
        is_named = test["q"] is not None and test["q"] <= 0.05 and (test["auroc"] > 0.5) == (best["auroc"] > 0.5)
        assert (row["batch"], row["auroc_select"]) == (best["label"] if is_named else None, best["auroc"])
        assert (row["auroc"], row["q"]) == (test["auroc"], test["q"])


def test_of_two_mirrored_batches_the_one_is_named_in_which_the_feature_is_stronger(
    atlas_root: Path, tmp_path: Path, decode: Callable[[bytes], pl.DataFrame]
) -> None:
    root = shutil.copytree(atlas_root, tmp_path / "mirrored")
    labels = FeatureStore.open(root).frame("feature_label").collect()
    auroc = pl.when(pl.col("label") == "one").then(0.3).otherwise(0.7)
    plan = commit.Run.open(root / "associations" / "a550c" / "feature_label").plan
    shutil.rmtree(root / "associations" / "a550c" / "feature_label")
    commit.write_table(
        root / "associations" / "a550c" / "feature_label",
        labels.with_columns(auroc=pl.when(pl.col("label_kind") == "batch").then(auroc).otherwise("auroc")),
        plan,
    )
    found = Resources(FeatureStore.open(root)).get("batch.cols")
    assert found is not None
    assert decode(found.body)["batch"].drop_nulls().unique().to_list() == ['two "2"']


def test_batches_are_counted_by_split_and_half_of_what_fires_may_be_steered(atlas_store: FeatureStore) -> None:
    found = json_of(atlas_store, "batch.json")
    cells = atlas_store.frame("cells").collect()
    for row in found["batches"]:
        for split in ("train", "select", "test"):
            assert row[split] == cells.filter(batch=row["batch"], split=split).height
    assert [row["batch"] for row in found["batches"]] == sorted(cells["batch"].unique())
    assert (found["n_firing"], found["most"], found["n_in_both"]) == (119, 59, 2)
    assert (found["run"], found["threshold"]) == ("a550c", 0.1)


@pytest.mark.parametrize(
    ("query", "chosen"),
    [
        ("", (pl.col("batch_effect") >= 0.1) & (pl.col("context_effect") < 0.1)),
        ("?y=0.25&x=0.3", (pl.col("batch_effect") >= 0.25) & (pl.col("context_effect") < 0.3)),
        ("?quad=both", (pl.col("batch_effect") >= 0.1) & (pl.col("context_effect") >= 0.1)),
    ],
)
def test_an_address_chooses_the_features_of_its_quadrant_strongest_first(
    open_page: Open, atlas_store: FeatureStore, query: str, chosen: pl.Expr
) -> None:
    page = open_page(f"#/batch{query}")
    wanted = firing(atlas_store).filter(chosen)
    assert 0 < wanted.height < 100
    wait_for_status(page, f"{wanted.height} features chosen")
    assert listed(page)[:8] == strongest_first(wanted)[:8]
    assert page.locator(".scatter").get_attribute("data-shown") == "119"


def test_thresholds_move_with_the_keyboard_and_stay_in_the_address_and_back_returns(
    open_page: Open, atlas_store: FeatureStore
) -> None:
    page = open_page("#/batch")
    page.get_by_label("Explained by").select_option("both")
    page.wait_for_function("location.hash === '#/batch?quad=both'")
    page.get_by_label("Batch effect from, slider").focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("location.hash.includes('y=0.15')")
    wanted = firing(atlas_store).filter((pl.col("batch_effect") >= 0.15) & (pl.col("context_effect") >= 0.1))
    wait_for_status(page, f"{wanted.height} features chosen")
    assert page.locator("input[name=y]").input_value() == "0.15"
    page.go_back()
    page.wait_for_function("location.hash === '#/batch'")
    assert page.get_by_label("Explained by").input_value() == "batch"


def test_a_lasso_chooses_what_lies_within_it_and_an_address_draws_it_again(
    open_page: Open, atlas_store: FeatureStore
) -> None:
    page = open_page("#/batch")
    box = page.locator(".dots").bounding_box()
    assert box is not None
    corners = [(0.2, 0.2), (0.6, 0.15), (0.7, 0.7), (0.3, 0.8)]
    page.keyboard.down("Shift")
    for i, (x, y) in enumerate(corners):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=5)
        if i == 0:
            page.mouse.down()
    page.mouse.up()
    page.keyboard.up("Shift")
    page.wait_for_function("location.hash.includes('lasso=')")
    drawn = page.evaluate("new URLSearchParams(location.hash.split('?')[1]).get('lasso')")
    polygon = Polygon([tuple(map(float, corner.split(","))) for corner in drawn.split(";")])
    features = firing(atlas_store)
    inside = features.filter(polygon.contains_points(features.select("context_effect", "batch_effect").to_numpy()))
    assert 5 < inside.height < 100
    wait_for_status(page, f"{inside.height} features in the lasso")
    again = open_page(page.url.split("/", 3)[3])
    wait_for_status(again, f"{inside.height} features in the lasso")
    assert listed(again) == listed(page)
    again.get_by_role("button", name="Clear lasso").click()
    again.wait_for_function("!location.hash.includes('lasso')")


def test_what_is_unchecked_by_mouse_or_keyboard_is_not_in_the_recipe(
    open_page: Open, atlas_store: FeatureStore
) -> None:
    page = open_page("#/batch")
    wanted = strongest_first(
        firing(atlas_store).filter((pl.col("batch_effect") >= 0.1) & (pl.col("context_effect") < 0.1))
    )
    page.get_by_label(f"Use feature {wanted[1]}", exact=True).uncheck()
    page.locator(".vt-scroll").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", " "):
        page.keyboard.press(key)
    left = [feature for i, feature in enumerate(wanted) if i not in (1, 2)]
    wait_for_status(page, f"{len(wanted)} features chosen, {len(left)} checked")
    assert yaml.safe_load(exported(page).read_text())["steer"][0]["feature"] == left
    page.get_by_role("button", name="Check all again").click()
    wait_for_status(page, f"{len(wanted)} features chosen")


def test_the_recipe_and_the_command_describe_the_same_run_whose_result_the_steering_page_shows(
    open_page: Open, atlas_store: FeatureStore, atlas_root: Path
) -> None:
    page = open_page("#/batch?y=0.2")
    page.get_by_label("Ablate:").focus()
    page.keyboard.press("ArrowDown")
    page.wait_for_function("location.hash.includes('how=shift')")
    assert page.evaluate("document.activeElement.value") == "shift"
    wanted = strongest_first(
        firing(atlas_store).filter((pl.col("batch_effect") >= 0.2) & (pl.col("context_effect") < 0.1))
    )
    (recipe,) = yaml.safe_load(exported(page).read_text())["steer"]
    assert recipe == {
        "associations": "a550c", "kind": "batch", "target": "all", "intervention": "shift", "feature": wanted,
    }  # fmt: skip
    words = shlex.split(page.locator(".batch-command").inner_text())
    assert words[:4] == ["scsae", "steer", "--store", str(atlas_root)]
    for code in page.locator(".batch-steer code").all_inner_texts():
        assert refusal(code) is None
    options = list(zip(words[4::2], words[5::2], strict=True))
    assert [int(value) for name, value in options if name == "--feature"] == wanted
    assert {name.removeprefix("--"): value for name, value in options if name != "--feature"} == {
        key: value for key, value in recipe.items() if key != "feature"
    }
    assert page.locator(".batch-steer a[href='#/steering']").count() == 1


def test_more_features_than_the_null_has_others_for_are_not_exported(open_page: Open) -> None:
    page = open_page("#/batch?y=0&x=1")
    wait_for_status(page, "119 features chosen")
    assert page.get_by_role("button", name="Export as steering recipe").is_disabled()
    assert "At most 59 of the 119" in page.locator(".batch-warning").inner_text()


def test_batches_of_one_split_cannot_be_shifted_and_the_page_says_so(
    store_with_cells: Callable[..., FeatureStore], serving: Callable[[FeatureStore], str], open_page: Open
) -> None:
    own = pl.when(pl.col("split") == "test").then(pl.concat_str(pl.lit("held out "), "batch")).otherwise("batch")
    page = open_page("#/batch?how=shift", address=serving(store_with_cells(batch=own)))
    assert page.locator("input[value=shift]").is_disabled()
    assert page.locator("input[value=ablate]").is_checked()
    assert "None of the test batches has train or select cells" in page.locator(".batch-steer").inner_text()


@pytest.mark.parametrize("values", [None, "only"])
def test_cells_of_no_or_one_batch_are_told_the_command(
    store_with_cells: Callable[..., FeatureStore],
    serving: Callable[[FeatureStore], str],
    open_page: Open,
    values: str | None,
) -> None:
    store = store_with_cells(batch=pl.lit(values, pl.String))
    page = open_page("#/batch", address=serving(store))
    assert "scsae extract DATA --batch COLUMN --store" in page.locator(".empty").inner_text()
    assert page.locator(".scatter").count() == 0


def test_without_associations_the_page_names_their_command(
    store_without: Callable[..., FeatureStore], serving: Callable[[FeatureStore], str], open_page: Open
) -> None:
    store = store_without("associations", "steering", "comparisons")
    assert json_of(store, "batch.json")["missing"]["table"] == "features"
    page = open_page("#/batch", address=serving(store))
    assert "scsae associate --store" in page.locator(".empty").inner_text()


def test_a_hostile_gene_is_text_and_a_phone_needs_no_scrolling_sideways(
    open_page: Open, atlas_store: FeatureStore, hostile: str
) -> None:
    planted = firing(atlas_store).filter(pl.col("top_genes").str.starts_with(hostile))
    page = open_page("#/batch?x=1&y=0&sort=-top_genes", width=390, height=844)
    first = planted["feature_id"].to_list()
    page.get_by_role("columnheader", name="genes").get_by_role("button").click()
    page.wait_for_function("location.hash.includes('sort=top_genes')")
    page.wait_for_selector(f"#row-{first[0]}")
    assert "<img" in page.locator(f"#row-{first[0]}").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
