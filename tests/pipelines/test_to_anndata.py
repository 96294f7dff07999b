"""`FeatureStore.to_anndata` of a store that the stages made: expression, vectors and map beside codes, in scanpy."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import anndata
import matplotlib as mpl
import numpy as np
import polars as pl
import pytest
import scanpy as sc
import scipy.sparse as sp

import scsae
from feature_store.activations import ActivationReader
from feature_store.errors import QueryError
from feature_store.storage import commit, schemas
from feature_store.storage.layout import Layout

N, N_PANEL, N_SAMPLE = 72, 40, 50


@dataclass(frozen=True)
class Stored:
    """A store, the file that it was made of, and the ids of its runs."""

    root: Path
    file: Path
    activations: str
    codes: str

    def open(self) -> scsae.FeatureStore:
        return scsae.open(self.root)


def made(root: Path, file: Path, model: Path, **options) -> Stored:
    """Every stage up to the associations."""
    (extracted,) = scsae.extract(file, model=model, layer=1, dtype="f32", cell_type="type", store=root, **options)
    scsae.train(n_features=12, k=4, n_steps=30, batch_size=64, num_workers=0, store=root)
    codes = scsae.encode(store=root)
    scsae.associate(store=root)
    return Stored(root, file, extracted.run, codes.run)


@pytest.fixture(scope="module")
def stages(module_without_actors):
    """No actors, and nothing registered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.train.register_sae", lambda *_, **__: "nowhere")
        yield


@pytest.fixture(scope="module")
def stored(stages, tiny_data, tiny_model, tmp_path_factory) -> Stored:
    """40 of the 72 cells are the panel, activations are of 50 cells, and the map has all cells but the first two."""
    folder = tmp_path_factory.mktemp("to_anndata")
    file = Path(shutil.copy(tiny_data, folder / "cells.h5ad"))
    one = made(folder / "store", file, tiny_model, panel=N_PANEL, cells=N_SAMPLE, donor="donor")
    places = pl.DataFrame({"cell_idx": range(2, N), "x": np.arange(2.0, N), "y": -np.arange(2.0, N)})
    commit.write_table(Layout(one.root).umap_dir(one.codes), schemas.conform("umap", places), {})
    return one


@pytest.fixture
def own(stored, tmp_path) -> Stored:
    """A copy of the store and its file, to damage."""
    return Stored(shutil.copytree(stored.root, tmp_path / "own"), stored.file, stored.activations, stored.codes)


@pytest.fixture(scope="module")
def lognorm(tiny_cells) -> np.ndarray:
    """What scanpy makes of the counts."""
    cells = tiny_cells.copy()
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    return cells.X.toarray()


def test_x_is_what_scanpy_makes_of_the_counts_in_the_order_asked_for(stored, lognorm, tiny_cells):
    store = stored.open()
    adata = store.to_anndata()
    assert {matrix.format for matrix in (adata.X, adata.obsm["X_sae"])} == {"csr"}
    # 8 bytes a value
    assert {str(m.dtype) for m in (adata.X, adata.X.indices, adata.obsm["X_sae"].indices)} == {"float32", "int32"}
    np.testing.assert_allclose(adata.X.toarray(), lognorm, rtol=1e-6)
    assert adata.var_names.to_list() == tiny_cells.var_names.to_list()
    some = store.to_anndata(cells=[30, "cell2", 17])
    np.testing.assert_allclose(some.X.toarray(), lognorm[[30, 2, 17]], rtol=1e-6)
    counts = store.to_anndata(cells=[30, "cell2", 17], X="counts")
    assert sp.issparse(counts.X)
    assert (counts.X.toarray() == tiny_cells.X.toarray()[[30, 2, 17]]).all()
    assert store.to_anndata(cells=[], X="counts").shape == (0, 30)


def test_expression_of_the_panel_comes_from_the_store_and_equals_that_of_the_file(stored, own):
    panel = stored.open().to_anndata(cells=pl.col("panel"))
    assert panel.n_obs == N_PANEL
    stored.file.rename(stored.file.with_suffix(".away"))
    try:
        without_file = own.open().to_anndata(cells=pl.col("panel"))
        assert (without_file.X != panel.X).nnz == 0
        for options in ({}, {"cells": pl.col("panel"), "X": "counts"}):
            with pytest.raises(QueryError, match=r"cells\.h5ad, which is not there.*--data NEWPATH.*X=None"):
                own.open().to_anndata(**options)
        assert own.open().to_anndata(X=None).shape == (N, 0)
    finally:
        stored.file.with_suffix(".away").rename(stored.file)
    (dataset,) = Layout(own.root).runs("cells")
    shutil.rmtree(dataset.path / "expression")
    (Layout(own.root).root / "commits" / f"cells~{dataset.run}~expression.json").unlink()
    read_again = own.open().to_anndata(cells=pl.col("panel"))
    np.testing.assert_array_equal(read_again.X.toarray(), panel.X.toarray())


def test_a_file_that_changed_is_refused(own, tiny_cells):
    before = own.file.read_bytes()
    try:
        tiny_cells[::-1].copy().write_h5ad(own.file)
        with pytest.raises(QueryError, match=r"cells\.h5ad changed since its extraction.*X=None"):
            own.open().to_anndata(X="counts")
    finally:
        own.file.write_bytes(before)


def test_x_that_cannot_be_had_is_one_sentence(stored, stages, tiny_cells, tiny_model, lognorm, tmp_path):
    with pytest.raises(QueryError, match=r"'count'; did you mean 'counts'\?"):
        stored.open().to_anndata(X="count")
    cells = tiny_cells.copy()
    cells.X = sp.csr_matrix(lognorm)
    cells.write_h5ad(tmp_path / "log.h5ad")
    of_log = made(tmp_path / "store", tmp_path / "log.h5ad", tiny_model).open()
    with pytest.raises(QueryError, match=r"\(X\) holds log-normalised values; take X='lognorm'"):
        of_log.to_anndata(X="counts")
    np.testing.assert_allclose(of_log.to_anndata().X.toarray(), lognorm, rtol=1e-6)


def test_a_matrix_that_lies_by_gene_is_read_from_its_parts_of_whole_cells(stages, tiny_cells, tiny_model, tmp_path):
    cells = tiny_cells.copy()
    cells.X = sp.csc_matrix(cells.X)
    cells.write_h5ad(tmp_path / "by_gene.h5ad")
    one = made(tmp_path / "store", tmp_path / "by_gene.h5ad", tiny_model)
    adata = one.open().to_anndata(X="counts")
    assert adata.X.format == "csr"
    assert (adata.X.toarray() == tiny_cells.X.toarray()).all()
    shutil.rmtree(one.root / "rows")
    with pytest.raises(QueryError, match=r"scsae associate --store"):
        one.open().to_anndata(X="counts")
    assert not (one.root / "rows").exists()


def test_vectors_of_the_model_are_the_means_of_the_stored_tokens_and_nan_without_any(stored, own):
    adata = stored.open().to_anndata(cells=range(N)[::-1])
    run = commit.Run.open(Layout(stored.root).activations_dir(stored.activations))
    reader = ActivationReader(run)
    tokens: dict[int, list[np.ndarray]] = {}
    for group in reader.row_groups:
        block = reader.read(group.shard, group.group)
        for cell, act in zip(block.cell_idx.tolist(), block.act_f32(), strict=True):
            tokens.setdefault(cell, []).append(act)
    assert len(tokens) == N_SAMPLE
    for row, cell in enumerate(range(N)[::-1]):
        vector = adata.obsm["X_model"][row]
        if cell in tokens:
            np.testing.assert_allclose(vector, np.mean(np.array(tokens[cell], np.float64), axis=0), rtol=1e-6)
        else:
            assert np.isnan(vector).all()
    assert "X_model" not in stored.open().to_anndata(model=False).obsm
    shutil.rmtree(Layout(own.root).activations_dir(own.activations))
    assert "X_model" not in own.open().to_anndata().obsm


def test_the_map_is_there_where_it_was_drawn(stored, own):
    places = stored.open().to_anndata(cells=[7, 0, 3]).obsm["X_umap"]
    np.testing.assert_array_equal(places, [[7, -7], [np.nan, np.nan], [3, -3]])
    (Layout(own.root).root / "commits" / f"codes~{own.codes}~umap.json").unlink()
    shutil.rmtree(Layout(own.root).umap_dir(own.codes))
    opened = own.open()
    assert "X_umap" not in opened.to_anndata().obsm
    # a map that was drawn since counts
    shutil.copytree(Layout(stored.root).umap_dir(own.codes), Layout(own.root).umap_dir(own.codes))
    assert opened.to_anndata().obsm["X_umap"].shape == (N, 2)


def test_features_can_be_the_columns_with_their_table_as_var(stored):
    store = stored.open()
    adata = store.to_anndata(features=[5, 3], features_as_var=True)
    codes = store.to_anndata(features=[5, 3], X=None).obsm["X_sae"]
    assert (adata.X != codes).nnz == 0
    assert sp.issparse(adata.X)
    assert adata.var_names.to_list() == ["feature 5", "feature 3"]
    table = {row["feature_id"]: row for row in store.sql("SELECT * FROM features").iter_rows(named=True)}
    assert adata.var["density"].to_list() == [table[5]["density"], table[3]["density"]]
    assert "X_sae" not in adata.obsm
    assert "X_model" in adata.obsm
    with pytest.raises(QueryError, match=r"\[3, 3\].*once"):
        store.to_anndata(features=[3, 3], features_as_var=True)


def check_cellxgene(adata: anndata.AnnData) -> None:
    """The rules of cellxgene for a file that it shows: unique names, numbers in X, and maps of finite values or NaN."""
    assert adata.obs_names.is_unique
    assert adata.var_names.is_unique
    assert adata.X.dtype == np.float32
    assert np.isfinite(adata.X.data).all()
    shown = adata.obsm["X_umap"]
    assert type(shown) is np.ndarray
    assert (shown.dtype.kind, shown.shape) == ("f", (adata.n_obs, 2))
    assert not np.isinf(shown).any()
    assert not np.isnan(shown).all()
    assert all(column.dtype.kind in "biuf" or column.dtype == "category" for _, column in adata.obs.items())


@pytest.mark.filterwarnings("ignore:The set_bad function:PendingDeprecationWarning")  # scanpy's use of matplotlib
@pytest.mark.parametrize("features_as_var", [False, True])
def test_the_written_file_opens_in_scanpy_and_follows_cellxgene(stored, tmp_path, features_as_var):
    stored.open().to_anndata(features_as_var=features_as_var).write_h5ad(tmp_path / "store.h5ad")
    adata = sc.read_h5ad(tmp_path / "store.h5ad")
    check_cellxgene(adata)
    name = "feature 3" if features_as_var else "GENE3"
    with mpl.rc_context({"backend": "agg"}):
        first, second = sc.pl.umap(adata, color=["cell_type", name], show=False)
        # a cell without a place is not drawn, and all others are
        assert np.isfinite(np.ma.filled(first.collections[0].get_offsets(), np.nan)).all(axis=1).sum() == N - 2
        assert second.get_title() == name
        (axes,) = [sc.pl.embedding(adata, basis="X_model", color=name, show=False)]
        assert axes.get_title() == name
    sc.tl.rank_genes_groups(adata, "cell_type", method="wilcoxon")
    found = sc.get.rank_genes_groups_df(adata, group="A")
    assert set(found["names"]) == set(adata.var_names)
    if not features_as_var:
        # genes 0-9 are high in type A
        assert set(found["names"][:10]) == {f"GENE{i}" for i in range(10)}
