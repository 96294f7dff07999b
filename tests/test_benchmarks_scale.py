"""The synthetic cells of the benchmarks of scale hold what was planted in them."""

from __future__ import annotations

import sys
from pathlib import Path

import anndata
import numpy as np
import pytest

from sae_core.scfm import load_model

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from scale.data import N_RARE, RARE, TYPES, Planted, write_data

N_CELLS = 2000


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scale") / "cells.h5ad"
    write_data(path, N_CELLS)
    return path


def test_the_same_cells_are_the_same_bytes(path: Path, tmp_path: Path) -> None:
    write_data(tmp_path / "again.h5ad", N_CELLS)
    assert (tmp_path / "again.h5ad").read_bytes() == path.read_bytes()


def test_cells_have_the_planted_types_donors_and_genes(path: Path) -> None:
    cells, planted = anndata.read_h5ad(path), Planted()
    assert cells.obs_names.is_unique
    assert 50 < np.diff(cells.X.indptr).mean() < 70
    assert (cells.obs["donor"].nunique(), cells.obs["batch"].nunique(), cells.obs["condition"].nunique()) == (20, 4, 2)
    assert (cells.obs.groupby("donor", observed=True)["batch"].nunique() == 1).all()
    sizes = cells.obs["cell_type"].value_counts()
    assert sizes[RARE] == N_RARE
    assert sizes[TYPES[0]] > 20 * sizes[TYPES[25]]
    for cell_type in (TYPES[0], TYPES[5], RARE):
        of_type = (cells.obs["cell_type"] == cell_type).to_numpy()
        counts = np.asarray(cells[:, planted.markers(cell_type)].X.sum(axis=1)).ravel()
        assert counts[of_type].mean() > 10 * counts[~of_type].mean()
    for name in ("batch", "condition"):
        genes = planted.special[name][1]
        counts = np.asarray(cells.X[:, genes].sum(axis=1)).ravel()
        carries = cells.obs[name].cat.codes.to_numpy() == 1
        assert counts[carries].mean() > 2 * counts[~carries].mean()


def test_fewer_cells_are_the_beginning_of_more_cells() -> None:
    planted = Planted()
    few, many = planted.labels(12_000), planted.labels(25_000)
    rare = TYPES.index(RARE)
    assert (many["cell_type"] == rare).sum() == (few["cell_type"] == rare).sum() == N_RARE
    np.testing.assert_array_equal(few["donor"], many["donor"][:12_000])
    differ = few["cell_type"] != many["cell_type"][:12_000]
    assert differ.sum() <= 2 * N_RARE
    (block,) = planted.blocks(5000)
    np.testing.assert_array_equal(block.labels["donor"], few["donor"][:5000])


def test_the_mini_model_knows_all_genes() -> None:
    genes = Planted().genes
    assert load_model("mini").match_genes(genes).n_matched == len(genes)
