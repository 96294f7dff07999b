"""A recipe: stages in their order from one YAML file, each from the run before it, nothing done twice."""

import json

import pytest
import yaml

from feature_store import FeatureStore
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from pipelines.config import load_recipe
from pipelines.recipe import run_recipe
from pipelines.tracking import Tracking
from pipelines.verify import verify_run

# the tests of each stage and of the demo have actors
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("module_without_actors")]

KINDS = ("saes", "codes", "associations", "steering")


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory, tiny_data, tiny_model):
    """Every stage on two sites of the tiny model, written as a user would."""
    stages = {
        "extract": {
            "data": str(tiny_data),
            "model": str(tiny_model),
            "layer": [0, 2],
            "donor": "donor",
            "batch": "batch",
            "cell_type": "type",
            "shard_cells": 24,
            "dtype": "f32",
        },
        "train": {"n_features": 32, "k": 4, "n_steps": 30, "batch_size": 128, "num_workers": 0},
        "encode": {"pooling": "mean"},
        "associate": {},
        "steer": [{"n_features": 2, "n_nulls": 3, "num_actors": 1}],
    }
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    file.write_text(yaml.safe_dump(stages))
    return file


@pytest.fixture(scope="module")
def first(recipe_file, ray_local, tmp_path_factory):
    """The store and the results of the recipe's first run."""
    store = tmp_path_factory.mktemp("e2e") / "store"
    return store, run_recipe(load_recipe(recipe_file), store)


def test_all_stages_run_in_order_for_each_site(first):
    _, results = first
    assert [result.kind for result in results] == ["activations", "activations", *KINDS, *KINDS]
    assert all(result.done > 0 and result.reused == 0 for result in results)
    assert [result.facts["site"] for result in results[:2]] == ["layer.0", "layer.2"]


def test_each_stage_starts_from_the_run_that_the_stage_before_it_made(first):
    _, (one, two, *rest) = first
    for activations, (sae, codes, associations, steering) in ((one, rest[:4]), (two, rest[4:])):
        assert commit.Run.open(sae.path).plan["activations"] == activations.run
        assert commit.Run.open(codes.path / "by_cell").plan["sae"] == sae.run
        assert commit.Run.open(codes.path / "by_cell").plan["pooling"] == "mean"
        assert commit.Run.open(associations.path / "features").plan["codes"] == codes.run
        assert commit.Run.open(steering.path / "per_cell").plan["associations"] == associations.run


def test_everything_made_is_intact_registered_and_answers_in_sql(first):
    store, results = first
    assert [verify_run(result.run, store) for result in results] == [0] * len(results)
    assert [(v.name, v.aliases) for v in Tracking(Layout(store)).versions()] == [
        ("sae-tiny-layer.0", ("champion",)),
        ("sae-tiny-layer.2", ("champion",)),
    ]
    found = FeatureStore.open(store, associations=results[-2].run)
    assert found.sql("SELECT COUNT(*) AS n FROM features").item() == 32
    assert set(found.sql("SELECT run FROM steering")["run"]) == {results[-1].run}


def test_running_again_reuses_everything(first, recipe_file):
    store, results = first
    before = {
        path: path.stat().st_mtime_ns for kind in Layout(store).root.iterdir() for path in kind.rglob("MANIFEST.json")
    }
    again = run_recipe(load_recipe(recipe_file), store)
    assert [(r.kind, r.run) for r in again] == [(r.kind, r.run) for r in results]
    assert [r.done for r in again] == [0] * len(results)
    assert [r.reused for r in again] == [r.done for r in results]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(Tracking(Layout(store)).versions()) == 2


def test_a_recipe_of_later_stages_takes_the_newest_run_of_the_stage_before(first, tmp_path):
    store, results = first
    file = tmp_path / "later.yaml"
    gmt = tmp_path / "programs.gmt"
    gmt.write_text("type A\t\t" + "\t".join(f"GENE{i}" for i in range(2, 10)) + "\n")
    file.write_text(f"associate: {{gmt: [{json.dumps(str(gmt))}]}}\n")
    (made,) = run_recipe(load_recipe(file), store)
    plan = commit.Run.open(made.path / "features").plan
    assert plan["codes"] == results[-3].run == Layout(store).latest("codes").run
    assert [sets["collection"] for sets in plan["gene_sets"]] == ["programs"]


def test_a_recipe_may_name_the_run_to_start_from(first, tmp_path):
    store, results = first
    file = tmp_path / "older.yaml"
    file.write_text(f"encode: {{sae: {results[2].run}, pooling: mean}}\n")
    (made,) = run_recipe(load_recipe(file), store)
    assert (made.run, made.done) == (results[3].run, 0)


@pytest.mark.parametrize(
    ("named", "made"), [(["extract", "encode"], [0, 1, 7]), (["train", "associate", "steer"], [6, 8, 9])]
)
def test_a_stage_left_out_in_the_middle_is_bridged_by_the_newest_run(first, recipe_file, tmp_path, named, made):
    store, results = first
    stages = yaml.safe_load(recipe_file.read_text())
    file = tmp_path / "gap.yaml"
    file.write_text(yaml.safe_dump({key: stages[key] for key in named}))
    again = run_recipe(load_recipe(file), store)
    assert [(r.kind, r.run, r.done) for r in again] == [(results[i].kind, results[i].run, 0) for i in made]
