"""Exactly once in the stages that run the model again: effects, edges and inputs end in the bytes of undisturbed ones,
though actors and drivers are killed.
"""

import shutil

import numpy as np
import pytest
from killed_commands import KilledCommand
from stored_bytes import hashes_of

from feature_store.storage.layout import Layout
from pipelines.associate import associate
from pipelines.config import AssociateOptions, EncodeOptions, ExtractOptions, TrainOptions
from pipelines.encode import encode
from pipelines.extract import extract
from pipelines.train import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STAGES = {
    "effects": (["effects", "--cells", "12", "--n-nulls", "3"], "effects"),
    "circuit": (["circuit", "--cells", "12", "--n-nulls", "3"], "circuits"),
    "inputs": (["inputs", "--cells", "12", "--genes", "4", "--n-nulls", "3"], "inputs"),
}


@pytest.fixture(scope="module")
def associated(tiny_model, tiny_data, tmp_path_factory, module_without_actors):
    """A store with associations of an SAE of layer 1, and an SAE of layer 2."""
    store = tmp_path_factory.mktemp("effects") / "store"
    options = ExtractOptions(
        data=tiny_data,
        model=str(tiny_model),
        layer=("1",),
        donor="donor",
        cell_type="type",
        shard_cells=16,
        dtype="f32",
    )
    trained = TrainOptions(n_features=48, k=4, n_steps=60, batch_size=128, num_workers=0)
    extract(options, store)
    train(trained, store)
    encode(EncodeOptions(), store)
    associate(AssociateOptions(), store)
    extract(options.model_copy(update={"layer": ("2",)}), store)
    train(trained.model_copy(update={"seed": 1}), store)
    return store


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_runs_the_model_again_is_written_once_whatever_is_killed(stage, associated, tmp_path):
    (tmp_path / "home").mkdir()
    command, kind = STAGES[stage]
    tables = [f"{kind}/*/draws"]
    started = []
    for name in ("calm", "own"):
        store = shutil.copytree(associated, tmp_path / name)
        started.append(KilledCommand([*command, "--num-actors", "2"], store, tmp_path / "home", tables=tables))
    calm, own = started
    try:
        calm.finish()
        rng = np.random.default_rng(0)
        for n, struck in ((1, "actor"), (2, "driver")):
            own.go_on_until(n)
            own.strike(struck, rng)
        own.finish()
        own.assert_written_once()
    finally:
        for each in started:
            each.end()
    found = [hashes_of(Layout(each.store).kind_dir(kind)) for each in started]
    assert found[0] == found[1]
    assert found[0]
