"""The pass over a matrix: the same tables whatever the shards, and no second pass over the same content."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anndata
import numpy as np
import pandas as pd
import polars as pl
import pytest
from scipy import sparse

from feature_store.cells import open_source, write_cells
from feature_store.cells.gene_table import MatrixPass, matrix_tables, shard_cells, shard_range
from feature_store.errors import InputError
from feature_store.storage import commit
from feature_store.storage.layout import Layout

if TYPE_CHECKING:
    from pathlib import Path

N_CELLS, N_GENES = 53, 9


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, ...]:
    """Two files of log-normalised values, one with Ensembl ids."""
    rng, paths = np.random.default_rng(0), (tmp_path / "a.h5ad", tmp_path / "b.h5ad")
    for path, n in zip(paths, (20, N_CELLS - 20), strict=True):
        counts = rng.poisson(1.0, (n, N_GENES)) + np.eye(n, N_GENES)
        values = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4).astype(np.float32)
        var = pd.DataFrame(index=[f"G{i}" for i in range(N_GENES)])
        if path.stem == "b":
            var["gene_ids"] = [f"ENSG{i:011d}" for i in range(N_GENES)]
        obs = pd.DataFrame({"type": ["T", "B"] * (n // 2) + ["T"] * (n % 2)}, index=[f"c{i}" for i in range(n)])
        anndata.AnnData(sparse.csr_matrix(values), obs=obs, var=var).write_h5ad(path)
    return paths


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feature_store.cells.gene_table.ONE_SHARD_CELLS", 10)
    monkeypatch.setattr("feature_store.cells.gene_table.SHARD_CELLS", 7)


def test_few_cells_are_one_shard_and_the_shards_of_many_do_not_depend_on_their_number() -> None:
    assert [shard_cells(n) for n in (1, 200_000, 200_001, 5_000_000)] == [1, 200_000, 100_000, 100_000]
    assert [shard_range(i, 17, 7) for i in range(3)] == [(0, 7), (7, 14), (14, 17)]


def test_means_and_counts_are_those_of_the_whole_matrix(files: tuple[Path, ...]) -> None:
    tables = matrix_tables(open_source(files))
    matrix = np.concatenate([anndata.read_h5ad(path).X.toarray() for path in files]).astype(np.float64)
    assert tables.genes["n_cells"].to_list() == (matrix > 0).sum(axis=0).tolist()
    np.testing.assert_allclose(tables.genes["mean"].to_numpy(), matrix.mean(axis=0), rtol=1e-14)
    assert tables.digests["n_detected"].to_list() == (matrix > 0).sum(axis=1).tolist()
    assert tables.n_shards == 1


def test_shards_give_the_digests_of_the_whole_and_sums_that_add_up_in_their_order(
    files: tuple[Path, ...], small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(files)
    cut = matrix_tables(source)
    sums = [MatrixPass(source).shard(*shard_range(i, N_CELLS, 7)).sums for i in range(cut.n_shards)]
    monkeypatch.setattr("feature_store.cells.gene_table.ONE_SHARD_CELLS", 100)
    whole = matrix_tables(source)
    assert (cut.n_shards, whole.n_shards) == (8, 1)
    assert cut.digests.equals(whole.digests)
    total = np.zeros(N_GENES)
    for one in sums:
        total += one["total"].to_numpy()
    # exactly, not nearly: the order of the sum is part of the table
    assert cut.genes["mean"].to_list() == (total / N_CELLS).tolist()
    assert cut.genes.drop("mean").equals(whole.genes.drop("mean"))
    np.testing.assert_allclose(cut.genes["mean"], whole.genes["mean"], rtol=1e-14)


@pytest.mark.usefixtures("small_shards")
def test_a_part_of_the_digests_that_was_damaged_is_made_again(files: tuple[Path, ...], tmp_path: Path) -> None:
    layout, source = Layout(tmp_path / "store"), open_source(files)
    dataset = write_cells(layout, source)
    run = commit.Run.open(layout.digests_dir(dataset))
    before = run.manifest()
    assert [(shard.start, shard.stop) for shard in before.shards[-2:]] == [(42, 49), (49, 53)]
    run.part(3).write_bytes(b"")
    write_cells(layout, source)
    assert commit.verify(run.path) == []
    assert run.manifest() == before
    assert commit.read_table(run.path)["cell_idx"].to_list() == list(range(N_CELLS))


@pytest.mark.usefixtures("small_shards")
def test_the_same_content_under_other_labels_is_not_passed_over_again(files: tuple[Path, ...], tmp_path: Path) -> None:
    layout, source = Layout(tmp_path / "store"), open_source(files)
    passes = []

    def make(source):
        passes.append(source)
        return matrix_tables(source)

    names = [write_cells(layout, source, cell_type=column, make_tables=make) for column in (None, "type", None)]
    assert names[0] == names[2] != names[1]
    assert len(passes) == 1
    for folder in (layout.genes_dir, layout.digests_dir):
        assert commit.read_table(folder(names[0])).equals(commit.read_table(folder(names[1])))


@pytest.mark.usefixtures("small_shards")
def test_an_impossible_value_is_named_by_its_row_in_the_file_and_nothing_is_written(tmp_path: Path) -> None:
    counts = np.random.default_rng(0).poisson(1.0, (20_000, 4)).astype(np.float32)
    # the rows that are sampled when the file is opened are not these
    counts[11_111, 2] = -1
    path = tmp_path / "bad.h5ad"
    anndata.AnnData(sparse.csr_matrix(counts), var=pd.DataFrame(index=list("ABCD"))).write_h5ad(path)
    with pytest.raises(InputError, match=r"row 11111, column 2: the value -1 is negative"):
        write_cells(Layout(tmp_path / "store"), open_source(path))
    assert not (tmp_path / "store").exists()


def test_progress_counts_the_cells_of_all_shards(files: tuple[Path, ...], small_shards: None) -> None:
    seen = []

    class Bar:
        def __init__(self, *said: object) -> None:
            self.said = said

        def __enter__(self):
            return seen.append

        def __exit__(self, *_: object) -> None:
            pass

    matrix_tables(open_source(files, progress=Bar))
    assert seen == sorted(seen)
    assert seen[-1] == N_CELLS


def test_the_table_of_digests_has_no_ensembl_digest_where_a_file_has_no_ids(files: tuple[Path, ...]) -> None:
    digests = matrix_tables(open_source(files)).digests
    assert digests["ensembl_digest"].is_null().to_list() == [True] * 20 + [False] * (N_CELLS - 20)
    assert digests.schema["symbol_digest"] == pl.UInt64
