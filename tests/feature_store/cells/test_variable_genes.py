"""Variable genes: those of scanpy's seurat_v3, whatever the shards, and nothing that a tiny batch decides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd
import polars as pl
import pytest
from loess_oracle import direct, give_scanpy_direct_loess, seurat_v3
from scipy import sparse

from feature_store.cells import (
    BatchSums,
    expected_counts,
    open_source,
    rank_genes,
    standardised_variance,
    sums_of_cells,
    train_batches,
    write_cells,
)
from feature_store.errors import InputError
from feature_store.storage.layout import Layout

if TYPE_CHECKING:
    from pathlib import Path

    from feature_store.cells import Source

N_CELLS, N_GENES, N = 360, 240, 40


@pytest.fixture(scope="module")
def cells() -> anndata.AnnData:
    """Counts of three batches of unequal size, in which other genes vary; the last genes are constant."""
    rng = np.random.default_rng(0)
    batch = rng.choice(["a", "b", "c"], N_CELLS, p=[0.5, 0.3, 0.2])
    mean = rng.gamma(0.6, 4.0, N_GENES)
    over = np.array([rng.permutation(np.r_[np.full(40, 2.5), np.full(N_GENES - 40, 0.1)]) for _ in range(3)])
    over = over[["abc".index(name) for name in batch]]
    counts = rng.poisson(mean * rng.gamma(1 / over, over))
    counts[:, -3:] = [0, 0, 1]
    obs = pd.DataFrame(
        {"batch": batch, "split": rng.choice(["train", "select", "test"], N_CELLS, p=[0.6, 0.2, 0.2])},
        index=[f"c{i}" for i in range(N_CELLS)],
    )
    var = pd.DataFrame(index=[f"G{i}" for i in range(N_GENES)])
    return anndata.AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=obs, var=var)


@pytest.fixture(scope="module")
def written(cells: anndata.AnnData, tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, dict[bool, Path]]:
    """The cells in a file, and their cell tables with batches and without."""
    folder = tmp_path_factory.mktemp("variable")
    cells.write_h5ad(folder / "cells.h5ad")
    source, layout = open_source(folder / "cells.h5ad"), Layout(folder / "store")
    names = {
        has: write_cells(layout, source, batch="batch" if has else None, split_column="split") for has in (False, True)
    }
    return source, {has: layout.cells_dir(name) for has, name in names.items()}


def chosen(source: Source, folder: Path, n: int, genes: Any = None, step: int = N_CELLS) -> Any:
    """The ranking, from passes over ranges of `step` cells."""
    genes = np.arange(N_GENES) if genes is None else genes
    batches = train_batches(folder)

    def sums(clip: Any = None) -> BatchSums:
        frames = []
        for start in range(0, N_CELLS, step):
            batch = batches.of_cells(folder, start, min(start + step, N_CELLS))
            frames.append(sums_of_cells(source, start, batch, genes, len(batches.n_cells), clip=clip).to_frame())
        return BatchSums.of_frames(frames, len(batches.n_cells), len(genes))

    of = expected_counts(sums(), batches.n_cells)
    return rank_genes(standardised_variance(sums(of.clip), of), n)


def by_scanpy(cells: anndata.AnnData, genes: Any, *, by_batch: bool) -> pd.DataFrame:
    train = cells[cells.obs["split"] == "train", genes].copy()
    return seurat_v3(train, N, batch_key="batch" if by_batch else None)


def same_as(found: Any, wanted: pd.DataFrame) -> None:
    assert set(found.order[:N]) == set(np.flatnonzero(wanted["highly_variable"]))
    np.testing.assert_allclose(found.variance, wanted["variances_norm"], rtol=1e-6)
    # two genes whose variances differ in the last digit may change places
    np.testing.assert_allclose(found.rank, wanted["highly_variable_rank"], atol=1)
    if "highly_variable_nbatches" in wanted:
        np.testing.assert_array_equal(found.n_batches, wanted["highly_variable_nbatches"])


@pytest.mark.parametrize("by_batch", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_moments_clipping_and_ranks_are_those_of_scanpy_with_the_same_curve(
    written: Any, cells: anndata.AnnData, monkeypatch: pytest.MonkeyPatch, by_batch: bool, every: int
) -> None:
    source, folders = written
    genes = np.arange(0, N_GENES, every)
    give_scanpy_direct_loess(monkeypatch)
    wanted = by_scanpy(cells, genes, by_batch=by_batch)
    # with its own curve, which is interpolated, the choice is nearly the same
    own = chosen(source, folders[by_batch], N, genes)
    assert len(set(own.order[:N]) & set(np.flatnonzero(wanted["highly_variable"]))) >= N - 2
    monkeypatch.setattr("feature_store.cells.loess.loess", direct)
    same_as(chosen(source, folders[by_batch], N, genes), wanted)


@pytest.mark.parametrize("by_batch", [False, True])
def test_the_choice_is_that_of_scanpy(written: Any, cells: anndata.AnnData, by_batch: bool) -> None:
    pytest.importorskip("skmisc", reason="scikit-misc, which scanpy's seurat_v3 needs, is not installed")
    source, folders = written
    same_as(chosen(source, folders[by_batch], N), by_scanpy(cells, np.arange(N_GENES), by_batch=by_batch))


def test_any_ranges_of_cells_give_the_same_numbers(written: Any) -> None:
    source, folders = written
    whole, cut = (chosen(source, folders[True], N, step=step) for step in (N_CELLS, 47))
    np.testing.assert_array_equal(whole.order, cut.order)
    np.testing.assert_allclose(whole.variance, cut.variance, rtol=1e-12)


def test_only_train_cells_have_a_say(written: Any, cells: anndata.AnnData, tmp_path: Path) -> None:
    other = cells.copy()
    counts = other.X.toarray()
    counts[(other.obs["split"] != "train").to_numpy()] = 1
    other.X = sparse.csr_matrix(counts)
    other.write_h5ad(tmp_path / "other.h5ad")
    layout = Layout(tmp_path / "store")
    with open_source(tmp_path / "other.h5ad") as source:
        folder = layout.cells_dir(write_cells(layout, source, batch="batch", split_column="split"))
        found = chosen(source, folder, N)
    np.testing.assert_array_equal(found.order, chosen(*_of(written), N).order)


def _of(written: Any) -> tuple[Any, Any]:
    return written[0], written[1][True]


def table_of(tmp_path: Path, cells: anndata.AnnData, batch: list[str | None]) -> Any:
    adata = cells.copy()
    adata.obs["lane"] = pd.Categorical(batch)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    layout = Layout(tmp_path / "store")
    with open_source(tmp_path / "cells.h5ad") as source:
        return train_batches(layout.cells_dir(write_cells(layout, source, batch="lane", split_column="split")))


def test_a_batch_of_few_cells_has_no_say_and_cells_without_a_batch_are_one(
    cells: anndata.AnnData, tmp_path: Path
) -> None:
    lane = ["x"] * 100 + [None] * (N_CELLS - 109) + ["few"] * 9
    found = table_of(tmp_path, cells, lane)
    train = (cells.obs["split"] == "train").to_numpy()
    assert found.n_cells == (train[100:-9].sum(), train[:100].sum())
    assert found.n_left_out == 1
    own = found.of_cells(Layout(tmp_path / "store").runs("cells")[0].path, 90, N_CELLS)
    assert len(own) == N_CELLS - 90
    np.testing.assert_array_equal(own >= 0, np.r_[train[90:-9], [False] * 9])
    assert set(own[:10][train[90:100]]) == {1}


def test_batches_that_are_all_tiny_count_as_one(cells: anndata.AnnData, tmp_path: Path) -> None:
    found = table_of(tmp_path, cells, [f"lane{i // 3}" for i in range(N_CELLS)])
    assert (found.names, found.n_left_out) == (None, 0)
    assert found.n_cells == ((cells.obs["split"] == "train").sum(),)


def test_too_few_train_cells_or_genes_that_vary_are_refused(cells: anndata.AnnData, tmp_path: Path) -> None:
    few = cells[:12].copy()
    few.obs["split"] = ["train", "select", "test"] * 4
    few.write_h5ad(tmp_path / "few.h5ad")
    layout = Layout(tmp_path / "store")
    with open_source(tmp_path / "few.h5ad") as source:
        folder = layout.cells_dir(write_cells(layout, source, split_column="split"))
    with pytest.raises(InputError, match=r"there are 4, and 10 are needed.*--genes FILE"):
        train_batches(folder)
    flat = BatchSums(np.full((1, 6), 20.0), np.full((1, 6), 40.0) + np.eye(1, 6))
    with pytest.raises(InputError, match=r"1 genes vary.*--genes FILE"):
        expected_counts(flat, (10,))


def test_the_median_rank_comes_first_and_then_the_number_of_batches() -> None:
    variance = np.array([[9.0, 8, 7, 6, 1, 0], [1, 8, 7, 0, 9, 2], [1.0, 8, 9, 0, 2, 3]])
    found = rank_genes(variance, 2)
    # ranks below 2: gene 0: 0; gene 1: 1 1 1; gene 2: 0; gene 4: 0
    assert found.order[:4].tolist() == [0, 2, 4, 1]
    assert found.n_batches.tolist() == [1, 3, 1, 0, 1, 0]
    np.testing.assert_array_equal(found.rank, [0, 1, 0, np.nan, 0, np.nan])
    tied = rank_genes(np.array([[9.0, 8, 7], [8.0, 9, 1], [8.0, 9, 1]])[:, ::-1], 1)
    assert tied.order.tolist() == [1, 2, 0], "two batches before one"


def test_sums_are_kept_where_there_are_values(written: Any) -> None:
    source, folder = _of(written)
    batches = train_batches(folder)
    sums = sums_of_cells(source, 0, batches.of_cells(folder, 0, N_CELLS), np.arange(N_GENES), len(batches.n_cells))
    frame = sums.to_frame()
    assert frame.filter(pl.col("total") == 0).is_empty()
    again = BatchSums.of_frames([frame], *sums.total.shape)
    np.testing.assert_array_equal(again.total, sums.total)
    np.testing.assert_array_equal(again.squares, sums.squares)
