"""An SAE of given vectors is registered in MLflow under their name, and its provenance says that no model is there."""

from __future__ import annotations

import numpy as np
import pytest

from feature_store.storage.layout import Layout
from pipelines.config import ExtractOptions, TrainOptions
from pipelines.extract import extract
from pipelines.tracking import Tracking
from pipelines.tracking.provenance import origin_of
from pipelines.train import train

# MLflow makes its database
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_ray")]


def test_a_registered_sae_names_the_vectors_and_no_place_of_a_model(tiny_cells, tmp_path):
    cells = tiny_cells.copy()
    cells.obsm["X_emb"] = np.random.default_rng(0).normal(size=(72, 6))
    cells.write_h5ad(tmp_path / "cells.h5ad")
    store = tmp_path / "store"
    extract(ExtractOptions(data=tmp_path / "cells.h5ad", vectors="obsm/X_emb", source_name="emb v1"), store)
    train(TrainOptions(n_features=8, k=2, n_steps=2, batch_size=16, num_workers=0), store)
    (version,) = Tracking(Layout(store)).versions()
    assert version.name == "sae-emb v1-vectors"
    assert "are given vectors" in origin_of(Layout(store), version)["model"]["place"]
    assert "are given vectors" in version.missing["select_recovery"]
