from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from feature_store.errors import InputError, PlanMismatchError
from feature_store.maps import features
from feature_store.maps.features import FeatureMapConfig, has_feature_map, lay_out, nearest, unit_rows
from feature_store.storage import commit, schemas

if TYPE_CHECKING:
    from feature_store.storage.layout import Layout

KINDS = np.arange(60) % 3


@pytest.fixture
def rows() -> np.ndarray:
    """60 directions of three kinds, of lengths that say nothing."""
    rng = np.random.default_rng(0)
    return ((5 * np.eye(3, 16)[KINDS] + rng.standard_normal((60, 16))) * rng.gamma(2, 1, (60, 1))).astype(np.float32)


@pytest.fixture
def layout(small_store: Any) -> Layout:
    """The small store and an SAE."""
    found: Layout = small_store.layout
    run = commit.Run.create(found.saes_dir("5ae"), {"n_shards": 1, "files": ["sae.safetensors"]})
    run.commit_shard(0, lambda path: path.write_bytes(b"weights"), start=0, stop=1)
    run.finalize()
    return found


@pytest.mark.parametrize("block", [1, 700, 1 << 24])
def test_neighbours_are_those_of_exact_cosines_whatever_the_block(
    rows: np.ndarray, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(features, "_BLOCK_VALUES", block)
    found = nearest(unit_rows(rows), 7)
    distance, _ = NearestNeighbors(n_neighbors=7, metric="cosine", algorithm="brute").fit(rows).kneighbors()
    np.testing.assert_allclose(found.similarity, 1 - distance, atol=2e-6)
    own = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(found.similarity, (own[:, None] * own[found.feature_id]).sum(axis=-1), atol=2e-6)
    assert all(len({i, *others}) == 8 for i, others in enumerate(found.feature_id.tolist()))


def test_opposite_directions_are_the_farthest_and_there_are_no_more_neighbours_than_others() -> None:
    rows = np.vstack([np.eye(6), -np.eye(6)])
    found = nearest(unit_rows(rows), 30)
    assert found.feature_id.shape == (12, 11)
    assert found.feature_id[:, -1].tolist() == [*range(6, 12), *range(6)]
    np.testing.assert_array_equal(found.similarity[:, -1], -1)
    assert all(sorted([i, *others]) == list(range(12)) for i, others in enumerate(found.feature_id.tolist()))


@pytest.mark.parametrize("block", [1, 100, 1 << 24])
def test_of_equal_cosines_the_smaller_feature_id_comes_first(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(features, "_BLOCK_VALUES", block)
    neurons = np.vstack([np.eye(20), -np.eye(20)]).astype(np.float32)
    found = nearest(neurons, 5)
    assert found.feature_id[0].tolist() == [1, 2, 3, 4, 5]
    assert found.feature_id[3].tolist() == [0, 1, 2, 4, 5]
    np.testing.assert_array_equal(found.similarity, 0)
    # any orthogonal rows, as those of a PCA, whose cosines are 0 but for the error of float32
    components = np.linalg.qr(np.random.default_rng(0).standard_normal((20, 20)))[0]
    rotated = nearest(unit_rows(np.vstack([components, -components]).astype(np.float32)), 5)
    np.testing.assert_array_equal(rotated.feature_id, found.feature_id)
    twins = nearest(unit_rows(np.ones((12, 3))), 4)
    assert twins.feature_id[[0, 5]].tolist() == [[1, 2, 3, 4], [0, 1, 2, 3]]


@pytest.mark.slow
def test_features_of_a_kind_lie_together_and_the_same_seed_gives_the_same_map(rows: np.ndarray) -> None:
    directions = unit_rows(rows)
    points = lay_out(directions, nearest(directions, 14), FeatureMapConfig())
    index = NearestNeighbors(n_neighbors=5).fit(points).kneighbors(return_distance=False)
    assert (KINDS[index] == KINDS[:, None]).mean() > 0.95
    np.testing.assert_array_equal(lay_out(directions, nearest(directions, 20), FeatureMapConfig()), points)
    assert points.dtype == np.float32


def test_a_map_is_made_once_and_read_by_the_store(layout: Layout, rows: np.ndarray) -> None:
    assert not has_feature_map(layout, "5ae")
    made = features.feature_map(layout, "5ae", lambda: rows)
    assert has_feature_map(layout, "5ae")
    schemas.check("feature_umap", made.umap)
    schemas.check("feature_neighbour", made.neighbours)
    assert made.umap["feature_id"].to_list() == list(range(60))
    assert made.neighbours.height == 600
    assert made.neighbours.filter(feature_id=7)["rank"].to_list() == list(range(1, 11))
    assert (
        made.neighbours.filter(feature_id=7)["other_feature_id"].to_list()
        == nearest(unit_rows(rows), 10)[0][7].tolist()
    )
    again = features.feature_map(layout, "5ae", lambda: pytest.fail("nothing is left to make"))
    assert again.umap.equals(made.umap)
    assert again.neighbours.equals(made.neighbours)


def test_a_call_that_was_killed_between_the_tables_makes_the_second(
    layout: Layout, rows: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(features, "lay_out", killed)
    with pytest.raises(KeyboardInterrupt):
        features.feature_map(layout, "5ae", lambda: rows)
    monkeypatch.undo()
    folder = layout.feature_map_dir("5ae")
    before = (folder / "neighbours" / "part-00000.parquet").stat().st_mtime_ns
    assert not has_feature_map(layout, "5ae")
    features.feature_map(layout, "5ae", lambda: rows)
    assert (folder / "neighbours" / "part-00000.parquet").stat().st_mtime_ns == before
    assert [commit.verify(folder / name) for name in ("umap", "neighbours")] == [[], []]


def test_a_map_of_another_config_is_refused(layout: Layout, rows: np.ndarray) -> None:
    features.feature_map(layout, "5ae", lambda: rows)
    with pytest.raises(PlanMismatchError, match=r"min_dist.*0\.1.*0\.5"):
        features.feature_map(layout, "5ae", lambda: rows, FeatureMapConfig(min_dist=0.5))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.ones((9, 4)), "10 features; got 9"),
        (np.eye(12)[:, :11], r"row 11 .* 0\.0"),
        (np.where(np.arange(20)[:, None] == 3, np.nan, np.ones((20, 4))), "row 3 .* nan"),
    ],
)
def test_bad_decoder_rows_are_refused_and_nothing_is_written(layout: Layout, wrong: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        features.feature_map(layout, "5ae", lambda: wrong)
    assert not layout.feature_map_dir("5ae").exists()


@pytest.mark.parametrize("wrong", [{"n_neighbors": 1}, {"min_dist": 2}, {"n_kept": 0}, {"seed": -1}])
def test_an_impossible_config_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        FeatureMapConfig(**wrong)
