"""A matrix that does not lie cell by cell is turned once, in bounded memory, and a turning that was killed resumes."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import anndata
import cell_files
import numpy as np
import pytest
from scipy import sparse
from stored_bytes import hashes_of

from feature_store.cells import Source, open_source, turn_matrices
from feature_store.cells.column_matrices import CSCMatrix
from feature_store.errors import InputError, IntegrityError
from feature_store.storage import commit
from feature_store.storage.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

N_CELLS, N_GENES = 3000, 40


@pytest.fixture
def counts(rng: np.random.Generator) -> np.ndarray:
    counts = rng.poisson(0.5, (N_CELLS, N_GENES)).astype(np.float32)
    counts[17] = 0
    return counts


@pytest.fixture
def in_small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 1,024 cells and blocks of 1,000 entries."""
    monkeypatch.setattr("feature_store.cells.row_parts.PART_VALUES", 1000)
    monkeypatch.setattr("feature_store.cells.column_matrices.BLOCK_VALUES", 1000)


@pytest.fixture
def path(counts: np.ndarray, tmp_path: Path) -> Path:
    anndata.AnnData(sparse.csc_matrix(counts)).write_h5ad(tmp_path / "a.h5ad")
    return tmp_path / "a.h5ad"


def dense(source: Source, start: int, stop: int) -> np.ndarray:
    rows = source.read_rows(start, stop)
    return sparse.csr_array((rows.data, rows.indices, rows.indptr), shape=(stop - start, N_GENES)).toarray()


def turned(path: Path, layout: Layout) -> Source:
    source = open_source(path)
    turn_matrices(layout, source)
    return source


@pytest.mark.usefixtures("in_small_steps")
def test_rows_of_a_turned_matrix_are_those_that_were_written(path: Path, counts: np.ndarray, tmp_path: Path) -> None:
    layout, lines = Layout(tmp_path / "store"), []
    source = open_source(path)
    turn_matrices(layout, source, lines.append)
    assert commit.Run.open(source.rows[0]).n_shards == 3
    for start, stop in ((0, N_CELLS), (0, 1), (1000, 1100), (2047, 2049), (2999, 3000), (40, 2000), (5, 5)):
        assert (dense(source, start, stop) == counts[start:stop]).all()
    assert (dense(source, 10, 20) == counts[10:20]).all()
    assert len(lines) == 2
    assert "MB" in lines[0]
    assert str(layout.rows_dir("")) in lines[1]
    again: list[str] = []
    other = open_source(path)
    turn_matrices(layout, other, again.append)
    assert again == []
    assert other.rows == source.rows
    # another process is given the folder
    assert (dense(open_source(path, rows=source.rows), 900, 1200) == counts[900:1200]).all()
    assert not list((tmp_path / "store").rglob(".tmp-*"))


def test_before_it_is_turned_the_first_cells_alone_can_be_read(path: Path, counts: np.ndarray) -> None:
    source = open_source(path)
    assert source.value_kind == "counts"
    assert (dense(source, 0, 600) == counts[:600]).all()
    assert source.read_cells(source.first_cells(512)).indptr[-1] == np.count_nonzero(counts[:512])
    with pytest.raises(InputError, match=r"X of .* does not lie cell by cell.*scsae extract"):
        source.read_rows(2000, 2001)


def test_what_lies_cell_by_cell_is_preferred(counts: np.ndarray, tmp_path: Path) -> None:
    matrices = {"counts": sparse.csr_matrix(counts)}
    anndata.AnnData(sparse.csc_matrix(counts), layers=matrices).write_h5ad(tmp_path / "a.h5ad")
    with open_source(tmp_path / "a.h5ad") as source:
        assert source.matrix == "layers/counts"
        assert source.column_matrices == (None,)


@pytest.mark.parametrize("n", [50, 90, N_CELLS])
@pytest.mark.parametrize("convert", [sparse.csr_matrix, sparse.csc_matrix])
def test_a_matrix_of_all_genes_is_preferred_however_it_lies(
    counts: np.ndarray, tmp_path: Path, convert: Callable[..., object], n: int
) -> None:
    adata = anndata.AnnData(convert(counts[:n]))
    adata.raw = adata.copy()
    few = adata[:, :20].copy()
    few.X = sparse.csr_matrix(counts[:n, :20])
    few.write_h5ad(tmp_path / "a.h5ad")
    with open_source(tmp_path / "a.h5ad") as source:
        assert source.matrix == "raw"
        share = float(source.choices[0].passed_over["X"].partition("with ")[2].partition("%")[0])
        assert share == pytest.approx(50, abs=6)


@pytest.mark.usefixtures("in_small_steps")
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_turning_that_was_killed_resumes_and_gives_the_same_bytes(
    path: Path, counts: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    calm, killed = Layout(tmp_path / "calm"), Layout(tmp_path / "killed")
    turned(path, calm)
    commit_shard, done = commit.Run.commit_shard, []

    def kill(self: commit.Run, shard: int, *args: object, **options: object) -> object:
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(shard)
        return commit_shard(self, shard, *args, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(commit.Run, "commit_shard", kill)
        with pytest.raises(KeyboardInterrupt):
            turned(path, killed)
    wanted = []
    rows_of = "feature_store.cells.row_parts._rows_of"
    import feature_store.cells.row_parts as module

    original = module._rows_of
    monkeypatch.setattr(
        rows_of, lambda scratch, plan, shard, where: wanted.append(shard) or original(scratch, plan, shard, where)
    )
    source = turned(path, killed)
    assert wanted == list(range(after, 3))
    assert (dense(source, 0, N_CELLS) == counts).all()
    assert hashes_of(calm.root / "rows") == hashes_of(killed.root / "rows")


@pytest.mark.usefixtures("in_small_steps")
@pytest.mark.parametrize("bad", [np.nan, -1.0, 0.5])
def test_an_impossible_value_is_found_before_anything_is_written(
    counts: np.ndarray, tmp_path: Path, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("feature_store.cells.column_matrices.SAMPLE_VALUES", 640)
    matrix = sparse.csc_matrix(counts)
    matrix.data[matrix.indptr[20] + 300] = bad
    anndata.AnnData(matrix).write_h5ad(tmp_path / "a.h5ad")
    cell = int(matrix.indices[matrix.indptr[20] + 300])
    source = open_source(tmp_path / "a.h5ad")
    with pytest.raises(InputError, match=rf"cell {cell}, feature 20: the value {bad:g} is n"):
        turn_matrices(Layout(tmp_path / "store"), source)
    assert not (tmp_path / "store").exists()


def test_a_gene_that_a_cell_has_twice_is_refused(counts: np.ndarray, tmp_path: Path) -> None:
    matrix = sparse.csc_matrix(counts)
    matrix.indices[matrix.indptr[3] + 1] = matrix.indices[matrix.indptr[3]]
    matrix.has_canonical_format = False
    anndata.AnnData(matrix).write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(InputError, match="column 3 appears twice"):
        turned(tmp_path / "a.h5ad", Layout(tmp_path / "store"))
    assert not (tmp_path / "store").exists()


def test_a_damaged_part_is_named_with_what_to_do(path: Path, tmp_path: Path) -> None:
    source = turned(path, Layout(tmp_path / "store"))
    part = commit.Run.open(source.rows[0]).part(0)
    content = bytearray(part.read_bytes())
    content[1000:1040] = bytes(40)
    part.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"part-00000\.parquet"):
        open_source(path, rows=source.rows).read_rows(0, N_CELLS)


@pytest.mark.usefixtures("in_small_steps")
def test_no_more_than_a_block_and_a_part_is_in_memory(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = []
    block = CSCMatrix._block
    monkeypatch.setattr(
        CSCMatrix, "_block", lambda self, low, high: largest.append(high - low) or block(self, low, high)
    )
    seen: list[int] = []

    @contextmanager
    def progress(_title: str, total: int, _unit: str) -> Iterator[Callable[[int], None]]:
        yield seen.append
        assert seen[-1] == total

    source = open_source(path, progress=progress)
    largest.clear()
    turn_matrices(Layout(tmp_path / "store"), source)
    assert max(largest) == 1000


def test_the_text_of_10x_ends_early_for_the_first_cells(
    counts: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("feature_store.cells.files.mtx.BLOCK_BYTES", 2000)
    monkeypatch.setattr("feature_store.cells.column_matrices.FIRST_CELLS", 100)
    monkeypatch.setattr("feature_store.cells.files.mtx.SAMPLE_VALUES", 100)
    adata = anndata.AnnData(counts)
    adata.var["gene_ids"] = [f"ENSG{i:011d}" for i in range(N_GENES)]
    folder = cell_files.mtx(adata, tmp_path, packed=False)
    # lines cell after cell, as Cell Ranger writes them, and an error far behind the first cells
    lines = (folder / "matrix.mtx").read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if not line.startswith("%"))
    body = sorted(lines[at + 1 :], key=lambda line: int(line.split()[1]))
    (folder / "matrix.mtx").write_text("\n".join([*lines[: at + 1], *body[:-1], "99999 1 1"]) + "\n")
    source = open_source(folder)
    assert (dense(source, 0, 50) == counts[:50]).all()
    with pytest.raises(InputError, match="row 99999"):
        turn_matrices(Layout(tmp_path / "store"), source)
