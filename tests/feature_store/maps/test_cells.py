import numpy as np
import pytest
from scipy import sparse
from sklearn.decomposition import PCA

from feature_store import FeatureStore
from feature_store.errors import InputError, PlanMismatchError
from feature_store.maps.cells import (
    MIN_FIRING,
    CellMapConfig,
    cell_map,
    has_cell_map,
    lay_out,
    principal_components,
    sample,
)
from feature_store.storage import commit

CONFIG = CellMapConfig(n_components=5, n_neighbors=8)


@pytest.fixture
def three_kinds():
    """Codes of 60 cells of three kinds, each with four features of its own among those that all share."""
    rng = np.random.default_rng(0)
    kind = np.arange(60) % 3
    codes = np.where(rng.random((60, 20)) < 0.3, rng.gamma(2, 1, (60, 20)), 0)
    for k in range(3):
        codes[np.ix_(kind == k, range(4 * k, 4 * k + 4))] = rng.gamma(20, 1, ((kind == k).sum(), 4))
    return sparse.csr_array(codes.astype(np.float32)), kind


def test_components_are_those_of_the_scaled_codes(three_kinds):
    codes, _ = three_kinds
    dense = codes.toarray().astype(np.float64)
    scaled = (dense - dense.mean(axis=0)) / dense.std(axis=0)
    wanted = PCA(5, svd_solver="full").fit_transform(scaled)
    found = principal_components(codes, CONFIG)
    np.testing.assert_allclose(np.abs(found), np.abs(wanted), atol=1e-8)


def test_constant_features_and_those_of_fewer_than_three_cells_do_not_count(three_kinds):
    codes, _ = three_kinds
    rare = np.zeros((60, 3), dtype=np.float32)
    rare[0, 0], rare[:2, 1], rare[:, 2] = 1e6, 1e6, 7
    more = sparse.csr_array(sparse.hstack([codes, sparse.csr_array(rare)]))
    np.testing.assert_array_equal(principal_components(more, CONFIG), principal_components(codes, CONFIG))


@pytest.mark.slow
def test_cells_of_a_kind_lie_together_and_the_same_seed_gives_the_same_map(three_kinds):
    codes, kind = three_kinds
    points = lay_out(codes, CONFIG)
    distance = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    nearest = np.argsort(distance, axis=1)[:, :5]
    assert (kind[nearest] == kind[:, None]).mean() > 0.95
    np.testing.assert_array_equal(lay_out(codes, CONFIG), points)
    assert points.dtype == np.float32
    few = lay_out(codes[:10], CONFIG)
    assert few.shape == (10, 2)
    assert np.isfinite(few).all()


def test_a_sample_has_max_cells_cells_ascending_and_by_the_seed():
    config = CellMapConfig(max_cells=10)
    found = sample(1000, config)
    assert len(set(found.tolist())) == 10
    assert (np.diff(found) > 0).all()
    np.testing.assert_array_equal(found, sample(1000, config))
    assert found.tolist() != sample(1000, CellMapConfig(max_cells=10, seed=1)).tolist()
    assert sample(7, config).tolist() == list(range(7))


def test_a_large_data_set_has_the_map_of_its_sample(small_store, monkeypatch):
    monkeypatch.setattr("feature_store.maps.cells.lay_out", lambda codes, _: np.zeros((codes.shape[0], 2), np.float32))
    config = CellMapConfig(max_cells=12)
    assert not has_cell_map(small_store.layout, "c0de")
    made = cell_map(small_store.layout, "c0de", config)
    assert made["cell_idx"].to_list() == sample(40, config).tolist()
    assert has_cell_map(small_store.layout, "c0de")
    assert commit.verify(small_store.layout.umap_dir("c0de")) == []
    assert cell_map(small_store.layout, "c0de", config).equals(made)
    query = "SELECT COUNT(*) AS n FROM umap JOIN cells USING (cell_idx)"
    assert FeatureStore.open(small_store.layout.root).sql(query)["n"].item() == 12
    with pytest.raises(PlanMismatchError, match=r"max_cells.*12.*50000"):
        cell_map(small_store.layout, "c0de")


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.ones((9, 30)), "10 cells; got 9"),
        (np.zeros((20, 30)), f"{MIN_FIRING} features.*0 of 30.*scsae features"),
        (np.ones((20, 30)), "0 of 30"),
    ],
)
def test_too_few_cells_or_features_are_refused(codes, message):
    with pytest.raises(InputError, match=message):
        lay_out(sparse.csr_array(codes))


@pytest.mark.parametrize("wrong", [{"n_neighbors": 1}, {"min_dist": 2}, {"max_cells": 3}, {"seed": -1}])
def test_an_impossible_config_is_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        CellMapConfig(**wrong)
