"""Every format of files gives the same rows, genes, obs and tables; what is wrong with a file is one clear error."""

from __future__ import annotations

import gzip
import shutil
import sys
from typing import TYPE_CHECKING, Any

import anndata
import cell_files
import h5py
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cell_files import FORMATS, WITHOUT_OBS
from cell_tables import written_cells
from scipy import sparse

from feature_store.cells import Source, data_files, open_source, read_cells, turn_matrices, write_cells
from feature_store.errors import InputError
from feature_store.storage import commit
from feature_store.storage.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

COLUMNS = {"donor": "donor", "batch": "batch", "cell_type": "type"}


@pytest.fixture
def cells(tiny_cells: anndata.AnnData) -> anndata.AnnData:
    """The tiny cells with Ensembl ids and a number a cell."""
    adata = tiny_cells.copy()
    adata.var["gene_ids"] = [f"ENSG{i:011d}" for i in range(adata.n_vars)]
    adata.obs["age"] = np.arange(adata.n_obs) % 7 + 0.5
    return adata


@pytest.fixture
def with_antibodies(cells: anndata.AnnData) -> anndata.AnnData:
    """The cells with three antibodies between their genes."""
    extra = np.random.default_rng(1).poisson(200, (cells.n_obs, 3))
    var = pd.DataFrame(
        {"gene_ids": ["CD3", "CD4", "CD8"], "feature_types": "Antibody Capture"}, index=["CD3", "CD4", "CD8"]
    )
    own = cells.var.assign(feature_types=cell_files.GENES)
    both = np.hstack([cells.X.toarray()[:, :20], extra, cells.X.toarray()[:, 20:]]).astype(np.float32)
    return anndata.AnnData(sparse.csr_matrix(both), obs=cells.obs, var=pd.concat([own[:20], var, own[20:]]))


def opened(path: Path, layout: Layout, **options: Any) -> Source:
    """The source of a path, whose matrices are turned where they need it."""
    source = open_source(path, **options)
    turn_matrices(layout, source)
    return source


def dense(source: Source, start: int = 0, stop: int | None = None) -> np.ndarray:
    stop = source.n_cells if stop is None else stop
    rows = source.read_rows(start, stop)
    assert (rows.indptr.dtype, rows.indices.dtype, rows.data.dtype) == (np.int64, np.int32, np.float32)
    assert rows.data.flags.writeable
    return sparse.csr_array((rows.data, rows.indices, rows.indptr), shape=(stop - start, source.n_genes)).toarray()


def obs_of(adata: anndata.AnnData, folder: Path) -> Path:
    path = folder / "obs.tsv"
    adata.obs.to_csv(path, sep="\t", index_label="cell_id")
    return path


@pytest.mark.parametrize("how", FORMATS)
def test_every_format_gives_the_same_cells(
    how: str, cells: anndata.AnnData, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    layout, path = Layout(tmp_path / "store"), FORMATS[how](cells, tmp_path)
    obs = [obs_of(cells, tmp_path)] if how.startswith(WITHOUT_OBS) else []
    with (
        opened(path, layout, obs=obs) as source,
        open_source(cell_files.h5ad(cells, tmp_path_factory.mktemp("a"))) as csr,
    ):
        assert (source.value_kind, source.n_cells, source.n_genes) == ("counts", cells.n_obs, cells.n_vars)
        counts = cells.X.toarray()
        for start, stop in ((0, cells.n_obs), (0, 1), (7, 41), (cells.n_obs - 1, cells.n_obs), (5, 5)):
            assert (dense(source, start, stop) == counts[start:stop]).all()
        rows = source.read_cells(np.array([0, 3, 70], dtype=np.int64))
        assert (sparse.csr_array(rows[::-1], shape=(3, cells.n_vars)).toarray() == counts[[0, 3, 70]]).all()
        assert (source.gene_symbols, source.ensembl_ids) == (csr.gene_symbols, csr.ensembl_ids)
        assert source.obs_names().to_list() == list(cells.obs_names)
        assert source.obs(columns=list(cells.obs)).equals(csr.obs())
        assert source.obs(10, 30, ["type", "age"]).equals(csr.obs(10, 30, ["type", "age"]))
        own, other = (write_cells(Layout(tmp_path / "store"), one, **COLUMNS) for one in (source, csr))
    # the whole chain begins with these tables
    shared = [*read_cells(layout.cells_dir(other)).drop("dataset").columns]
    assert read_cells(layout.cells_dir(own))[shared].equals(read_cells(layout.cells_dir(other))[shared])
    for folder in (layout.genes_dir, layout.digests_dir):
        mine, theirs = (commit.read_table(folder(name)) for name in (own, other))
        assert mine.equals(theirs)


@pytest.mark.parametrize("how", ["10x h5, 3", "mtx, 3, gz", "h5ad csc"])
def test_only_genes_are_read_and_the_others_are_counted(
    how: str, with_antibodies: anndata.AnnData, cells: anndata.AnnData, tmp_path: Path
) -> None:
    with opened(FORMATS[how](with_antibodies, tmp_path), Layout(tmp_path / "store")) as source:
        assert source.left_out == {"Antibody Capture": 3}
        assert source.gene_symbols == list(cells.var_names)
        assert (dense(source) == cells.X.toarray()).all()


def test_a_file_of_antibodies_alone_is_refused(with_antibodies: anndata.AnnData, tmp_path: Path) -> None:
    antibodies = with_antibodies[:, with_antibodies.var["feature_types"] != cell_files.GENES].copy()
    with pytest.raises(InputError, match=r"filtered_feature_bc_matrix\.h5 .*Antibody Capture"):
        open_source(cell_files.tenx_3(antibodies, tmp_path))


def test_samples_of_10x_are_one_data_set_whose_file_names_the_sample(cells: anndata.AnnData, tmp_path: Path) -> None:
    paths = []
    for name, half in (("s1", cells[:30]), ("s2", cells[30:])):
        (tmp_path / name / "outs").mkdir(parents=True)
        paths.append((cell_files.tenx_3 if name == "s1" else cell_files.mtx)(half.copy(), tmp_path / name / "outs"))
    layout = Layout(tmp_path / "store")
    source = opened(paths, layout)  # type: ignore[arg-type]
    assert source.obs()["file"].to_list() == ["s1"] * 30 + ["s2"] * 42
    assert (dense(source) == cells.X.toarray()).all()
    table = written_cells(layout, source, batch="file")
    assert table["batch"].unique().sort().to_list() == ["s1", "s2"]


def test_a_file_of_10x_with_several_genomes_needs_the_name_of_one(cells: anndata.AnnData, tmp_path: Path) -> None:
    path = cell_files.tenx_2(cells, tmp_path, genomes=("hg19", "mm10"))
    with pytest.raises(InputError, match=r"2 genomes: hg19, mm10; .*--matrix hg19"):
        open_source(path)
    with open_source(path, matrix="mm10") as source:
        assert source.matrix == "mm10"
        assert (dense(source) == cells.X.toarray()).all()
    with pytest.raises(InputError, match=r"mm11.*did you mean 'mm10'"):
        open_source(path, matrix="mm11")


def test_a_format_is_told_by_the_content_and_not_by_the_name(cells: anndata.AnnData, tmp_path: Path) -> None:
    for how in ("10x h5, 3", "h5ad csr"):
        path = FORMATS[how](cells, tmp_path)
        path.rename(tmp_path / "download")
        with open_source(tmp_path / "download") as source:
            assert source.formats[0].startswith("10x" if "10x" in how else "AnnData")
    with open_source(cell_files.mtx(cells, tmp_path, packed=False) / "matrix.mtx") as source:
        assert source.formats == ("10x matrix.mtx",)
    folder = cell_files.gene_lists(cells, tmp_path) / "data"
    shutil.copy(folder / "train-00001.parquet", tmp_path / "parquet" / "part")
    with open_source(tmp_path / "parquet" / "part") as source:
        assert source.n_cells == 36


def test_a_collection_is_its_data_sets_in_the_order_of_their_numbers(cells: anndata.AnnData, tmp_path: Path) -> None:
    path = cell_files.collection(cells, tmp_path, parts=1)
    (path / "dataset_0").rename(path / "dataset_10")
    for name in ("dataset_9", "dataset_2", "other"):
        (path / name).mkdir()
    assert [one.name for one in data_files(path)] == ["dataset_2", "dataset_9", "dataset_10"]
    for name in ("chunk_10.zarr", "chunk_9.zarr"):
        (tmp_path / "first version" / name).mkdir(parents=True)
    assert [one.name for one in data_files(tmp_path / "first version")] == ["chunk_9.zarr", "chunk_10.zarr"]
    assert data_files(path / "dataset_10") == [path / "dataset_10"]


def changed_mtx(folder: Path, change: Callable[[list[str]], list[str]], name: str = "matrix.mtx") -> None:
    lines = (folder / name).read_text().splitlines()
    (folder / name).write_text("\n".join(change(lines)) + "\n")


def header_at(lines: list[str]) -> int:
    return next(i for i, line in enumerate(lines) if not line.startswith("%"))


def with_size(lines: list[str], place: int, by: int) -> list[str]:
    at = header_at(lines)
    size = [int(n) for n in lines[at].split()]
    size[place] += by
    return [*lines[:at], " ".join(map(str, size)), *lines[at + 1 :]]


def with_last(lines: list[str], value: str) -> list[str]:
    return [*lines[:-1], value]


BAD_MTX: dict[str, tuple[Callable[[list[str]], list[str]], str]] = {
    "a value fewer": (lambda x: x[:-1], "values, but its header says"),
    "a value more": (lambda x: [*x, "1 1 1"], "more than .* but its header says"),
    "a row outside": (lambda x: with_last(x, "31 1 1"), r"row 31 is not in \[1, 30\].*another sample"),
    "a column outside": (lambda x: with_last(x, "1 73 1"), r"column 73 is not in \[1, 72\]"),
    "counted from 0": (lambda x: with_last(x, "0 5 1"), r"row 0 is not in \[1, 30\]; they count from 1.*add 1"),
    "a fraction": (lambda x: with_last(x, "1 1 1.5"), r"1\.5 is not an integer"),
    "a word": (lambda x: with_last(x, "1 1 many"), r"line \d+: '1 1 many' is not a row, a column and a value"),
    "two numbers": (lambda x: with_last(x, "1 1"), r"line \d+: '1 1' is not"),
    "more cells than barcodes": (lambda x: with_size(x, 1, 4), "76 columns, .* 72 barcodes"),
    "other features": (lambda x: with_size(x, 0, -1), "29 rows .* 30 features"),
    "a pattern": (lambda x: [x[0].replace("integer", "pattern"), *x[1:]], "matrix coordinate pattern general"),
    "no header": (lambda x: x[1:], "not a Matrix Market file|not an HDF5 file"),
    "no numbers": (lambda x: [*x[: header_at(x)], "a b c"], "is not the numbers of rows, columns and values"),
}


@pytest.mark.parametrize("what", BAD_MTX)
def test_a_bad_mtx_is_one_clear_error(what: str, cells: anndata.AnnData, tmp_path: Path) -> None:
    change, words = BAD_MTX[what]
    folder = cell_files.mtx(cells, tmp_path, packed=False)
    changed_mtx(folder, change)
    with pytest.raises(InputError, match=rf"matrix\.mtx.*{words}"):
        opened(folder, Layout(tmp_path / "store"))
    assert not (tmp_path / "store").exists()


def test_errors_behind_the_first_entries_leave_nothing_in_the_store(
    cells: anndata.AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("feature_store.cells.files.mtx.SAMPLE_VALUES", 50)
    monkeypatch.setattr("feature_store.cells.files.mtx.BLOCK_BYTES", 300)
    for what in ("a value fewer", "a row outside", "a fraction"):
        folder = cell_files.mtx(cells, tmp_path, packed=False)
        changed_mtx(folder, BAD_MTX[what][0])
        source = open_source(folder)
        with pytest.raises(InputError, match=BAD_MTX[what][1]):
            turn_matrices(Layout(tmp_path / "store"), source)
        assert not (tmp_path / "store").exists()


def test_barcodes_of_another_number_are_refused(cells: anndata.AnnData, tmp_path: Path) -> None:
    folder = cell_files.mtx(cells, tmp_path, packed=False)
    changed_mtx(folder, lambda lines: lines[:-3], "barcodes.tsv")
    with pytest.raises(InputError, match=r"72 columns, but .* 69 barcodes"):
        open_source(folder)
    path = cell_files.tenx_3(cells, tmp_path)
    with h5py.File(path, "r+") as file:
        names = file["matrix/barcodes"][:-3]
        del file["matrix/barcodes"]
        file["matrix/barcodes"] = names
    with pytest.raises(InputError, match=r"72 cells x 30 features, .*69 cells and 30"):
        open_source(path)


@pytest.mark.parametrize("name", ["matrix.mtx.gz", "barcodes.tsv.gz", "features.tsv.gz"])
def test_a_gzip_that_is_cut_short_is_named(name: str, cells: anndata.AnnData, tmp_path: Path) -> None:
    folder = cell_files.mtx(cells, tmp_path)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=name.replace(".", r"\.")) as error:
        opened(folder, Layout(tmp_path / "store"))
    assert "\n" not in str(error.value)


def test_a_folder_without_its_three_files_is_refused(cells: anndata.AnnData, tmp_path: Path) -> None:
    folder = cell_files.mtx(cells, tmp_path)
    (folder / "features.tsv.gz").unlink()
    with pytest.raises(InputError, match=r"no features\.tsv beside it .*three files"):
        open_source(folder)
    cell_files.mtx(cells, tmp_path, start="GSM2_")
    with pytest.raises(InputError, match=r"2 matrices .*give each as a file"):
        open_source(folder)


@pytest.mark.parametrize(("field", "value"), [("indices", 99), ("indptr", 10**6)])
def test_damaged_arrays_of_10x_are_refused(field: str, value: int, cells: anndata.AnnData, tmp_path: Path) -> None:
    path = cell_files.tenx_3(cells, tmp_path)
    with h5py.File(path, "r+") as file:
        file[f"matrix/{field}"][5] = value
    with pytest.raises(InputError, match=r"matrix of .*filtered_feature_bc_matrix\.h5.*copy it again"):
        open_source(path)


def test_fractions_in_a_file_of_counts_are_refused(cells: anndata.AnnData, tmp_path: Path) -> None:
    path = cell_files.tenx_3(cells, tmp_path)
    with h5py.File(path, "r+") as file:
        values = file["matrix/data"][:] * np.random.default_rng(0).random(file["matrix/data"].shape)
        del file["matrix/data"]
        file["matrix/data"] = values
    with pytest.raises(InputError, match="neither counts nor log-normalised"):
        open_source(path)


def changed_part(folder: Path, change: Callable[[dict[str, list[Any]]], None]) -> Path:
    path = folder / "data" / "train-00001.parquet"
    table = pq.read_table(path)
    columns = table.to_pydict()
    change(columns)
    pq.write_table(pa.table(columns, schema=table.schema), path, row_group_size=7)
    return path


BAD_LISTS: dict[str, tuple[Callable[[dict[str, list[Any]]], Any], str]] = {
    "unequal lists": (lambda x: x["genes"][11].pop(), "row 11: genes has .* entries and expressions"),
    "an unknown gene": (lambda x: x["genes"][11].__setitem__(1, 999), "row 11: the gene 999 is not in the gene table"),
    "a gene twice": (lambda x: x["genes"][11].__setitem__(1, x["genes"][11][2]), "row 11: column .* appears twice"),
    "no list": (lambda x: x["genes"].__setitem__(11, None), "row 11: genes is missing"),
}


@pytest.mark.parametrize("what", BAD_LISTS)
def test_a_bad_row_of_lists_is_named_with_its_part(what: str, cells: anndata.AnnData, tmp_path: Path) -> None:
    change, words = BAD_LISTS[what]
    folder = cell_files.gene_lists(cells, tmp_path)
    changed_part(folder, change)
    with pytest.raises(InputError, match=rf"train-00001\.parquet, {words}"):
        dense(open_source(folder))


def test_a_negative_value_that_is_no_marker_is_refused(cells: anndata.AnnData, tmp_path: Path) -> None:
    folder = cell_files.gene_lists(cells, tmp_path)
    changed_part(folder, lambda x: x["expressions"][3].__setitem__(2, -1.0))
    with pytest.raises(InputError, match="has negative values"):
        open_source(folder)


def test_parts_without_what_they_need_are_refused(cells: anndata.AnnData, tmp_path: Path) -> None:
    folder = cell_files.gene_lists(cells, tmp_path)
    table = folder / "metadata" / "gene_metadata.parquet"
    shutil.move(table, tmp_path / "kept")
    with pytest.raises(InputError, match=r"no gene table beside it.*token_id.*gene_metadata\.parquet"):
        open_source(folder)
    pl.read_parquet(tmp_path / "kept").drop("token_id").write_parquet(table)
    with pytest.raises(InputError, match="no column of ids that are whole numbers"):
        open_source(folder)
    shutil.move(tmp_path / "kept", table)
    part = folder / "data" / "train-00001.parquet"
    pl.read_parquet(part).drop("donor").write_parquet(part)
    with pytest.raises(InputError, match=r"train-00001\.parquet has other columns .*\(donor\)"):
        open_source(folder)
    part.write_bytes(part.read_bytes()[:900])
    with pytest.raises(InputError, match=r"train-00001\.parquet cannot be read as Parquet"):
        open_source(folder)
    other = tmp_path / "table.parquet"
    pl.DataFrame({"a": [1]}).write_parquet(other)
    with pytest.raises(InputError, match="no list of genes"):
        open_source(other)


def test_a_condition_is_refused_where_the_format_takes_none(cells: anndata.AnnData, tmp_path: Path) -> None:
    for how in ("h5ad csr", "mtx, 3, gz", "parquet"):
        with pytest.raises(InputError, match=r"--where was \"type == 'A'\".*SOMA"):
            open_source(FORMATS[how](cells, tmp_path), where="type == 'A'")


def test_an_experiment_without_its_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("obs", "ms"):
        (tmp_path / "experiment" / name).mkdir(parents=True)
    (tmp_path / "experiment" / "__tiledb_group.tdb").touch()
    monkeypatch.setitem(sys.modules, "tiledbsoma", None)
    with pytest.raises(InputError, match=r"experiment is a SOMA experiment.*pip install 'scsae\[soma\]'"):
        open_source(tmp_path / "experiment")


def test_the_content_identifies_a_folder_whatever_lies_beside_it(cells: anndata.AnnData, tmp_path: Path) -> None:
    folder = cell_files.mtx(cells, tmp_path)
    before = open_source(folder).digest
    (folder / "notes.txt").write_text("mine")
    shutil.move(folder, tmp_path / "moved")
    assert open_source(tmp_path / "moved").digest == before
    name = tmp_path / "moved" / "barcodes.tsv.gz"
    name.write_bytes(gzip.compress(gzip.decompress(name.read_bytes()).replace(b"cell5\n", b"cell555\n"), mtime=0))
    assert open_source(tmp_path / "moved").digest != before
