"""Zeros and batches of a fine-tuned scGPT: the options of the extraction hold in every later stage."""

from __future__ import annotations

import polars as pl
import pytest
from tiny_checkpoints import write_finetuned_scgpt

from feature_store.storage import commit
from feature_store.storage.plans import ActivationsPlan
from pipelines.associate import associate
from pipelines.config import AssociateOptions, DataOptions, EffectsOptions, EncodeOptions, SteerOptions
from pipelines.effects import effects
from pipelines.encode import encode
from pipelines.errors import UsageError
from pipelines.extract import extract
from pipelines.inspection import inspect_data
from pipelines.steering.run import steer
from pipelines.train import train

pytestmark = pytest.mark.usefixtures("module_without_actors")
OPTIONS = ("include_zeros=true", "batch_label=obs:run")


@pytest.fixture
def made(tmp_path, tiny_cells, extract_options):
    """A checkpoint with three batches, a file whose column says the batch of each cell, and options of both."""
    cells = tiny_cells.copy()
    cells.obs["run"] = [i % 3 for i in range(cells.n_obs)]
    cells.write_h5ad(tmp_path / "cells.h5ad")
    model = write_finetuned_scgpt(tmp_path, batch_label=None)
    update = {"data": (tmp_path / "cells.h5ad",), "model": str(model), "model_option": OPTIONS}
    return extract_options.model_copy(update=update)


def codes_of(result):
    table = commit.read_table(result.path / "by_cell").sort("cell_idx", "feature_id")
    return table.select("cell_idx", "feature_id", "value")


def test_zeros_and_the_batch_of_each_cell_are_in_the_plan_and_kept_by_the_encoding_of_other_data(
    made, train_options, tiny_cells, tmp_path
):
    store = tmp_path / "store"
    (extracted,) = extract(made, store)
    plan = ActivationsPlan.of(commit.Run.open(extracted.path))
    (others,) = extract(made.model_copy(update={"model_option": ("batch_label=0",)}), tmp_path / "plain")
    assert plan.model_digest != ActivationsPlan.of(commit.Run.open(others.path)).model_digest
    ids = commit.read_table(extracted.path)["gene_id"]
    assert commit.read_table(others.path).height < len(ids), "zeros are tokens too"
    train(train_options, store)
    stored, again = encode(EncodeOptions(), store), encode(EncodeOptions(fused=True), store)
    assert codes_of(stored).equals(codes_of(again))
    plain = tmp_path / "plain.h5ad"
    tiny_cells[:40].copy().write_h5ad(plain)
    with pytest.raises(UsageError, match=r"batch_label of each cell from the obs column 'run'.*batch_label=obs:COLUMN"):
        encode(EncodeOptions(data=(plain,), donor="donor"), store)
    other = tiny_cells[:40].copy()
    other.obs["run"] = [i % 3 for i in range(40)]
    other.write_h5ad(tmp_path / "other.h5ad")
    found = codes_of(encode(EncodeOptions(data=(tmp_path / "other.h5ad",), donor="donor"), store))
    expected = codes_of(stored).filter(pl.col("cell_idx") < 40)
    assert found.select("cell_idx", "feature_id").equals(expected.select("cell_idx", "feature_id"))
    assert (found["value"] - expected["value"]).abs().max() < 1e-4


def test_inspect_says_what_the_model_was_tuned_on_and_the_options_to_type(made):
    model = {"data": made.data, "model": made.model}
    asked = inspect_data(DataOptions(**model, model_option=("batch_label=1",)))["checkpoint"]
    for told in ("3 batches", "all cells are given batch 1", "batch_label=obs:COLUMN", "include_zeros=true", "--genes"):
        assert told in asked
    given = inspect_data(DataOptions(**model, model_option=OPTIONS))["checkpoint"]
    for told in ("the batch of each cell is in obs:run", "zeros included", "<cls> has the value 0"):
        assert told in given
    with pytest.raises(Exception, match="--model-option batch_label=obs:COLUMN"):
        inspect_data(DataOptions(**model))


@pytest.mark.slow
def test_steering_and_effects_give_cells_their_batches_and_zeros(made, train_options, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.effects.actors.MIN_CELLS", 1)
    store = tmp_path / "store"
    extract(made, store)
    train(train_options, store)
    encode(EncodeOptions(), store)
    found = associate(AssociateOptions(), store)
    dense = commit.read_table(found.path / "features").sort("density", descending=True)["feature_id"].head(2).to_list()
    result = steer(SteerOptions(target="A", n_nulls=2, n_features=(3,)), store)
    assert result.done > 0
    effect = commit.read_table(
        effects(EffectsOptions(feature=tuple(dense), cells=24, n_nulls=3), store).path / "feature_effect"
    )
    assert set(effect["feature_id"]) == set(dense)
    assert (effect["effect"] != 0).any()
