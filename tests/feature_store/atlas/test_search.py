from __future__ import annotations

import json
import re
import shutil
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pytest
from token_codes import cut_of, toy_codes, write_codes
from toy_plans import toy_table

from feature_store import FeatureStore
from feature_store.atlas import ranking
from feature_store.atlas.pages import cells as cell_pages
from feature_store.atlas.resources import Resources
from feature_store.storage import commit
from feature_store.storage.layout import ASSOCIATION_TABLES, Layout
from feature_store.storage.plans import AssociationsPlan

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from playwright.sync_api import Page, Route

KINDS = {"label": ("labels", "label_features"), "gene": ("genes", "genes"), "gene_set": ("gene_sets", "gene_sets")}


@pytest.fixture(scope="module")
def resources(atlas_store: FeatureStore) -> Resources:
    return Resources(atlas_store)


def read(resources: Resources, path: str) -> Any:
    found = resources.get(path)
    assert found is not None
    assert found.media_type == "application/json"
    return json.loads(found.body)


def all_ranked(resources: Resources) -> list[tuple[str, str | None, str, Any]]:
    """Each asked, kind, name and what its resource says."""
    names = read(resources, "names.json")
    found = []
    for asked, (listed, folder) in KINDS.items():
        for i, row in enumerate(names[listed]):
            kind, name = row if isinstance(row, list) else (None, row)
            found.append((asked, kind, name, read(resources, f"{folder}/{i}.json")))
    return found


def assert_ranked_as_the_store_does(resources: Resources, store: FeatureStore, most: int) -> None:
    for asked, kind, name, found in all_ranked(resources):
        expected = store.features_for(**{asked: name, "kind": kind})
        assert found[asked] == name
        assert found["n"] == expected.height
        assert len(found["columns"]["feature_id"]) == min(most, expected.height)
        assert found["key"] in found["columns"]
        for column, values in found["columns"].items():
            assert values == expected[column].head(most).to_list()


def test_names_are_those_of_the_tables(resources: Resources, atlas_store: FeatureStore) -> None:
    names = read(resources, "names.json")
    sets = atlas_store.sql("SELECT DISTINCT collection, gene_set FROM feature_geneset ORDER BY collection, gene_set")
    labels = atlas_store.sql("SELECT DISTINCT label_kind, label FROM feature_label ORDER BY label_kind, label")
    genes = atlas_store.sql("SELECT DISTINCT gene FROM feature_gene ORDER BY gene")["gene"].to_list()
    assert names["gene_sets"] == [list(row) for row in sets.rows()]
    assert names["labels"] == [list(row) for row in labels.rows()]
    assert names["genes"] == genes
    assert names["quiet_genes"] == sorted(set(atlas_store.frame("genes").collect()["symbol"]) - set(genes))
    assert (names["n_cells"], names["missing"]) == (400, {})


def test_ranked_features_equal_those_of_the_store(resources: Resources, atlas_store: FeatureStore) -> None:
    assert_ranked_as_the_store_does(resources, atlas_store, ranking.MOST)


@pytest.mark.parametrize(("rows", "most"), [(100, 3), (700, 1), (10_000, 40)])
def test_ranges_of_features_together_rank_as_the_whole_table(
    atlas_store: FeatureStore, monkeypatch: pytest.MonkeyPatch, rows: int, most: int
) -> None:
    monkeypatch.setattr(ranking, "ROWS_AT_ONCE", rows)
    monkeypatch.setattr(ranking, "MOST", most)
    assert_ranked_as_the_store_does(Resources(atlas_store), atlas_store, most)


def test_a_table_without_splits_is_ranked_as_it_is(small_store: Any) -> None:
    store = FeatureStore.open(small_store.layout.root)
    resources = Resources(store)
    genes = read(resources, "names.json")["genes"]
    found = read(resources, f"genes/{genes.index('MS4A1')}.json")
    assert found["key"] == "pearson"
    assert found["columns"]["feature_id"] == store.features_for(gene="MS4A1")["feature_id"].to_list() == [5, 3]
    assert found["columns"]["pearson"] == [0.8, 0.2]


@pytest.fixture
def with_labels(small_store: Any) -> Callable[[Callable[[pl.DataFrame], pl.DataFrame]], FeatureStore]:
    """The small store with associations whose table of labels was changed."""

    def make(change: Callable[[pl.DataFrame], pl.DataFrame]) -> FeatureStore:
        layout, old = small_store.layout, FeatureStore.open(small_store.layout.root)
        for name in ASSOCIATION_TABLES:
            frame = old.frame(name).collect()
            frame = change(frame) if name == "feature_label" else frame
            commit.write_table(
                layout.associations_dir("b550c") / name,
                frame,
                toy_table(AssociationsPlan, codes="c0de", dataset="toy", sae="5ae"),
            )
        return FeatureStore.open(layout.root, associations="b550c")

    return make


def test_a_name_of_two_kinds_has_its_own_features_in_each(with_labels: Any) -> None:
    batch = {"label_kind": pl.lit("batch"), "auroc": 1 - pl.col("auroc")}
    resources = Resources(with_labels(lambda labels: pl.concat([labels, labels.with_columns(**batch)])))
    assert read(resources, "names.json")["labels"] == [["batch", "B"], ["cell_type", "B"]]
    orders = [read(resources, f"label_features/{i}.json")["columns"]["feature_id"] for i in (0, 1)]
    assert orders == [[5, 3], [3, 5]]


@pytest.mark.parametrize(("split", "order"), [("select", [5, 3]), ("test", [5])])
def test_a_feature_without_a_figure_on_one_split_is_ranked_as_the_store_does(
    with_labels: Any, split: str, order: list[int]
) -> None:
    lost = (pl.col("feature_id") == 3) & (pl.col("split") == split)
    store = with_labels(lambda labels: labels.filter(~lost))
    found = read(Resources(store), "label_features/0.json")
    assert found["columns"]["feature_id"] == store.features_for(label="B")["feature_id"].to_list() == order
    assert found["columns"]["select_auroc"] == store.features_for(label="B")["select_auroc"].to_list()


def test_a_label_without_figures_of_test_cells_has_no_feature(with_labels: Any) -> None:
    found = read(Resources(with_labels(lambda labels: labels.filter(split="select"))), "label_features/0.json")
    assert (found["n"], found["columns"]["feature_id"]) == (0, [])


def test_what_fires_in_a_cell_equals_the_store(resources: Resources, atlas_store: FeatureStore) -> None:
    found = read(resources, "cell_features/0.json")
    cells = atlas_store.frame("cells").sort("cell_idx").collect()
    fires = atlas_store.sql("SELECT cell_idx, COUNT(*) AS n FROM codes GROUP BY cell_idx ORDER BY cell_idx")
    assert found["cell_id"] == cells["cell_id"].to_list()
    assert found["split"] == cells["split"].to_list()
    assert found["labels"]["cell_type"] == cells["cell_type"].to_list()
    assert found["n_active"] == fires["n"].to_list()
    for cell in (0, 7, 399):
        codes = dict(atlas_store.features_of(cell, 120).select("feature_id", "value").iter_rows())
        shown = found["feature_id"][cell]
        assert len(shown) == cell_pages.MOST
        assert np.array_equal(np.float32(found["value"][cell]), np.float32([codes[feature] for feature in shown]))


def test_a_cell_s_codes_are_ranked_by_their_percentile_among_other_cells(
    resources: Resources, planted_codes: np.ndarray
) -> None:
    found = read(resources, "cell_features/0.json")
    for cell in (0, 7, 399):
        code = planted_codes[cell]
        others = np.delete(planted_codes, cell, axis=0)
        share = {
            f: float(np.mean(others[:, f] < code[f]) + np.mean(others[:, f] == code[f]) / 2)
            for f in np.flatnonzero(code).tolist()
        }
        best = sorted(share, key=lambda f: (-share[f], -code[f], f))[: cell_pages.MOST]
        assert found["feature_id"][cell] == best
        assert found["percentile"][cell] == pytest.approx([share[f] for f in best])


def test_cells_are_told_in_chunks_that_follow_each_other(
    resources: Resources, atlas_store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read(resources, "cell_features/0.json")
    monkeypatch.setattr(cell_pages, "CELLS", 150)
    parts = [read(resources, f"cell_features/{i}.json") for i in range(3)]
    assert [part["first"] for part in parts] == [0, 150, 300]
    assert list(chain.from_iterable(part["feature_id"] for part in parts)) == whole["feature_id"]
    assert resources.get("cell_features/3.json") is None
    assert [path for path in resources.paths() if path.startswith("cell_f")] == [
        f"cell_features/{i}.json" for i in range(3)
    ]


def test_codes_of_tokens_are_pooled_to_cells(small_store: Any, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "tokens")
    commit.write_table(layout.cells_dir("toy"), small_store.cells, {"table": "cells", "dataset": "toy"})
    plan = toy_codes(cut_of(40, 40), n_features=12, dataset="toy", level="token", sae="5ae")
    write_codes(layout.codes_dir("c0de"), plan, [small_store.tokens], small_store.cells["split"].to_numpy())
    store = FeatureStore.open(layout.root)
    found = read(Resources(store), "cell_features/0.json")
    for cell in range(40):
        assert set(found["feature_id"][cell]) <= set(store.features_of(cell, 12)["feature_id"].to_list())
        assert found["n_active"][cell] == store.features_of(cell, 12).height


def test_ids_lie_in_sorted_chunks_with_the_first_of_each_in_the_index(
    resources: Resources, atlas_store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cell_pages, "IDS", 64)
    index = read(resources, "cell_ids/index.json")
    chunks = [read(resources, f"cell_ids/{i}.json") for i in range(len(index["first"]))]
    ids = list(chain.from_iterable(chunk["cell_id"] for chunk in chunks))
    cells = atlas_store.frame("cells").collect()
    assert (index["n"], index["size"], len(chunks)) == (400, 64, 7)
    assert [chunk["cell_id"][0] for chunk in chunks] == index["first"]
    assert ids == sorted(cells["cell_id"].to_list(), key=str.lower)
    numbers = list(chain.from_iterable(chunk["cell_idx"] for chunk in chunks))
    assert numbers == cells.sort("cell_id")["cell_idx"].to_list()
    assert resources.get("cell_ids/7.json") is None


def test_names_without_a_table_say_what_makes_it(store_without: Callable[..., FeatureStore]) -> None:
    resources = Resources(store_without("associations/a550c", "matches", "comparisons", "steering"))
    names = read(resources, "names.json")
    assert names["labels"] == names["genes"] == names["gene_sets"] == []
    assert names["missing"]["genes"]["table"] == "feature_gene"
    assert names["missing"]["genes"]["command"].startswith("scsae associate --store ")
    assert read(resources, "genes/0.json")["missing"]["table"] == "feature_gene"
    assert not any(path.startswith("genes/") for path in resources.paths())


def shown(page: Page, table: int = 0) -> list[int]:
    """Features in a table, in order: the one of those that go with the name, then that of those that change a gene."""
    body = page.locator(".found tbody").nth(table)
    return [int(text) for text in body.locator("tr td:first-child").all_inner_texts()]


def wait_for(page: Page, of: str) -> None:
    page.wait_for_function("of => document.querySelector('.found')?.dataset.of === of", arg=of)


def test_the_best_match_shows_its_features_while_one_types(
    open_page: Callable[..., Page], atlas_store: FeatureStore
) -> None:
    page = open_page("#/search")
    assert page.evaluate("document.activeElement.id") == "search-input"
    page.keyboard.type("cd79")
    wait_for(page, "gene/CD79A")
    expected = atlas_store.features_for(gene="CD79A")
    assert shown(page) == expected["feature_id"].to_list()
    row = page.locator(".found tbody tr").first.inner_text()
    assert f"{expected['pearson'][0]:.3f}" in row
    assert f"{expected['select_pearson'][0]:.3f}" in row
    changing = atlas_store.frame("feature_effect").filter(gene="CD79A").sort("p").collect()
    assert shown(page, 1) == changing["feature_id"].head(20).to_list()
    page.wait_for_url(re.compile(r"#/search\?q=cd79$"))


def test_arrows_and_enter_choose_and_back_comes_back_to_what_was_typed(
    open_page: Callable[..., Page], atlas_store: FeatureStore
) -> None:
    page = open_page("#/run")
    page.keyboard.press("/")
    page.wait_for_selector("#search-input")
    page.keyboard.type("set_")
    wait_for(page, "gene_set:toy/SET_0")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    wait_for(page, "gene_set:toy/SET_2")
    field = page.locator("#search-input")
    active = page.locator(f"#{field.get_attribute('aria-activedescendant')}")
    assert active.inner_text() == "SET_2"
    assert active.get_attribute("role") == "option"
    assert active.get_attribute("aria-selected") == "true"
    assert page.locator('[role=option][aria-selected="true"]').count() == 1
    assert (field.get_attribute("role"), field.get_attribute("aria-expanded")) == ("combobox", "true")
    assert page.locator(f"#{field.get_attribute('aria-controls')}").get_attribute("role") == "listbox"
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(r"q=SET_2&pick=gene_set%3Atoy$"))
    assert shown(page) == atlas_store.features_for(gene_set="SET_2")["feature_id"].to_list()
    page.go_back()
    page.wait_for_url(re.compile(r"#/search\?q=set_$"))
    assert field.input_value() == "set_"
    wait_for(page, "gene_set:toy/SET_0")
    page.go_back()
    page.wait_for_url(re.compile("#/run$"))


def test_a_link_opens_what_was_chosen(open_page: Callable[..., Page], atlas_store: FeatureStore) -> None:
    page = open_page("#/search?q=B&pick=label:cell_type")
    wait_for(page, "label:cell_type/B")
    assert shown(page) == atlas_store.features_for(label="B")["feature_id"].to_list()[: ranking.MOST]
    assert "ranked on select cells" in page.locator(".found").inner_text()
    page.locator(".found tbody a").first.click()
    page.wait_for_url(re.compile(r"#/feature/\d+$"))
    page.go_back()
    wait_for(page, "label:cell_type/B")


def test_a_significant_association_of_the_other_direction_is_called_reversed(open_page: Callable[..., Page]) -> None:
    def turn(route: Route) -> None:
        answer = route.fetch()
        found = answer.json()
        columns = found["columns"]
        columns["select_auroc"][:3], columns["auroc"][:3], columns["q"][:3] = (
            [0.9] * 3,
            [0.8, 0.2, 0.3],
            [0.01, 0.01, 0.5],
        )
        route.fulfill(response=answer, json=found)

    page = open_page("#/search")
    page.route("**/data/label_features/*.json", turn)
    page.evaluate("location.hash = '#/search?q=B&pick=label:cell_type'")
    wait_for(page, "label:cell_type/B")
    said = page.locator(".found tbody tr td:nth-child(8)").all_inner_texts()[:3]
    assert said == ["significant", "reversed", "not significant"]


def test_matches_are_grouped_by_kind_and_a_kind_can_be_searched_alone(open_page: Callable[..., Page]) -> None:
    page = open_page("#/search?q=t")
    wait_for(page, "label:cell_type/T")
    heads = page.locator(".matches-head").all_inner_texts()
    assert heads[0].strip().lower() == "cell type"
    assert any("toy gene set" in head.lower() for head in heads)
    page.get_by_label("Search among").select_option("gene_set:toy")
    wait_for(page, "gene_set:toy/SET_0")
    page.wait_for_url(re.compile(r"q=t&kind=gene_set%3Atoy$"))
    assert page.locator(".matches-head").count() == 1


ORDER = """async () => {
  const { Names } = await import("./static/js/names.js");
  const genes = ["NKG7", "BANK1", "NK", "XNKA", "MKG7", "TNFNK-7"];
  const names = new Names({ genes, labels: [["cell_type", "CD56+ NK"]] });
  const listed = (query) => names.find(query).flatMap(({ hits }) => hits.map(({ name }) => name));
  return [listed("NK"), listed("nkg7"), listed("nk cd56"), listed("nk-7"), listed("-")];
}"""


def test_exact_names_come_before_words_beginnings_parts_and_likes(open_page: Callable[..., Page]) -> None:
    assert open_page("#/search").evaluate(ORDER) == [
        ["NK", "NKG7", "XNKA", "BANK1", "TNFNK-7", "CD56+ NK"],
        ["NKG7", "MKG7"],
        ["CD56+ NK"],
        ["TNFNK-7", "NKG7"],
        [],
    ]


def test_a_name_that_is_misspelt_is_found(open_page: Callable[..., Page]) -> None:
    page = open_page("#/search")
    page.keyboard.type("CD97A")
    wait_for(page, "gene/CD79A")
    page.locator("#search-input").fill("brihgt")
    wait_for(page, "label:cell_type/NK, bright")


def test_what_is_not_found_names_what_was_searched_and_what_is_near(open_page: Callable[..., Page]) -> None:
    page = open_page("#/search?q=CD79123")
    said = page.locator(".found")
    said.get_by_text("Nothing is called “CD79123”").wait_for()
    assert "cell type (4)" in said.inner_text()
    assert "cell id (400" in said.inner_text()
    said.get_by_role("link", name="CD79A").click()
    wait_for(page, "gene/CD79A")


def test_hostile_names_are_shown_as_text(open_page: Callable[..., Page], hostile: str) -> None:
    page = open_page("#/search")
    page.keyboard.type("<img src")
    wait_for(page, f"label:cell_type/{hostile}")
    options = page.locator("[role=option]").all_inner_texts()
    assert options == [hostile] * 3
    assert page.locator(".found-title").inner_text().startswith(hostile)
    assert page.locator("main img").count() == 0
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("pick=label"))
    page.reload()
    wait_for(page, f"label:cell_type/{hostile}")


def of_cell(store: FeatureStore, cell: int) -> list[int]:
    """The features of a cell as its resource lists them, which another test compares with percentiles of all codes."""
    found: list[int] = read(Resources(store), "cell_features/0.json")["feature_id"][cell]
    return found


def test_a_cell_is_found_by_the_beginning_of_its_id_and_by_its_number(
    open_page: Callable[..., Page], atlas_store: FeatureStore
) -> None:
    page = open_page("#/search")
    page.keyboard.type("ac001")
    wait_for(page, "cell/AC0010-1")
    assert page.locator("[role=option]").all_inner_texts() == [f"AC00{n}-1" for n in range(10, 18)]
    assert shown(page) == of_cell(atlas_store, 10)
    page.locator("#search-input").fill("#29")
    wait_for(page, "cell/#29")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(r"q=%2329&pick=cell$"))
    assert shown(page) == of_cell(atlas_store, 29)
    facts = page.locator(".found-facts").inner_text()
    assert all(text in facts for text in ("#29", "test", "T", "d3"))
    page.locator("#search-input").fill("#400")
    page.get_by_text("Nothing is called “#400”").wait_for()


def test_an_id_of_digits_is_an_id_even_where_it_looks_like_a_place(
    open_page: Callable[..., Page], small_store: Any, serving: Callable[[FeatureStore], str]
) -> None:
    ids = [str((place * 7 + 5) % 40) for place in range(40)]
    ids[3], ids[9], ids[10] = "#5", "ab", "Ab"
    folder = small_store.layout.cells_dir("toy")
    shutil.rmtree(folder)
    cells = small_store.cells.with_columns(cell_id=pl.Series(ids))
    commit.write_table(folder, cells, {"table": "cells", "dataset": "toy"})
    store = FeatureStore.open(small_store.layout.root)
    address = serving(store)
    for name, place in (("17", ids.index("17")), ("#5", 3), ("#6", 6), ("ab", 9), ("Ab", 10)):
        page = open_page(f"#/search?kind=cell&q={name.replace('#', '%23')}", address=address)
        wait_for(page, f"cell/{name}")
        assert shown(page) == of_cell(store, place), name


def test_the_number_of_a_feature_opens_its_page(open_page: Callable[..., Page]) -> None:
    page = open_page("#/search")
    page.keyboard.type("17")
    wait_for(page, "feature/Feature 17")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(r"#/feature/17$"))


def test_the_page_fits_a_phone_and_the_list_makes_room_for_what_is_chosen(open_page: Callable[..., Page]) -> None:
    page = open_page("#/search", width=390, height=844, dark=True)
    page.keyboard.type("b")
    wait_for(page, "label:cell_type/B")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.locator("[role=option]").first.click()
    page.wait_for_url(re.compile("pick="))
    assert not page.locator("#search-matches").is_visible()
    assert page.locator("#search-input").get_attribute("aria-expanded") == "false"
    page.keyboard.press("ArrowDown")
    assert page.locator("#search-matches").is_visible()


def test_a_store_without_associations_says_what_to_run_and_finds_cells(
    open_page: Callable[..., Page],
    store_without: Callable[..., FeatureStore],
    serving: Callable[[FeatureStore], str],
) -> None:
    store = store_without("associations/a550c", "matches", "comparisons", "steering")
    page = open_page("#/search", address=serving(store))
    assert "scsae associate --store" in page.locator(".empty").inner_text()
    page.keyboard.type("#5")
    wait_for(page, "cell/#5")
    assert shown(page) == of_cell(store, 5)


def test_rows_are_saved_as_the_store_holds_them(
    open_page: Callable[..., Page], atlas_store: FeatureStore, tmp_path: Path
) -> None:
    page = open_page("#/search?q=GENE3&pick=gene")
    with page.expect_download() as download:
        page.get_by_role("button", name="CSV").click()
    download.value.save_as(tmp_path / "rows.csv")
    found, expected = pl.read_csv(tmp_path / "rows.csv"), atlas_store.features_for(gene="GENE3")
    assert download.value.suggested_filename == "features-GENE3.csv"
    for column in ("feature_id", "select_pearson", "pearson", "q", "class"):
        assert found[column].to_list() == expected[column].to_list()


GROWTH = """async () => {
  const { Names } = await import("./static/js/names.js");
  const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", letter = (i, j) => letters[((i + 3) * (j + 5) * 7919) % 101 % 26];
  const name = (i, n) => Array.from({ length: n }, (_, j) => letter(i, j)).join("");
  const of = (times) => new Names({
    genes: Array.from({ length: 2000 * times }, (_, i) => `${name(i, 4)}${i % 97}`),
    gene_sets: Array.from({ length: 500 * times }, (_, i) => ["go", `GOBP_${name(i, 9)}_OF_${name(i + 3, 8)}_${i}`]),
    labels: Array.from({ length: 20 * times }, (_, i) => ["cell_type", `${name(i, 6)} cell ${i}`]),
  });
  const some = of(1), many = of(10);
  const queries = ["a", "e", "ab", "gobp", "cell 17", "regulation of t", "monocyte", "qqqqqqqq", "zzzz", "a1"];
  const time = (names) => {
    const began = performance.now();
    for (const query of queries) names.find(query);
    return performance.now() - began;
  };
  const ratios = [];
  for (let turn = 0; turn < 7; turn++) ratios.push(1 / (time(some) / time(many)));
  return ratios;
}"""


def test_a_search_among_ten_times_as_many_names_takes_about_ten_times_as_long(open_page: Callable[..., Page]) -> None:
    # in one run and in turn, so that a slow machine changes both
    ratios = open_page("#/search").evaluate(GROWTH)
    assert sorted(ratios)[len(ratios) // 2] < 30


def edits(a: str, b: str) -> int:
    """Optimal string alignment distance, by its recursion."""

    @cache
    def of(i: int, j: int) -> int:
        if min(i, j) == 0:
            return max(i, j)
        steps = [of(i - 1, j) + 1, of(i, j - 1) + 1, of(i - 1, j - 1) + (a[i - 1] != b[j - 1])]
        if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
            steps.append(of(i - 2, j - 2) + 1)
        return min(steps)

    return of(len(a), len(b))


def test_the_distance_of_spellings_is_that_of_its_recursion(
    open_page: Callable[..., Page], rng: np.random.Generator
) -> None:
    texts = ["".join(rng.choice(list("abc"), rng.integers(0, 8))) for _ in range(120)]
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    module = 'const { distance } = await import("./static/js/names.js")'
    found = open_page("#/search").evaluate(
        f"async (pairs) => {{ {module}; return pairs.map(([a, b]) => distance(a, b, 3)); }}", pairs
    )
    assert found == [steps if steps <= 3 else 99 for steps in (edits(a, b) for a, b in pairs)]
