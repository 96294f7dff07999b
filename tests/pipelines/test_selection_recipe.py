"""The recipe of two groups of cells, as the atlas writes it: it loads, and its stages run on the same cells."""

import json

import numpy as np
import polars as pl
import pytest

from feature_store import FeatureStore
from feature_store.atlas.resources import Resources
from feature_store.storage import commit, schemas
from feature_store.storage.layout import Layout
from pipelines.config import load_recipe
from pipelines.recipe import run_recipe

LEFT = "p-1_-1_0.5_-1_0.5_1_-1_1"
"""A polygon around the cells of one type on the map that `mapped_store` has."""


@pytest.fixture
def mapped_store(own_store):
    """The store with a map: the cells of the first type at 0, the others at 1."""
    layout = Layout(own_store)
    cells = FeatureStore.open(own_store).frame("cells").sort("cell_idx").collect()
    kind = cells["cell_type"].to_numpy()
    umap = pl.DataFrame({"cell_idx": cells["cell_idx"], "x": np.where(kind == np.unique(kind)[0], 0.0, 1.0), "y": 0.0})
    folder = layout.umap_dir(layout.latest("codes").run)
    commit.write_table(folder, schemas.conform("umap", umap), {"table": "umap"})
    return own_store


def written(store, b, folder):
    """What the atlas writes of the group LEFT, in files."""
    found = json.loads(Resources(FeatureStore.open(store)).get(f"selection_recipes/{LEFT}/{b}.json").body)
    (folder / "selection-recipe.yaml").write_text(found["recipe"])
    (folder / "selection.csv").write_text(found["table"])
    return load_recipe(folder / "selection-recipe.yaml")


def test_the_recipe_of_a_lasso_makes_it_a_label_that_is_tested_and_steered_with(
    mapped_store, without_actors, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    before = FeatureStore.open(mapped_store).frame("cells").sort("cell_idx").collect()
    first = before["cell_type"].unique().sort()[0]
    recipe = written(mapped_store, "rest", tmp_path)
    (steering,) = recipe.steer
    assert (steering.kind, steering.target, steering.toward) == ("atlas_selection", "A", None)
    assert recipe.encode.sae == Layout(mapped_store).latest("saes").run
    few = recipe.model_copy(update={"steer": (steering.model_copy(update={"n_nulls": 2}),)})
    made = run_recipe(few, mapped_store)
    assert [result.kind for result in made] == ["codes", "associations", "steering"]
    store = FeatureStore.open(mapped_store)
    assert store.lineage.associations == made[1].run
    cells = store.frame("cells").sort("cell_idx").collect()
    assert cells.select("cell_id", "split", "cell_type").equals(before.select("cell_id", "split", "cell_type"))
    assert (cells["atlas_selection"] == "A").to_list() == (cells["cell_type"] == first).to_list()
    # the group is the cells of a type, so it has the figures of the type
    rows = store.frame("feature_label").filter(split="test").collect()
    of_group, of_type = (
        rows.filter(label=name).sort("feature_id").select("feature_id", "auroc") for name in ("A", first)
    )
    assert of_group.height
    assert of_group.equals(of_type)


def test_the_recipe_of_two_groups_moves_the_first_toward_the_second(mapped_store, tmp_path):
    recipe = written(mapped_store, "p0.5_-1_2_-1_2_1_0.5_1", tmp_path)
    assert (recipe.steer[0].target, recipe.steer[0].toward) == ("A", "B")
    table = pl.read_csv(tmp_path / "selection.csv")
    cells = FeatureStore.open(mapped_store).frame("cells").collect()
    assert sorted(table["cell_id"]) == sorted(cells["cell_id"])
    assert set(table["atlas_selection"]) == {"A", "B"}


def test_cells_whose_place_is_not_known_have_no_recipe_and_say_so(mapped_store):
    (next((mapped_store / "cells").iterdir()) / "source.json").unlink()
    found = json.loads(Resources(FeatureStore.open(mapped_store)).get(f"selection_recipes/{LEFT}/rest.json").body)
    assert set(found) == {"why_not"}
    assert "where its cells are" in found["why_not"]
