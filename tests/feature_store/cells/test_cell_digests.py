"""The same cell is recognised in another file, and another cell is not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anndata
import numpy as np
import pandas as pd
import polars as pl
import pytest
from cell_tables import written_cells
from scipy import sparse

from feature_store.cells import open_source, read_split_record
from feature_store.cells.cell_digests import MIN_GENES, known_cells, row_digests
from feature_store.cells.gene_table import matrix_tables
from feature_store.cells.matrices import CSRRows
from feature_store.errors import InputError
from feature_store.storage.layout import Layout
from feature_store.storage.schemas import SPLITS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from feature_store.cells import Source

N_CELLS, N_GENES = 60, 150
IDS = [f"ENSG{i:011d}" for i in range(N_GENES)]


@pytest.fixture
def adata(rng: np.random.Generator) -> anndata.AnnData:
    depth = rng.lognormal(0, 0.7, (N_CELLS, 1))
    counts = rng.poisson(depth * rng.gamma(0.5, 1.5, N_GENES)).astype(np.float32)
    obs = pd.DataFrame(
        {"person": [f"p{i % 6}" for i in range(N_CELLS)], "lane": [f"l{i // 6 % 2}" for i in range(N_CELLS)]},
        index=[f"cell {i}" for i in range(N_CELLS)],
    )
    var = pd.DataFrame({"gene_ids": IDS}, index=[f"G{i}" for i in range(N_GENES)])
    return anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=var)


def log_normalised(a: anndata.AnnData) -> anndata.AnnData:
    counts = a.X.toarray()
    a.X = np.log1p(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) * np.float32(1e4))
    return a


def other_names(a: anndata.AnnData) -> anndata.AnnData:
    a.obs_names = [f"s1_{i}" for i in range(a.n_obs)]
    return a


def with_x(a: anndata.AnnData, change: Callable[[sparse.csr_matrix], object]) -> anndata.AnnData:
    a.X = change(a.X)
    return a


def without_symbols(a: anndata.AnnData) -> anndata.AnnData:
    a.var = pd.DataFrame(index=a.var["gene_ids"])
    return a


def without_ids(a: anndata.AnnData) -> anndata.AnnData:
    a.var = a.var[[]]
    return a


COPIES: dict[str, Callable[[anndata.AnnData], anndata.AnnData]] = {
    "written again": lambda a: a,
    "other cell names": other_names,
    "another order of cells": lambda a: a[::-1].copy(),
    "another order of genes": lambda a: other_names(a[:, ::-1].copy()),
    "without genes that no cell has": lambda a: other_names(a[:, np.asarray(a.X.sum(axis=0)).ravel() > 0].copy()),
    "integers": lambda a: other_names(with_x(a, lambda x: x.astype(np.int32))),
    "dense": lambda a: other_names(with_x(a, lambda x: x.toarray().astype(np.float64))),
    "log-normalised": lambda a: other_names(log_normalised(a)),
    "Ensembl ids alone": lambda a: other_names(without_symbols(a)),
    "symbols alone": lambda a: other_names(without_ids(a)),
    "a part of the cells": lambda a: other_names(a[10:40].copy()),
}


def write(a: anndata.AnnData, path: Path) -> Source:
    a.write_h5ad(path)
    return open_source(path)


@pytest.fixture
def trained(adata: anndata.AnnData, tmp_path: Path) -> tuple[Layout, str, dict[str, str]]:
    """A store with a data set that an SAE was trained on, its name, and the split of each of its cells."""
    layout = Layout(tmp_path / "store")
    cells = written_cells(layout, write(adata, tmp_path / "own.h5ad"), donor="person")
    return layout, cells["dataset"][0], dict(cells.select("cell_id", "split").iter_rows())


@pytest.mark.parametrize("copy", COPIES)
def test_a_cell_keeps_its_split_in_another_file_without_any_option(
    copy: str, adata: anndata.AnnData, trained: tuple[Layout, str, dict[str, str]], tmp_path: Path
) -> None:
    layout, dataset, split_of = trained
    adata.obs["own name"] = adata.obs_names.to_numpy()
    cells = written_cells(layout, write(COPIES[copy](adata.copy()), tmp_path / "copy.h5ad"), trained_on=dataset)
    assert cells["split"].to_list() == [split_of[name] for name in cells["own name"]]
    record = read_split_record(layout.cells_dir(cells["dataset"][0]))
    assert record.n_kept == cells.height


def test_the_same_file_keeps_its_splits_and_is_the_same_data_set_only_with_the_same_options(
    trained: tuple[Layout, str, dict[str, str]], tmp_path: Path
) -> None:
    layout, dataset, split_of = trained
    source = open_source(tmp_path / "own.h5ad")
    for options in ({}, {"batch": "lane"}, {"donor": "lane"}, {"donor": "person", "labels": ["lane"]}):
        cells = written_cells(layout, source, trained_on=dataset, **options)
        assert cells["split"].to_list() == list(split_of.values()), options
        assert cells["dataset"][0] != dataset
    assert written_cells(layout, source, trained_on=dataset, donor="person")["dataset"][0] == dataset
    assert written_cells(layout, source)["split"].to_list() != list(split_of.values())


def test_a_column_of_splits_that_moves_known_cells_is_an_error(
    adata: anndata.AnnData, trained: tuple[Layout, str, dict[str, str]], tmp_path: Path
) -> None:
    layout, dataset, split_of = trained
    adata.obs["fold"] = [SPLITS[i % 3] for i in range(N_CELLS)]
    moved = write(adata, tmp_path / "moved.h5ad")
    with pytest.raises(InputError, match=r"'fold'.*cells that the SAE knows.*leave --split out"):
        written_cells(layout, moved, split_column="fold", trained_on=dataset)
    adata.obs["fold"] = list(split_of.values())
    kept = written_cells(layout, write(adata, tmp_path / "kept.h5ad"), split_column="fold", trained_on=dataset)
    assert kept["split"].to_list() == list(split_of.values())


def test_cells_of_another_experiment_are_new_though_their_names_are_known(
    adata: anndata.AnnData, trained: tuple[Layout, str, dict[str, str]], rng: np.random.Generator, tmp_path: Path
) -> None:
    layout, dataset, _ = trained
    other = adata[rng.permutation(N_CELLS)].copy()
    other.X = sparse.csr_matrix(rng.poisson(other.X.toarray() + 0.3).astype(np.float32))
    other.obs_names = adata.obs_names
    source = write(other, tmp_path / "other.h5ad")
    found = written_cells(layout, source, trained_on=dataset)
    assert found["dataset"][0] == written_cells(layout, source)["dataset"][0]
    assert read_split_record(layout.cells_dir(found["dataset"][0])).n_kept == 0


def test_a_file_joined_with_new_cells_keeps_the_known_ones_and_holds_out_the_others(
    adata: anndata.AnnData, trained: tuple[Layout, str, dict[str, str]], rng: np.random.Generator, tmp_path: Path
) -> None:
    layout, dataset, split_of = trained
    new = adata[:20].copy()
    new.X = sparse.csr_matrix(rng.poisson(1.0, new.shape).astype(np.float32))
    new.obs_names = [f"new {i}" for i in range(20)]
    # other symbols in the file before: the digest of a cell is that of its own file
    new.var_names = [f"old {name}" for name in new.var_names]
    new.write_h5ad(tmp_path / "new.h5ad")
    cells = written_cells(layout, open_source([tmp_path / "new.h5ad", tmp_path / "own.h5ad"]), trained_on=dataset)
    assert cells["split"].to_list()[20:] == list(split_of.values())
    assert set(cells["split"].to_list()[:20]) == {"select", "test"}


def test_a_selection_of_genes_is_recognised_by_the_names_of_the_cells(
    adata: anndata.AnnData, trained: tuple[Layout, str, dict[str, str]], tmp_path: Path
) -> None:
    layout, dataset, split_of = trained
    few = adata[:, :100].copy()
    cells = written_cells(layout, write(few, tmp_path / "few.h5ad"), trained_on=dataset)
    assert cells["split"].to_list() == list(split_of.values())


def test_the_digest_is_that_of_the_ranks_and_names_of_the_genes(rng: np.random.Generator) -> None:
    dense = rng.poisson(2.0, (30, 50)).astype(np.float32)
    dense[3] = 0
    rows = sparse.csr_array(dense)
    genes = rng.integers(0, 2**63, 50, dtype=np.uint64)
    n, (digest,) = row_digests(CSRRows(rows.indptr.astype(np.int64), rows.indices, rows.data), [genes])
    assert n.tolist() == (dense > 0).sum(axis=1).tolist()
    assert len(set(digest.tolist())) == 30
    one_by_one = [
        row_digests(CSRRows(np.array([0, row.nnz]), row.indices, row.data), [genes])[1][0][0]
        for row in (sparse.csr_array(dense[i : i + 1]) for i in range(30))
    ]
    assert digest.tolist() == one_by_one
    swapped = dense.copy()
    swapped[0, :2] = [1, 2] if dense[0, 0] != 1 else [2, 1]
    again = sparse.csr_array(swapped)
    other = row_digests(CSRRows(again.indptr.astype(np.int64), again.indices, again.data), [genes])[1][0]
    assert (other[1:] == digest[1:]).all()
    assert other[0] != digest[0]


def test_cells_of_few_genes_need_the_same_name_and_repeated_cells_are_not_held_out() -> None:
    def frame(ids: list[str], digests: list[int], n: int, **columns: object) -> pl.DataFrame:
        none = [None] * len(ids)
        table = {"cell_id": ids, "n_detected": [n] * len(ids), "symbol_digest": digests, "ensembl_digest": none}
        types = {"symbol_digest": pl.UInt64, "ensembl_digest": pl.UInt64}
        return pl.DataFrame({**table, **columns}, schema_overrides=types)

    known = {"split": ["test", "train", "select"]}
    for n, expected in ((MIN_GENES - 1, [2, -1, -1, -1]), (MIN_GENES, [2, 0, 1, -1])):
        theirs = frame(["a", "b", "c"], [7, 7, 8], n, **known)
        mine = frame(["a", "x", "y", "a"], [7, 7, 8, 9], n)
        # without the trust in names that a majority gives
        padded = pl.concat([mine, frame([f"z{i}" for i in range(20)], list(range(100, 120)), n)])
        assert known_cells(padded, theirs)[:4].tolist() == expected


def test_digests_of_joined_files_do_not_depend_on_the_other_file(adata: anndata.AnnData, tmp_path: Path) -> None:
    alone = matrix_tables(write(adata, tmp_path / "own.h5ad")).digests
    other = adata[:30, 20:].copy()
    other.var_names = [f"H{i}" for i in range(other.n_vars)]
    other.write_h5ad(tmp_path / "other.h5ad")
    both = matrix_tables(open_source([tmp_path / "other.h5ad", tmp_path / "own.h5ad"])).digests
    columns = ["n_detected", "symbol_digest", "ensembl_digest"]
    assert both[30:].select(columns).equals(alone.select(columns))
