"""Steered cells in two dimensions, against PCA of scikit-learn, distances of scipy and what must not move."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pytest
from scipy.spatial.distance import cdist
from sklearn.decomposition import PCA
from toy_plans import toy_plan

from feature_store.errors import InputError, NotFoundError, PlanMismatchError
from feature_store.maps.steered_cells import (
    SteeringMapConfig,
    UnsteeredMap,
    has_embeddings,
    mapped_variants,
    sample,
    steering_map,
)
from feature_store.storage import commit, schemas
from feature_store.storage.layout import Layout
from feature_store.storage.plans import SteeringPlan

if TYPE_CHECKING:
    from pathlib import Path

WIDTH, N_CELLS, RUN = 6, 90, "57ee4"
ROLES = ("unsteered", "grid", "grid", "null", "null", "reconstruction")


def embeddings() -> np.ndarray[Any, np.dtype[np.float64]]:
    """Three clouds in different places, of ordinary cells [N_CELLS WIDTH]."""
    rng = np.random.default_rng(1)
    centres = rng.normal(scale=4, size=(3, WIDTH))
    return centres[np.arange(N_CELLS) % 3] + rng.normal(scale=0.5, size=(N_CELLS, WIDTH))


def write_run(root: Path) -> Layout:
    """Test cells 30 to 89 under six variants, in two parts; of variant 1 only a third, of cell 31 no number."""
    layout, points = Layout(root), embeddings()
    i = np.arange(N_CELLS)
    cells = pl.DataFrame(
        {
            "cell_idx": i,
            "split": np.where(i < 30, "train", "test"),
            "cell_type": [None if n == 32 else f"type {n % 3}" for n in i],
        }
    )
    commit.write_table(layout.cells_dir("toy"), cells, {"dataset": "toy"})
    folder = layout.steering_dir(RUN)
    run = commit.Run.create(
        folder / "per_cell",
        toy_plan(SteeringPlan, dataset="toy", kind="cell_type").table("per_cell", n_shards=2),
    )
    for shard in run.pending():
        own = i[shard * 45 : shard * 45 + 45]
        frames = [rows_of(own, points, variant) for variant in range(len(ROLES))]
        frame = pl.concat(frames).sort("cell_idx", "variant")
        run.commit_shard(shard, lambda path, frame=frame: commit.write_frame(path, frame), start=shard, stop=shard + 1)
    run.finalize()
    commit.write_table(folder / "variants", variants(), {"table": "variants"})
    return layout


def rows_of(cells: np.ndarray[Any, Any], points: np.ndarray[Any, Any], variant: int) -> pl.DataFrame:
    """Variant 2 puts every cell where the next of its type is; the others move them by their number."""
    own = cells if variant == 0 else cells[cells >= 30]
    own = own[own % 3 == 0] if variant == 1 else own
    moved = np.roll(points, -3, axis=0)[own] if variant == 2 else points[own] + 0.3 * variant
    moved[own == 31] = np.nan
    frame = pl.DataFrame({"cell_idx": own, "embedding": moved.astype(np.float32)})
    return frame.select(
        "cell_idx", pl.lit(variant, pl.Int32).alias("variant"), pl.col("embedding").cast(pl.Array(pl.Float32, WIDTH))
    )


def variants() -> pl.DataFrame:
    rows = [
        {"variant": i, "name": role, "role": role, "null": None, "intervention": None, "n_features": 0, "dose": None,
         "mode": "delta", "draw": int(i == 4), "features": [], "chosen": i == 1}
        for i, role in enumerate(ROLES)
    ]  # fmt: skip
    return schemas.conform("steering_variants", pl.DataFrame(rows, infer_schema_length=None))


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return write_run(tmp_path_factory.mktemp("steered") / "store")


@pytest.fixture(scope="module")
def table(layout: Layout) -> pl.DataFrame:
    return steering_map(layout, RUN)


@pytest.fixture(scope="module")
def fixed() -> UnsteeredMap:
    return UnsteeredMap(embedding=embeddings(), config=SteeringMapConfig())


def test_a_map_has_the_test_cells_with_label_and_token_under_every_variant_that_moves_them(table: pl.DataFrame) -> None:
    schemas.check("steering_map", table)
    assert table.equals(table.sort("variant", "cell_idx"))
    every = [n for n in range(30, 90) if n not in (31, 32)]
    assert table.filter(variant=0)["cell_idx"].to_list() == every
    assert table.filter(variant=1)["cell_idx"].to_list() == [n for n in every if n % 3 == 0]
    assert table["variant"].unique().to_list() == [0, 1, 2, 3, 5]


def test_later_draws_of_a_null_are_left_out() -> None:
    assert mapped_variants(variants())["variant"].to_list() == [0, 1, 2, 3, 5]


def test_components_are_those_of_unsteered_cells_with_steered_ones_projected(table: pl.DataFrame) -> None:
    points = embeddings().astype(np.float32).astype(np.float64)
    own = table.filter(variant=0)["cell_idx"].to_numpy()
    fitted = PCA(2).fit(points[own])
    for variant, moved in ((0, points), (3, points + 0.9)):
        rows = table.filter(variant=variant)
        expected = fitted.transform(moved[rows["cell_idx"].to_numpy()])
        np.testing.assert_allclose(np.abs(rows.select("pc1", "pc2").to_numpy()), np.abs(expected), atol=1e-4)


def test_a_cell_moved_onto_another_lies_where_that_one_lies(table: pl.DataFrame) -> None:
    before = table.filter(variant=0)
    moved = table.filter(pl.col("variant") == 2).with_columns(onto=pl.col("cell_idx") + 3)
    both = moved.join(before, left_on="onto", right_on="cell_idx", suffix="_onto")
    assert both.height >= 50
    for name in ("pc1", "pc2", "x", "y"):
        np.testing.assert_allclose(both[name], both[f"{name}_onto"], atol=1e-4)
    assert both["gap"].max() < 1e-4  # type: ignore[operator]


def test_a_cell_that_is_not_moved_stays_where_it_is(fixed: UnsteeredMap) -> None:
    np.testing.assert_allclose(fixed.coordinates(fixed.embedding)[:, :4], fixed.unsteered[:, :4], atol=1e-6)


def test_coordinates_change_continuously_with_the_embedding(fixed: UnsteeredMap) -> None:
    step = np.random.default_rng(0).normal(size=fixed.embedding.shape)
    moved = [
        np.abs(fixed.coordinates(fixed.embedding + size * step) - fixed.unsteered)[:, :4].max() for size in (1e-6, 1e-3)
    ]
    assert moved[0] < 1e-4
    assert moved[1] < 0.02


def test_gap_is_the_distance_to_the_nearest_unsteered_cell_in_units_of_theirs(fixed: UnsteeredMap) -> None:
    points = fixed.embedding
    among = cdist(points, points)
    np.fill_diagonal(among, np.inf)
    unit = np.median(among.min(axis=1))
    np.testing.assert_allclose(fixed.unsteered[:, 4], among.min(axis=1) / unit, rtol=1e-6)
    away = points + 7.0
    np.testing.assert_allclose(fixed.coordinates(away)[:, 4], cdist(away, points).min(axis=1) / unit, rtol=1e-6)


def test_a_umap_cannot_show_a_cell_that_left_the_others_and_the_gap_does(fixed: UnsteeredMap) -> None:
    far = fixed.coordinates(fixed.embedding + 1000.0)
    low, high = fixed.umap.min(axis=0), fixed.umap.max(axis=0)
    assert ((far[:, 2:4] >= low) & (far[:, 2:4] <= high)).all()
    assert far[:, 4].min() > 100


def test_neighbours_on_the_umap_belong_to_the_same_cloud(fixed: UnsteeredMap) -> None:
    among = cdist(fixed.umap, fixed.umap)
    np.fill_diagonal(among, np.inf)
    assert (among.argmin(axis=1) % 3 == np.arange(N_CELLS) % 3).mean() > 0.95


def test_a_sample_keeps_the_proportions_of_labels_and_repeats() -> None:
    labels = np.repeat(["a", "b", "c"], [600, 300, 100])
    cells = pl.DataFrame({"cell_idx": np.random.default_rng(3).permutation(1000), "label": labels})
    config = SteeringMapConfig(max_cells=100)
    taken = sample(cells, config)
    counts = dict(taken["label"].value_counts().iter_rows())
    assert {name: abs(counts[name] - n) <= 1 for name, n in (("a", 60), ("b", 30), ("c", 10))} == dict.fromkeys(
        "abc", True
    )
    assert taken["cell_idx"].is_sorted()
    assert taken["cell_idx"].n_unique() == 100
    assert taken.equals(sample(cells, config))
    assert not taken.equals(sample(cells, SteeringMapConfig(max_cells=100, seed=1)))


def test_a_map_is_made_once_and_refuses_another_config(layout: Layout, table: pl.DataFrame) -> None:
    manifest = (layout.steering_dir(RUN) / "map" / "MANIFEST.json").stat().st_mtime_ns
    assert steering_map(layout, RUN).equals(table)
    assert (layout.steering_dir(RUN) / "map" / "MANIFEST.json").stat().st_mtime_ns == manifest
    with pytest.raises(PlanMismatchError, match="seed"):
        steering_map(layout, RUN, SteeringMapConfig(seed=1))


def test_the_same_seed_gives_the_same_map(layout: Layout, table: pl.DataFrame, tmp_path: Path) -> None:
    again = steering_map(write_run(tmp_path / "again"), RUN)
    assert again.equals(table)


def test_too_few_cells_give_a_map_without_rows(tmp_path: Path) -> None:
    layout = write_run(tmp_path / "store")
    folder = layout.cells_dir("toy")
    cells = commit.read_table(folder).with_columns(
        cell_type=pl.when(pl.col("cell_idx") > 84).then(pl.lit("only a few"))
    )
    few = Layout(tmp_path / "few")
    (tmp_path / "few" / "steering").mkdir(parents=True)
    (tmp_path / "store" / "steering" / RUN).rename(tmp_path / "few" / "steering" / RUN)
    commit.write_table(few.cells_dir("toy"), cells, {"dataset": "toy"})
    assert steering_map(few, RUN).is_empty()


def test_a_run_without_embeddings_has_no_map(layout: Layout) -> None:
    assert has_embeddings(layout, RUN)
    assert not has_embeddings(layout, "07he5")
    with pytest.raises(NotFoundError):
        steering_map(layout, "07he5")


@pytest.mark.parametrize("wrong", [{"max_cells": 9}, {"n_neighbors": 1}, {"min_dist": 2.0}, {"seed": -1}])
def test_an_impossible_config_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        SteeringMapConfig(**wrong)
