"""Actors of Ray store given vectors as this process does: their jobs are plain values."""

from __future__ import annotations

import numpy as np
import pytest
from stored_bytes import hashes_of

from pipelines.config import ExtractOptions
from pipelines.extract import extract


@pytest.fixture
def options(tiny_cells, tmp_path) -> ExtractOptions:
    cells = tiny_cells.copy()
    cells.obsm["X_emb"] = np.random.default_rng(0).normal(size=(72, 6))
    cells.write_h5ad(tmp_path / "cells.h5ad")
    return ExtractOptions(data=tmp_path / "cells.h5ad", vectors="obsm/X_emb", cells=50, shard_cells=16, num_actors=1)


@pytest.mark.slow
def test_actors_store_the_same_bytes(options, ray_local, tmp_path, shards_here, monkeypatch):
    (by_actors,) = extract(options, tmp_path / "actors")
    monkeypatch.setattr("pipelines.external.extraction.do_shards", shards_here)
    (here,) = extract(options, tmp_path / "here")
    assert hashes_of(by_actors.path) == hashes_of(here.path)
