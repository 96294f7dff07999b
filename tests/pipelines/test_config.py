"""Options and recipes: wrong ones are refused, and the error has the value and what is allowed."""

import pytest

from feature_store.errors import NotFoundError
from pipelines.config import ExtractOptions, Recipe, TrainOptions, check, load_recipe, parse_size
from pipelines.errors import UsageError
from pipelines.recipe import run_recipe


@pytest.mark.parametrize(
    ("text", "size_bytes"), [("256MB", 256_000_000), ("1 gb", 10**9), ("1.5KB", 1500), ("12B", 12)]
)
def test_a_size_is_read_in_decimal_units(text, size_bytes):
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["256", "MB", "-1MB", "1MiB", "1e3MB"])
def test_a_size_without_number_or_unit_is_refused_with_an_example(text):
    with pytest.raises(UsageError, match="256MB"):
        parse_size(text)


def test_unknown_option_names_the_nearest_allowed_one():
    with pytest.raises(UsageError, match="'n_features'"):
        check(TrainOptions, {"n_feature": 3}, "scsae train")


def test_a_value_out_of_range_is_named_with_its_rule():
    with pytest.raises(UsageError, match=r"k was 0: .*1"):
        check(TrainOptions, {"k": 0}, "scsae train")


def test_two_ways_to_say_the_shard_size_are_refused_together():
    with pytest.raises(UsageError, match="shard_cells and shard_size"):
        check(ExtractOptions, {"data": "x.h5ad", "shard_cells": 5, "shard_size": "1MB"}, "scsae extract")


def test_options_cannot_be_changed_after_the_check():
    with pytest.raises(ValueError, match="frozen"):
        TrainOptions().k = 3


def test_every_option_has_a_description():
    for stage in (*Recipe.model_fields.values(), *ExtractOptions.model_fields.values()):
        assert stage.description


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {kk: 16}", "'train.kk'"),
        ("trian: {k: 16}", "'train'"),
        ("steer: [{doze: 2}]", "'dose'"),
        ("train: {k: many}", r"train.k was 'many'"),
        ("- train", r"\['train'\]"),
        ("train: {k: 16", "recipe.yaml"),
    ],
)
def test_a_wrong_recipe_is_refused_with_what_is_wrong(tmp_path, text, words):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=words):
        load_recipe(file)


@pytest.mark.parametrize(
    "content", [b"extract:\n  data: [d\xe4ta.h5ad]\n", b"\x89HDF\r\n\x1a\n\0", b"a: \x01b\n", None]
)
def test_a_recipe_that_is_no_text_is_refused_in_one_line(tmp_path, content):
    file = tmp_path / "recipe.yaml"
    file.mkdir() if content is None else file.write_bytes(content)
    with pytest.raises(UsageError, match=r"recipe\.yaml") as refused:
        load_recipe(file)
    assert "\n" not in str(refused.value)


def test_a_gene_set_file_of_a_recipe_is_read_before_any_stage_runs(tmp_path):
    values = {"extract": {"data": "cells.h5ad", "layer": ["1"]}, "associate": {"gmt": [str(tmp_path / "none.gmt")]}}
    with pytest.raises(NotFoundError, match=r"none\.gmt"):
        run_recipe(check(Recipe, values, "recipe"), tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"nothing\.yaml"):
        load_recipe(tmp_path / "nothing.yaml")


@pytest.mark.parametrize("name", ["recipe.yaml", "atlas-10m.yaml"])
def test_the_example_recipes_are_valid(pytestconfig, name):
    recipe = load_recipe(pytestconfig.rootpath / "infra" / name)
    assert recipe.extract is not None
    assert recipe.extract.layer == ("6",)


def test_options_with_paths_and_addresses_are_the_same_after_json():
    for data in ("cells.h5ad", ["a.h5ad", "s3://bucket/b.h5ad"], "https://host/a.h5ad?key=1"):
        options = ExtractOptions(data=data, layer=("1",), obs="cells.csv")
        assert ExtractOptions.model_validate_json(options.model_dump_json()) == options
