"""The map of the features by their labels: what a profile is, which lie together, and what has no map."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pytest
from scipy import sparse
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestNeighbors
from token_codes import TokenCodes, cut_of, toy_codes, write_codes
from toy_plans import toy_table

from feature_store import FeatureStore
from feature_store.errors import InputError, PlanMismatchError
from feature_store.maps import label_profiles
from feature_store.maps.label_profiles import ProfileMapConfig, has_profile_map, lay_out, profiles
from feature_store.storage import commit, schemas
from feature_store.storage.layout import ASSOCIATION_TABLES, Layout
from feature_store.storage.plans import AssociationsPlan

if TYPE_CHECKING:
    from pathlib import Path

KINDS = np.arange(60) % 3
LABELS = [("batch", "B"), ("cell_type", "B"), ("cell_type", "T"), ("cell_type", "a")]


@pytest.fixture
def planted() -> np.ndarray:
    """60 profiles over 4 labels, of three kinds."""
    rng = np.random.default_rng(0)
    return np.clip(0.6 * np.eye(3, 4)[KINDS] + 0.1 * rng.standard_normal((60, 4)), -1, 1)


def write(root: Path, planted: np.ndarray, *, labels: list[tuple[str, str]] = LABELS, dead: int = 59) -> Layout:
    """Associations with these profiles on `select` cells, their opposites on `test` cells, and one dead feature."""
    layout = Layout(root)
    ids = np.arange(len(planted))
    features = pl.DataFrame({"feature_id": ids, "density": 0.1, "dead": ids == dead})
    empty = {name: pl.lit(None) for name in schemas.schema("features").columns if name not in features.columns}
    rows = [
        {"feature_id": f, "label_kind": kind, "label": label, "split": split, "rank_biserial": sign * planted[f, place]}
        for split, sign in (("test", -1), ("select", 1))
        for place, (kind, label) in enumerate(labels)
        for f in reversed(ids.tolist())
        if np.isfinite(planted[f, place])
    ]
    table = pl.DataFrame(rows, infer_schema_length=None)
    none = {name: pl.lit(None) for name in schemas.schema("feature_label").columns if name not in table.columns}
    for name, frame in {
        "features": schemas.conform("features", features.with_columns(**empty)),
        "feature_label": schemas.conform("feature_label", table.with_columns(**none)),
        **{name: schemas.empty(name) for name in set(ASSOCIATION_TABLES) - {"features", "feature_label"}},
    }.items():
        commit.write_table(
            layout.associations_dir("a550c") / name,
            frame,
            toy_table(AssociationsPlan, codes="c0de", sae="5ae", dataset="toy"),
        )
    return layout


def write_toy_codes(layout: Layout) -> None:
    """The codes that the associations are of, of a few cells."""
    commit.write_table(layout.cells_dir("toy"), pl.DataFrame({"cell_idx": [0]}), {"table": "cells"})
    plan = toy_codes(cut_of(1, 1), sae="5ae", dataset="toy", n_features=60)
    zero = np.zeros(1, np.int32)
    tokens = TokenCodes(
        cell_idx=zero.astype(np.int64), token_pos=zero, gene_id=zero, codes=sparse.eye_array(1, 60).tocsr()
    )
    write_codes(layout.codes_dir("c0de"), plan, [tokens], np.array(["test"]))


def test_a_profile_has_the_correlation_on_select_cells_with_every_label_or_zero(
    tmp_path: Path, planted: np.ndarray
) -> None:
    planted[3, 1] = np.nan
    layout = write(tmp_path, planted)
    run = commit.Run.open(layout.associations_dir("a550c") / "feature_label")
    living = pl.Series(range(1, 59), dtype=pl.Int32)
    np.testing.assert_array_equal(profiles(run, living), np.nan_to_num(planted)[1:59])


def test_a_map_is_made_once_of_living_features_and_read_by_the_store(tmp_path: Path, planted: np.ndarray) -> None:
    layout = write(tmp_path, planted, dead=7)
    write_toy_codes(layout)
    assert not has_profile_map(layout, "a550c")
    assert "profile_umap" not in FeatureStore.open(tmp_path).tables()
    made = label_profiles.profile_map(layout, "a550c")
    assert has_profile_map(layout, "a550c")
    schemas.check("profile_umap", made)
    assert made["feature_id"].to_list() == [f for f in range(60) if f != 7]
    np.testing.assert_array_equal(made.select("x", "y").to_numpy(), lay_out(np.delete(planted, 7, axis=0)))
    folder = layout.profile_map_dir("a550c")
    before = (folder / "part-00000.parquet").stat().st_mtime_ns
    assert label_profiles.profile_map(layout, "a550c").equals(made)
    assert (folder / "part-00000.parquet").stat().st_mtime_ns == before
    assert commit.verify(folder) == []
    assert FeatureStore.open(tmp_path).frame("profile_umap").collect().equals(made)
    with pytest.raises(PlanMismatchError, match=r"min_dist.*0\.1.*0\.5"):
        label_profiles.profile_map(layout, "a550c", ProfileMapConfig(min_dist=0.5))


def test_features_of_a_kind_lie_together_and_the_same_seed_gives_the_same_map(planted: np.ndarray) -> None:
    points = lay_out(planted)
    index = NearestNeighbors(n_neighbors=5).fit(points).kneighbors(return_distance=False)
    assert (KINDS[index] == KINDS[:, None]).mean() > 0.95
    np.testing.assert_array_equal(lay_out(planted), points)
    assert points.dtype == np.float32


def test_the_neighbours_are_those_of_exact_euclidean_distances(
    planted: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def umap_from_neighbours(points: np.ndarray, index: np.ndarray, distance: np.ndarray, **_: Any) -> np.ndarray:
        given.update(index=index, distance=distance)
        return np.zeros((len(points), 2), dtype=np.float32)

    monkeypatch.setattr(label_profiles, "umap_from_neighbours", umap_from_neighbours)
    lay_out(planted, ProfileMapConfig(n_neighbors=8))
    exact = cdist(planted, planted)
    np.testing.assert_allclose(given["distance"], np.sort(exact, axis=1)[:, :8], atol=2e-3)
    np.testing.assert_allclose(np.take_along_axis(exact, given["index"], axis=1), given["distance"], atol=2e-3)
    np.testing.assert_array_equal(given["index"][:, 0], np.arange(60))


@pytest.mark.parametrize("n_alike", [40, 60])
def test_features_with_equal_profiles_have_finite_coordinates(planted: np.ndarray, n_alike: int) -> None:
    planted[:n_alike] = 0
    points = lay_out(planted)
    assert np.isfinite(points).all()
    assert len(points) == 60


@pytest.mark.parametrize(
    ("n_features", "labels", "message"),
    [
        (60, LABELS[:2], "3 labels; got 2"),
        (10, LABELS, "10 living features; got 9"),
    ],
)
def test_features_without_a_map_are_refused_and_nothing_is_written(
    tmp_path: Path, planted: np.ndarray, n_features: int, labels: list[tuple[str, str]], message: str
) -> None:
    layout = write(tmp_path, planted[:n_features], labels=labels, dead=n_features - 1)
    with pytest.raises(InputError, match=message):
        label_profiles.profile_map(layout, "a550c")
    assert not layout.profile_map_dir("a550c").exists()


@pytest.mark.parametrize("wrong", [{"n_neighbors": 1}, {"min_dist": 2}, {"seed": -1}])
def test_an_impossible_config_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        ProfileMapConfig(**wrong)
