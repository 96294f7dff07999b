"""The page of steering: its figures are those of the store, its words do not say more than its nulls allow."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pytest
from printed_commands import refusal

from feature_store.associations.claims import too_few_draws
from feature_store.atlas.resources import Resources
from feature_store.storage import commit

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Page

    from feature_store import FeatureStore

Open = "Callable[..., Page]"
RUN, CHOSEN, HERE = "57ee4", 5, "#/steering/57ee4"
"""The planted run, and the variant of its chosen point."""


def json_of(store: FeatureStore, path: str) -> dict[str, Any]:
    found = Resources(store).get(path)
    assert found is not None
    document: dict[str, Any] = json.loads(found.body)
    return document


@pytest.fixture(name="columns_of")
def _columns_of(decode: Callable[[bytes], pl.DataFrame]) -> Callable[[FeatureStore, str], pl.DataFrame]:
    def read(store: FeatureStore, path: str) -> pl.DataFrame:
        found = Resources(store).get(path)
        assert found is not None
        return decode(found.body)

    return read


def on_map(store: FeatureStore, variant: int) -> pl.DataFrame:
    return store.frame("steering_map").filter(pl.col("variant") == variant).sort("cell_idx").collect()


def rewritten(store: FeatureStore, table: str, change: Callable[[pl.DataFrame], pl.DataFrame], **plan: Any) -> None:
    """Write the planted table anew, changed."""
    folder = store.layout.steering_dir(RUN) / table
    old = commit.Run.open(folder)
    frame = change(commit.read_table(folder))
    for file in folder.iterdir():
        file.unlink()
    commit.write_table(folder, frame, {**old.plan, **plan})


def verdict(page: Page) -> str:
    return page.locator(".verdict").inner_text()


# the resources


def test_a_run_is_listed_with_its_question_its_points_and_its_headline(atlas_store: FeatureStore) -> None:
    (run,) = json_of(atlas_store, "steering.json")["runs"]
    of_test = atlas_store.frame("steering").filter(pl.col("split") == "test", pl.col("role") == "grid").collect()
    points = of_test.select("n_features", "dose").unique().sort("n_features", "dose").to_dicts()
    assert (run["run"], run["words"], run["points"]) == (RUN, "Move stim cells toward ctrl", points)
    assert (run["chosen"], run["headline"]) == ({"n_features": 10, "dose": 1.0}, "remaining")
    best = of_test.filter("chosen", metric="remaining", group="all")
    assert {name: run["at_chosen"][name] for name in ("value", "effect", "low")} == best.select(
        "value", "effect", "low"
    ).row(0, named=True)


def test_every_figure_of_test_cells_is_given_unrounded(atlas_store: FeatureStore) -> None:
    rows = json_of(atlas_store, f"steering/{RUN}.json")["rows"]
    stored = atlas_store.frame("steering").filter(pl.col("split") == "test").collect()
    given = pl.DataFrame({name: rows[name] for name in rows}, schema={name: stored.schema[name] for name in rows})
    assert given.equals(stored.select(given.columns))
    assert {"p_random_features", "p_random_direction", "p_shuffled_labels"} < set(given.columns)


def test_features_come_best_first_with_their_names_and_scores(atlas_store: FeatureStore) -> None:
    features = json_of(atlas_store, f"steering/{RUN}.json")["features"]
    known = atlas_store.frame("features").select("feature_id", "top_genes", "class")
    scores = atlas_store.frame("steering_scores").select("feature_id", "score")
    wanted = known.join(scores, on="feature_id").filter(pl.col("feature_id").is_between(2, 11)).sort("feature_id")
    assert [{name: one[name] for name in ("feature_id", "top_genes", "class", "score")} for one in features] == (
        wanted.collect().to_dicts()
    )


def test_nulls_are_named_with_their_draws_and_their_column_of_p(atlas_store: FeatureStore) -> None:
    document = json_of(atlas_store, f"steering/{RUN}.json")
    assert [(one["name"], one["n_draws"]) for one in document["nulls"]] == [
        (name, 5) for name in ("random features", "random direction", "shuffled labels")
    ]
    assert all(one["p"] in document["rows"] for one in document["nulls"])
    assert {(one["least_p"], one["too_few"]) for one in document["nulls"]} == {
        (1 / 6, "with 5 draws of each, p is 0.17 at best")
    }


def test_the_command_for_another_point_asks_the_same_question(store_without: Callable[..., FeatureStore]) -> None:
    store = store_without()
    odd = "$(touch x) 'stim'"
    rewritten(store, "results", lambda frame: frame, target=odd, cells=["cell_type=NK, bright"])
    words = shlex.split(json_of(store, f"steering/{RUN}.json")["command"])
    given = dict(zip(words[2::2], words[3::2], strict=True))
    assert words[:2] == ["scsae", "steer"]
    assert refusal(shlex.join(words)) is None
    assert given == {
        "--store": str(store.layout.root), "--associations": "a550c", "--kind": "condition", "--target": odd,
        "--toward": "ctrl", "--intervention": "shift", "--by": "cell_type", "--cells": "cell_type=NK, bright",
    }  # fmt: skip


def test_cells_on_the_map_carry_their_labels_and_their_places_before(
    atlas_store: FeatureStore, columns_of: Callable[[FeatureStore, str], pl.DataFrame]
) -> None:
    cells = columns_of(atlas_store, f"steering/{RUN}/map.cols")
    stored = on_map(atlas_store, 0)
    assert cells["cell_idx"].to_list() == stored["cell_idx"].to_list()
    for name in ("pc1", "pc2", "x", "y"):
        assert cells[name].to_list() == stored[name].to_list()
    table = atlas_store.frame("cells").select("cell_idx", label="condition", cell_type="cell_type").collect()
    own = cells.select("cell_idx").join(table, on="cell_idx", how="left", maintain_order="left")
    assert cells["label"].to_list() == own["label"].to_list()
    assert cells["cell_type"].to_list() == own["cell_type"].to_list()


def test_places_of_a_variant_are_in_the_order_of_the_cells(
    atlas_store: FeatureStore, columns_of: Callable[[FeatureStore, str], pl.DataFrame]
) -> None:
    after, stored = columns_of(atlas_store, f"steering/{RUN}/variants/{CHOSEN}.cols"), on_map(atlas_store, CHOSEN)
    assert after.height == stored.height
    for name in ("pc1", "pc2", "x", "y"):
        assert after[name].to_list() == stored[name].to_list()


def test_a_cell_that_a_variant_leaves_alone_lies_where_it_did(
    store_without: Callable[..., FeatureStore], columns_of: Callable[[FeatureStore, str], pl.DataFrame]
) -> None:
    store = store_without()
    rewritten(store, "map", lambda frame: frame.filter((pl.col("variant") == 0) | (pl.col("cell_idx") % 2 == 0)))
    cells = columns_of(store, f"steering/{RUN}/map.cols")
    after = columns_of(store, f"steering/{RUN}/variants/{CHOSEN}.cols")
    is_even = cells["cell_idx"] % 2 == 0
    assert cells["moved"].to_list() == is_even.to_list()
    assert after.filter(~is_even)["pc1"].to_list() == cells.filter(~is_even)["pc1"].to_list()
    assert after.filter(is_even)["pc1"].to_list() == on_map(store, CHOSEN)["pc1"].to_list()


def test_bounds_hold_every_cell_under_every_point_of_the_grid(atlas_store: FeatureStore) -> None:
    about = json_of(atlas_store, f"steering/{RUN}.json")["map"]
    rows = atlas_store.frame("steering_map").filter(pl.col("variant") <= 6).collect()
    for name, x, y in (("pca", "pc1", "pc2"), ("umap", "x", "y")):
        assert about["bounds"][name] == [rows[x].min(), rows[x].max(), rows[y].min(), rows[y].max()]
    assert about["n_cells"] == rows["cell_idx"].n_unique()


def test_all_resources_of_steering_that_are_listed_can_be_made_and_no_others(atlas_store: FeatureStore) -> None:
    resources = Resources(atlas_store)
    paths = [path for path in resources.paths() if path.startswith("steering")]
    assert len(paths) == len(set(paths)) == 3 + atlas_store.frame("steering_variants").collect().height
    assert all(resources.get(path) is not None for path in paths)
    for path in ("nothing.json", "nothing/map.cols", f"{RUN}/variants/999.cols", f"{RUN}/variants/x.cols"):
        assert resources.get(f"steering/{path}") is None


def test_a_store_without_steering_or_its_maps_says_what_makes_them(store_without: Callable[..., FeatureStore]) -> None:
    store = store_without(f"steering/{RUN}/map")
    assert json_of(store, f"steering/{RUN}.json")["map"]["missing"]["command"].startswith("scsae serve")
    assert Resources(store).get(f"steering/{RUN}/map.cols") is None
    assert not any(path.endswith(".cols") for path in Resources(store).paths() if path.startswith("steering"))


# the page


def test_the_verdict_says_which_nulls_are_beaten_and_which_not(open_page: Open) -> None:
    said = verdict(open_page(HERE))
    assert "falls from 1 to 0.6 (-0.4, 95 % interval -0.45 to -0.35; 48 test cells). Lower is better." in said
    assert "does not beat all its nulls: not shuffled labels (p 0.190)" in said
    assert "it beats random features (p 0.048) and random direction (p 0.048)" in said


def test_the_verdict_claims_no_more_than_the_nulls_allow(open_page: Open, atlas_store: FeatureStore) -> None:
    page, document = open_page(HERE), json_of(atlas_store, f"steering/{RUN}.json")
    rows = document["rows"]
    (own,) = (
        i
        for i, metric in enumerate(rows["metric"])
        if (metric, rows["group"][i], rows["chosen"][i]) == ("remaining", "all", True)
    )
    for draws, ps, effect, kind, says in (
        (20, (0.0476, 0.0476, 0.0476), -0.4, "beats", "It beats its nulls"),
        (20, (0.3, 0.6, 0.9), -0.4, "fails", "It does not beat its nulls"),
        (20, (0.0476, 0.6, 0.9), -0.4, "fails", "It does not beat all its nulls"),
        (
            5,
            (1 / 6, 1 / 6, 0.5),
            -0.4,
            "",
            "It cannot be said that it beats its nulls: with 5 draws of each, p is 0.17 at best",
        ),
        (5, (0.5, 0.5, 0.5), -0.4, "fails", "It cannot be said that it beats its nulls"),
        (20, (0.0476, 0.0476, 0.0476), 0.2, "fails", "The change is for the worse"),
        (20, (1.0, 1.0, 1.0), 0.0, "fails", "Nothing changed"),
        (20, (None, None, None), -0.4, "", "No null was measured"),
    ):
        rows["effect"][own] = effect
        for null, p in zip(document["nulls"], ps, strict=True):
            null |= {"n_draws": draws, "least_p": 1 / (draws + 1), "too_few": too_few_draws(draws)}
            rows[null["p"]][own] = p
        found = page.evaluate(
            """async (about) => {
              const run = new (await import("./static/js/steering_run.js")).Run(about);
              return run.verdict(run.metric("remaining"), "all", run.point());
            }""",
            document,
        )
        assert (found["kind"], says in " ".join(found["lines"])) == (kind, True), found


def test_the_verdict_is_not_green_where_a_baseline_does_better_or_another_metric_became_worse(
    open_page: Open, atlas_store: FeatureStore
) -> None:
    page, document = open_page(HERE), json_of(atlas_store, f"steering/{RUN}.json")
    rows = document["rows"]

    def place(metric: str, **wanted: object) -> int:
        (found,) = (
            i
            for i, name in enumerate(rows["metric"])
            if (name, rows["group"][i]) == (metric, "all") and all(rows[key][i] == to for key, to in wanted.items())
        )
        return found

    own, rival = place("remaining", chosen=True), place("remaining", role="baseline")
    accuracy = place("type_accuracy", chosen=True)
    for null in document["nulls"]:
        null |= {"n_draws": 20, "least_p": 1 / 21, "too_few": None}
        rows[null["p"]][own] = 0.0476

    def found() -> tuple[str, str]:
        said = page.evaluate(
            """async (about) => {
              const run = new (await import("./static/js/steering_run.js")).Run(about);
              return run.verdict(run.metric("remaining"), "all", run.point());
            }""",
            document,
        )
        return said["kind"], " ".join(said["lines"])

    assert found()[0] == "beats"
    rows["value"][rival] = 0.2
    kind, words = found()
    assert kind == ""
    assert "It beats its nulls" in words
    assert "Mean difference, which needs no features, does better: 0.2." in words
    rows["value"][rival] = 0.7
    rows["value"][accuracy], rows["effect"][accuracy] = 0.7, -0.2
    rows["low"][accuracy], rows["high"][accuracy] = -0.3, -0.1
    kind, words = found()
    assert kind == ""
    assert "What became worse:" in words
    assert "(0.9 to 0.7)" in words


def test_the_dose_slider_moves_by_keyboard_along_what_was_computed(open_page: Open) -> None:
    page = open_page(HERE)
    slider = page.get_by_label("Dose", exact=True)
    assert (slider.get_attribute("aria-valuetext"), slider.get_attribute("max")) == ("1, chosen on select cells", "2")
    assert page.locator(".stop.chosen").all_inner_texts() == ["10", "1"]
    slider.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("location.hash.includes('dose=1.5')")
    assert slider.get_attribute("aria-valuetext") == "1.5"
    assert "from 1 to 0.8" in verdict(page)
    assert "has no p" in verdict(page)
    assert slider.evaluate("node => node === document.activeElement")
    page.wait_for_function("document.querySelectorAll('.maps figcaption')[1].textContent.includes('dose 1.5')")
    page.get_by_role("button", name="Back to the chosen point").click()
    page.wait_for_function("!location.hash.includes('dose')")
    assert "from 1 to 0.6" in verdict(page)


def test_a_link_opens_the_same_view_and_back_returns(open_page: Open) -> None:
    page = open_page(f"{HERE}?n=5&dose=0.5&metric=type_accuracy&map=umap&colour=cell_type")
    assert page.get_by_role("slider", name="Features edited").get_attribute("aria-valuetext") == "5"
    assert page.get_by_label("Dose", exact=True).get_attribute("aria-valuetext") == "0.5"
    assert "At 5 features, dose 0.5, the kNN accuracy" in verdict(page)
    assert page.get_by_role("button", name="UMAP").get_attribute("aria-pressed") == "true"
    assert "UMAP" in page.locator(".map-note").first.inner_text()
    before = page.url
    page.locator("select[name=metric]").select_option("remaining")
    page.wait_for_function("document.querySelector('.verdict').textContent.includes('share of the distance')")
    page.go_back()
    page.wait_for_function("document.querySelector('.verdict').textContent.includes('kNN accuracy')")
    assert page.url == before


def test_dots_of_both_maps_lie_where_the_store_has_them_and_share_their_axes(
    open_page: Open, atlas_store: FeatureStore
) -> None:
    page = open_page(HERE)
    page.wait_for_function("document.querySelectorAll('.steer-map .scatter[data-frames]').length === 2")
    maps = page.evaluate(
        "[...document.querySelectorAll('.steer-map .scatter')].map(({scatter: s}) => ({xs: [...s.xs], ys: [...s.ys], "
        "bounds: s.bounds}))"
    )
    for found, variant in zip(maps, (0, CHOSEN), strict=True):
        stored = on_map(atlas_store, variant)
        np.testing.assert_array_equal(np.float32(found["xs"]), stored["pc1"].to_numpy())
        np.testing.assert_array_equal(np.float32(found["ys"]), stored["pc2"].to_numpy())
    assert maps[0]["bounds"] == maps[1]["bounds"]
    page.get_by_role("button", name="UMAP").click()
    page.wait_for_function("document.querySelector('.steer-map .scatter').scatter.axes.x === 'UMAP 1'")
    after = page.evaluate("[...document.querySelectorAll('.steer-map .scatter')[1].scatter.ys]")
    np.testing.assert_array_equal(np.float32(after), on_map(atlas_store, CHOSEN)["y"].to_numpy())


def test_arrows_run_between_the_means_of_the_types_that_were_moved(open_page: Open, atlas_store: FeatureStore) -> None:
    page = open_page(HERE)
    page.wait_for_selector(".steer-map .overlay .arrow", state="attached")
    drawn = page.evaluate("document.querySelectorAll('.steer-map .scatter')[1].scatter.arrows")
    types = atlas_store.frame("cells").select("cell_idx", "cell_type").collect()
    for arrow in drawn:
        for end, variant in (("from", 0), ("to", CHOSEN)):
            own = on_map(atlas_store, variant).join(types.filter(cell_type=arrow["name"]), on="cell_idx")
            np.testing.assert_allclose(arrow[end], own.select("pc1", "pc2").mean().row(0), rtol=1e-5, atol=1e-6)
    assert {arrow["name"] for arrow in drawn} == set(types["cell_type"])


def test_the_metric_table_gives_the_point_and_its_nulls(open_page: Open) -> None:
    page = open_page(HERE)
    rows = [row.split("\t") for row in page.locator(".metric-table tbody tr").all_inner_texts()]
    first = [" ".join(cell.split()) for cell in rows[0]]
    assert first[:5] == ["share of the distance that remains", "lower", "1", "0.6", "-0.4 (-0.45 to -0.35)"]
    assert first[5:] == [
        "0 (-0.05 to 0.05)", "0.048", "-0.01 (-0.06 to 0.04)", "0.048", "-0.02 (-0.07 to 0.03)", "0.190",
    ]  # fmt: skip
    page.locator(".metric-table").get_by_role("link", name="kNN accuracy of the steered cells' types").click()
    page.wait_for_function("location.hash.includes('metric=type_accuracy')")
    assert "kNN accuracy" in verdict(page)


def test_what_was_not_measured_comes_with_its_command(open_page: Open) -> None:
    page = open_page(f"{HERE}?dose=1.5")
    text = page.locator("section", has_text="What was not measured").last.inner_text()
    assert "measured at dose 0.5, 1, 1.5" in text
    assert "--n-features 10 --dose 2.25 --n-nulls 20" in text
    commands = [code for code in page.locator("section code").all_inner_texts() if code.startswith("scsae ")]
    assert commands
    for command in commands:
        assert refusal(command) is None


def test_a_hostile_cell_type_is_text(open_page: Open, hostile: str) -> None:
    page = open_page(f"{HERE}?metric=distance&colour=cell_type")
    page.locator("select[name=group]").select_option(hostile)
    page.wait_for_function("location.hash.includes('group=')")
    assert "from 2 to 1.1" in verdict(page)
    assert hostile in page.locator(".metric-table h2").inner_text()
    page.wait_for_selector(".steer-key .legend")
    assert hostile in page.locator(".steer-key").inner_text()
    assert hostile in (page.locator(".chart text").evaluate_all("nodes => nodes.map(n => n.textContent).join(' ')"))
    assert page.locator("img[src=x]").count() == 0


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_no_wider_than_the_window(open_page: Open, width: int) -> None:
    page = open_page(f"{HERE}?map=umap", width=width, height=844, dark=True)
    page.wait_for_selector(".steer-map .scatter[data-frames]")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".page-steering select:visible, .page-steering input:visible").evaluate_all(
        "nodes => nodes.every(n => n.labels.length > 0 || n.getAttribute('aria-label'))"
    )


def test_a_store_without_steering_names_the_command(
    open_page: Open, serving: Callable[[FeatureStore], str], store_without: Callable[..., FeatureStore]
) -> None:
    store = store_without("steering")
    assert json_of(store, "steering.json")["missing"]["table"] == "steering"
    page = open_page("#/steering", address=serving(store))
    assert "scsae steer --store" in page.locator(".empty").inner_text()


def test_a_run_whose_cells_are_not_laid_out_keeps_its_figures(
    open_page: Open, serving: Callable[[FeatureStore], str], store_without: Callable[..., FeatureStore]
) -> None:
    page = open_page("#/steering", address=serving(store_without(f"steering/{RUN}/map")))
    assert "scsae serve --store" in page.locator(".empty").inner_text()
    assert "falls from 1 to 0.6" in verdict(page)


def test_the_curves_and_the_forest_are_of_the_store(open_page: Open, atlas_store: FeatureStore) -> None:
    page = open_page(f"{HERE}?dose=1.5")
    rows = atlas_store.frame("steering").filter(metric="remaining", group="all", split="test").collect()
    by_dose = rows.filter(role="grid", n_features=10).sort("dose").select("value", "dose").rows()
    label = page.locator(".curves svg").first.get_attribute("aria-label") or ""
    assert label.endswith(", ".join(f"{value:.3g} at {dose:g}" for value, dose in by_dose))
    assert page.locator(".curves svg").first.locator(".ring").count() == 1
    # the other curve is at a dose where no null was drawn
    assert page.locator(".curves svg .of-null").count() == 3
    forest = page.locator("section", has_text="Comparison with nulls and baselines").last.locator("svg").first
    label = forest.get_attribute("aria-label") or ""
    beside = rows.filter(pl.col("role").is_in(["reconstruction", "baseline", "null"]))
    for condition, effect in beside.select("condition", "effect").rows():
        assert f"{condition} " in label
        assert f" {effect:.3g}" in label
    assert "10 features, dose 1 -0.4, 10 features, dose 1.5 -0.2" in label
    assert forest.locator(".is-now").count() == 1
