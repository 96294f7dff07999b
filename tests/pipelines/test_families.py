"""Every family from its official folder to tables of associations, effects, inputs and edges."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from tiny_checkpoints import write_tiny

from feature_store.storage import commit
from pipelines.associate import associate
from pipelines.circuit import circuit
from pipelines.config import (
    AssociateOptions,
    CircuitOptions,
    EffectsOptions,
    EncodeOptions,
    ExtractOptions,
    InputsOptions,
)
from pipelines.effects import effects
from pipelines.encode import encode
from pipelines.extract import extract
from pipelines.feature_inputs import inputs
from pipelines.train import train

KINDS = ("scgpt-finetuned", "geneformer-v1", "geneformer-v2", "scfoundation")
N_FEATURES, CELLS = 3, 8
pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("ray_local")
def test_every_stage_reads_the_model(kind, tiny_data, train_options, tmp_path):
    store, model = tmp_path / "store", write_tiny(tmp_path, kind)
    saes = []
    for layer in ("1", "2"):
        extract(
            ExtractOptions(
                data=tiny_data,
                model=str(model),
                layer=(layer,),
                donor="donor",
                batch="batch",
                cell_type="type",
                shard_cells=36,
                dtype="f32",
            ),
            store,
        )
        saes.append(train(train_options, store).run)
        encode(EncodeOptions(), store)
        found = associate(AssociateOptions(), store)
    features = commit.read_table(found.path / "features").sort("density", descending=True)
    dense = tuple(features["feature_id"].head(N_FEATURES).to_list())
    effect = commit.read_table(
        effects(EffectsOptions(feature=dense, cells=CELLS, n_nulls=3), store).path / "feature_effect"
    )
    assert set(effect["feature_id"]) == set(dense)
    assert np.isfinite(effect["effect"]).all()
    assert (effect["effect"] != 0).any()
    read = commit.read_table(
        inputs(InputsOptions(feature=dense, cells=CELLS, genes=4, n_nulls=3), store).path / "feature_input"
    )
    assert set(read["feature_id"]) == set(dense)
    assert (read.filter(path="own token")["change"] > 0).any()
    edges = commit.read_table(
        circuit(CircuitOptions(from_sae=saes[0], to_sae=saes[1], cells=CELLS, n_nulls=3), store).path / "feature_edge"
    )
    assert (edges["effect"] != 0).any()
    assert edges.filter(~pl.col("effect").is_finite()).is_empty()
