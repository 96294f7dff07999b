"""Every family from its official folder to tables of associations, effects, inputs and edges."""

from __future__ import annotations

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
from sae_core.errors import ConfigError

KINDS = (
    *("scgpt-finetuned", "geneformer-v1", "geneformer-v2", "scfoundation", "tahoe", "nicheformer", "uce"),
    "transcriptformer",
    "aido-cell",
)
WITHOUT_HEAD = ("uce",)
OPTIONS = {"transcriptformer": ("assay=obs:batch",)}
N_FEATURES, CELLS = 3, 24
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("module_without_actors")]


@pytest.mark.parametrize("kind", KINDS)
def test_every_stage_reads_the_model(kind, tiny_data, train_options, tmp_path, monkeypatch):
    # of few short cells a model that hides few genes hides each of them once or twice
    for stage in ("effects", "circuit", "feature_inputs"):
        monkeypatch.setattr(f"pipelines.{stage}.actors.MIN_CELLS", 1)
    store, model = tmp_path / "store", write_tiny(tmp_path, kind)
    saes, dense = [], ()
    for layer in ("1", "2"):
        extract(
            ExtractOptions(
                data=tiny_data,
                model=str(model),
                model_option=OPTIONS.get(kind, ()),
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
        # of the first layer: behind the last one no token reaches another
        dense = dense or tuple(features["feature_id"].head(N_FEATURES).to_list())
    asked = EffectsOptions(sae=saes[0], feature=dense, cells=CELLS, n_nulls=3)
    if kind in WITHOUT_HEAD:
        with pytest.raises(ConfigError, match="no masked-gene prediction"):
            effects(asked, store)
    else:
        effect = commit.read_table(effects(asked, store).path / "feature_effect")
        assert set(effect["feature_id"]) == set(dense)
        assert effect["effect"].is_finite().all()
        assert (effect["effect"] != 0).any()
    read = commit.read_table(
        inputs(InputsOptions(sae=saes[0], feature=dense, cells=CELLS, genes=4, n_nulls=3), store).path / "feature_input"
    )
    assert set(read["feature_id"]) == set(dense)
    assert (read.filter(path="own token")["change"] > 0).any()
    edges = commit.read_table(
        circuit(CircuitOptions(from_sae=saes[0], to_sae=saes[1], feature=dense, cells=CELLS, n_nulls=3), store).path
        / "feature_edge"
    )
    assert (edges["effect"] != 0).any()
    assert edges.filter(~pl.col("effect").is_finite()).is_empty()
