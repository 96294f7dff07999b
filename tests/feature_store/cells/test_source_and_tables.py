from __future__ import annotations

import json
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd
import polars as pl
import pytest
from cell_tables import written_cells
from scipy import sparse

from feature_store.cells import (
    Source,
    SplitConfig,
    make_splits,
    open_source,
    read_cells,
    read_split_record,
)
from feature_store.cells.splits import check_whole_units
from feature_store.errors import InputError, PlanMismatchError
from feature_store.storage.commit import Run
from feature_store.storage.layout import Layout
from feature_store.storage.plans import CellsPlan

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

N_CELLS, N_GENES = 30, 6
SYMBOLS = ["CD3D", "MS4A1", "NKG7", "LYZ", "CD74", "ISG15"]


@pytest.fixture
def counts(rng: np.random.Generator) -> np.ndarray:
    return rng.poisson(0.8, (N_CELLS, N_GENES)).astype(np.float32)


@pytest.fixture
def obs() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "patient": pd.Categorical([f"p{i % 4}" for i in range(N_CELLS)]),
            "label": pd.Categorical([None if i == 3 else "B" if i % 2 else "T" for i in range(N_CELLS)]),
            "age": np.arange(N_CELLS),
            "score": [np.nan if i == 5 else i / 2 for i in range(N_CELLS)],
            "doublet": [i % 7 == 0 for i in range(N_CELLS)],
            "note": ["a"] * N_CELLS,
        },
        index=[f"cell-{i}" for i in range(N_CELLS)],
    )


@pytest.fixture
def write_h5ad(tmp_path: Path, obs: pd.DataFrame) -> Callable[..., Path]:
    def write(matrix: Any, *, name: str = "data.h5ad", var: pd.DataFrame | None = None, **options: Any) -> Path:
        names = pd.DataFrame(index=SYMBOLS) if var is None else var
        adata = anndata.AnnData(matrix, obs=options.pop("obs", obs), var=names, layers=options.pop("layers", None))
        if (raw := options.pop("raw", None)) is not None:
            adata.raw = anndata.AnnData(raw, obs=adata.obs, var=pd.DataFrame(index=SYMBOLS))
        path = tmp_path / name
        if name.endswith(".zarr"):
            # anndata warns about its own default, and zarr about strings, while they write
            version = options.pop("zarr_format", 3)
            with warnings.catch_warnings(), anndata.settings.override(zarr_write_format=version):
                warnings.simplefilter("ignore")
                adata.write_zarr(path)
        else:
            adata.write_h5ad(path, **options)
        return path

    return write


def dense(source: Source, start: int, stop: int) -> np.ndarray:
    rows = source.read_rows(start, stop)
    shape = (stop - start, source.n_genes)
    return sparse.csr_array((rows.data, rows.indices, rows.indptr), shape=shape).toarray()


STORED = {
    "csr": (sparse.csr_matrix, "data.h5ad", {}),
    "csr gzip": (sparse.csr_matrix, "data.h5ad", {"compression": "gzip"}),
    "csr lzf": (sparse.csr_matrix, "data.h5ad", {"compression": "lzf"}),
    "dense": (np.asarray, "data.h5ad", {}),
    "dense gzip": (np.asarray, "data.h5ad", {"compression": "gzip"}),
    "int64": (lambda x: sparse.csr_matrix(x.astype(np.int64)), "data.h5ad", {}),
    "zarr 2 csr": (sparse.csr_matrix, "data.zarr", {"zarr_format": 2}),
    "zarr 3 csr": (sparse.csr_matrix, "data.zarr", {"zarr_format": 3}),
    "zarr 3 dense": (np.asarray, "data.zarr", {"zarr_format": 3}),
}


@pytest.mark.parametrize("how", list(STORED))
def test_rows_are_read_as_they_were_written(write_h5ad: Callable[..., Path], counts: np.ndarray, how: str) -> None:
    convert, name, options = STORED[how]
    with open_source(write_h5ad(convert(counts), name=name, **options)) as source:
        assert (source.matrix, source.value_kind) == ("X", "counts")
        assert (source.n_cells, source.n_genes) == (N_CELLS, N_GENES)
        for start, stop in ((0, N_CELLS), (0, 1), (7, 19), (29, 30), (5, 5)):
            assert (dense(source, start, stop) == counts[start:stop]).all()
        rows = source.read_rows(7, 19)
    assert (rows.indptr.dtype, rows.indices.dtype, rows.data.dtype) == (np.int64, np.int32, np.float32)
    assert rows.indptr[0] == 0


@pytest.mark.parametrize("gap", [1, 3, 64])
@pytest.mark.parametrize("how", list(STORED))
def test_scattered_cells_are_the_rows_of_those_cells(
    write_h5ad: Callable[..., Path], counts: np.ndarray, how: str, gap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("feature_store.cells.source.GAP_ROWS", gap)
    convert, name, options = STORED[how]
    with open_source(write_h5ad(convert(counts), name=name, **options)) as source:
        for wanted in ([], [0], [29], [3, 4, 5], [0, 2, 7, 8, 9, 20, 29], list(range(N_CELLS))):
            rows = source.read_cells(np.array(wanted, dtype=np.int64))
            found = sparse.csr_array((rows.data, rows.indices, rows.indptr), shape=(len(wanted), N_GENES))
            assert (found.toarray() == counts[wanted]).all()
            assert (rows.indptr.dtype, rows.indices.dtype, rows.data.dtype) == (np.int64, np.int32, np.float32)


def test_scattered_cells_are_read_in_ranges(
    write_h5ad: Callable[..., Path], counts: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("feature_store.cells.source.GAP_ROWS", 4)
    monkeypatch.setattr("feature_store.cells.source.BLOCK_ROWS", 8)
    source = open_source(write_h5ad(sparse.csr_matrix(counts)))
    ranges = []
    read = source.read_rows
    monkeypatch.setattr(source, "read_rows", lambda start, stop: ranges.append((start, stop)) or read(start, stop))
    source.read_cells(np.array([0, 2, 6, 7, 9, 12, 20, 21, 26]))
    # a gap of more than 4 begins another range, and so does the ninth row
    assert ranges == [(0, 8), (9, 13), (20, 22), (26, 27)]


@pytest.mark.parametrize("cells", [[3, 3], [4, 2], [-1, 2], [29, 30]])
def test_cells_that_do_not_ascend_in_the_data_are_refused(
    write_h5ad: Callable[..., Path], counts: np.ndarray, cells: list[int]
) -> None:
    with pytest.raises(InputError, match=r"\[0, 30\)"):
        open_source(write_h5ad(sparse.csr_matrix(counts))).read_cells(np.array(cells))


def test_reading_rows_never_holds_the_matrix(tmp_path: Path) -> None:
    n_cells, n_genes = 50_000, 200
    matrix = sparse.random_array((n_cells, n_genes), density=0.2, format="csr", random_state=0, dtype=np.float32)
    matrix.data = np.ceil(matrix.data * 9)
    anndata.AnnData(sparse.csr_matrix(matrix)).write_h5ad(tmp_path / "big.h5ad")
    source = open_source(tmp_path / "big.h5ad")
    tracemalloc = pytest.importorskip("tracemalloc")
    tracemalloc.start()
    for start in range(0, n_cells, 1000):
        source.read_rows(start, start + 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < matrix.data.nbytes / 4


@pytest.mark.parametrize(
    ("matrices", "chosen"),
    [
        ({"X": "counts", "raw": "counts", "counts": "counts"}, ("X", "counts")),
        ({"X": "lognorm", "raw": "lognorm", "counts": "counts"}, ("layers/counts", "counts")),
        ({"X": "lognorm", "raw": "counts"}, ("raw", "counts")),
        ({"X": "scaled", "raw": "lognorm"}, ("raw", "lognorm")),
        ({"X": "lognorm"}, ("X", "lognorm")),
        ({"X": "lognorm", "counts": "lognorm"}, ("X", "lognorm")),
    ],
)
def test_raw_counts_are_preferred_to_log_normalised_values(
    write_h5ad: Callable[..., Path], counts: np.ndarray, matrices: dict[str, str], chosen: tuple[str, str]
) -> None:
    values = {"counts": counts, "lognorm": np.log1p(counts / 3), "scaled": counts - counts.mean(axis=0)}
    layers = {"counts": values[matrices["counts"]]} if "counts" in matrices else None
    raw = values[matrices["raw"]] if "raw" in matrices else None
    source = open_source(write_h5ad(values[matrices["X"]], layers=layers, raw=raw))
    assert (source.matrix, source.value_kind) == chosen


def test_a_matrix_can_be_named(write_h5ad: Callable[..., Path], counts: np.ndarray) -> None:
    path = write_h5ad(counts, layers={"log": np.log1p(counts / 3)})
    source = open_source(path, matrix="layers/log")
    assert (source.matrix, source.value_kind) == ("layers/log", "lognorm")
    assert np.allclose(dense(source, 0, N_CELLS), np.log1p(counts / 3))


def test_scaled_values_are_refused_with_what_the_file_has_instead(
    write_h5ad: Callable[..., Path], counts: np.ndarray
) -> None:
    path = write_h5ad(counts - 1.5, layers={"log": np.log1p(counts / 3)})
    with pytest.raises(InputError, match=r"matrix X .*--matrix layers/log"):
        open_source(path, matrix="X")


def test_normalised_values_without_a_log_are_refused(write_h5ad: Callable[..., Path], counts: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"layers\['counts'\]"):
        open_source(write_h5ad(counts * 1234.5))


def test_an_unknown_matrix_is_refused_with_the_nearest_name(
    write_h5ad: Callable[..., Path], counts: np.ndarray
) -> None:
    path = write_h5ad(counts, layers={"counts": counts})
    with pytest.raises(InputError, match=r"--matrix was 'layer/count'.* X, layers/counts; .*'layers/counts'"):
        open_source(path, matrix="layer/count")


@pytest.mark.parametrize(("value", "problem"), [(np.nan, "nan"), (np.inf, "inf")])
def test_a_value_that_is_not_finite_is_refused_naming_its_row(
    write_h5ad: Callable[..., Path], counts: np.ndarray, value: float, problem: str
) -> None:
    counts[17, 4] = value
    with pytest.raises(InputError, match=f"row 17, column 4: the value {problem} .*--matrix"):
        open_source(write_h5ad(sparse.csr_matrix(counts)))


@pytest.mark.parametrize(
    ("value", "problem"),
    [(np.nan, "finite"), (0.5, "whole"), (-1, "negative")],
)
def test_a_row_that_the_sample_missed_is_refused_when_it_is_read(tmp_path: Path, value: float, problem: str) -> None:
    matrix = np.ones((20_000, 2), dtype=np.float32)
    matrix[1300, 1] = value
    path = tmp_path / "long.h5ad"
    anndata.AnnData(sparse.csr_matrix(matrix)).write_h5ad(path)
    source = open_source(path)
    assert len(source.read_rows(0, 1300).data) == 2600
    with pytest.raises(InputError, match=f"row 1300, column 1: .*{problem}"):
        source.read_rows(1000, 2000)
    with pytest.raises(InputError, match="row 1300"):
        written_cells(Layout(tmp_path / "store"), source)
    assert not (tmp_path / "store").exists()


def test_files_that_are_not_anndata_are_refused(
    tmp_path: Path, write_h5ad: Callable[..., Path], counts: np.ndarray
) -> None:
    write_h5ad(counts, name="kang.h5ad")
    with pytest.raises(InputError, match=r"kamg\.h5ad; .*'kang\.h5ad'"):
        open_source(tmp_path / "kamg.h5ad")
    (tmp_path / "text.h5ad").write_text("no HDF5")
    with pytest.raises(InputError, match=r"text\.h5ad.*\.h5ad"):
        open_source(tmp_path / "text.h5ad")
    truncated = (tmp_path / "kang.h5ad").read_bytes()[:2000]
    (tmp_path / "cut.h5ad").write_bytes(truncated)
    with pytest.raises(InputError, match=r"cut\.h5ad"):
        open_source(tmp_path / "cut.h5ad")
    with pytest.raises(InputError, match=r"\.zarr"):
        open_source(tmp_path)
    import h5py

    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["matrix"] = counts
    with pytest.raises(InputError, match=r"other\.h5 .*no obs and no var.* matrix"):
        open_source(tmp_path / "other.h5")


def test_an_empty_matrix_is_refused(tmp_path: Path) -> None:
    anndata.AnnData(np.zeros((0, 3), np.float32)).write_h5ad(tmp_path / "no-cells.h5ad")
    with pytest.raises(InputError, match="0 cells x 3 genes"):
        open_source(tmp_path / "no-cells.h5ad")
    anndata.AnnData(sparse.csr_matrix((5, 3), dtype=np.float32)).write_h5ad(tmp_path / "zeros.h5ad")
    with pytest.raises(InputError, match=r"X: .* 0\)"):
        open_source(tmp_path / "zeros.h5ad")
    anndata.AnnData(obs=pd.DataFrame(index=["a"]), var=pd.DataFrame(index=["g"])).write_h5ad(tmp_path / "none.h5ad")
    with pytest.raises(InputError, match=r"none\.h5ad .*layers\['counts'\]"):
        open_source(tmp_path / "none.h5ad")


ENSEMBL = [f"ENSG0000000000{i}" for i in range(N_GENES)]
VERSIONED = [f"{name}.{i + 1}" for i, name in enumerate(ENSEMBL)]


@pytest.mark.parametrize(
    ("var", "symbols", "ensembl"),
    [
        (pd.DataFrame(index=SYMBOLS), SYMBOLS, None),
        (pd.DataFrame({"gene_name": SYMBOLS}, index=VERSIONED), SYMBOLS, ENSEMBL),
        (pd.DataFrame({"gene_ids": VERSIONED}, index=SYMBOLS), SYMBOLS, ENSEMBL),
        (pd.DataFrame({"feature_name": pd.Categorical(SYMBOLS)}, index=ENSEMBL), SYMBOLS, ENSEMBL),
        (pd.DataFrame({"Gene_Symbol": [*SYMBOLS[:5], None]}, index=ENSEMBL), [*SYMBOLS[:5], ENSEMBL[5]], ENSEMBL),
        (pd.DataFrame(index=VERSIONED), ENSEMBL, ENSEMBL),
        (pd.DataFrame({"gene_id": ["1", "2", "3", "4", "5", "6"]}, index=SYMBOLS), SYMBOLS, None),
        (pd.DataFrame({"ensembl_id": [*ENSEMBL[:5], None]}, index=SYMBOLS), SYMBOLS, [*ENSEMBL[:5], ""]),
        (pd.DataFrame({"gene_symbol": ENSEMBL}, index=SYMBOLS), SYMBOLS, None),
    ],
)
def test_symbols_and_ensembl_ids_are_found_where_files_keep_them(
    write_h5ad: Callable[..., Path],
    counts: np.ndarray,
    var: pd.DataFrame,
    symbols: list[str],
    ensembl: list[str] | None,
) -> None:
    source = open_source(write_h5ad(counts, var=var))
    assert source.gene_symbols == symbols
    assert source.ensembl_ids == ensembl


def test_every_obs_column_is_kept_with_its_kind(write_h5ad: Callable[..., Path], counts: np.ndarray) -> None:
    source = open_source(write_h5ad(counts))
    frame = source.obs()
    assert dict(frame.schema) == {
        "patient": pl.String,
        "label": pl.String,
        "age": pl.Int64,
        "score": pl.Float64,
        "doublet": pl.Boolean,
        "note": pl.String,
    }
    assert frame["label"].to_list()[:5] == ["T", "B", "T", None, "T"]
    assert frame["score"].null_count() == 1
    assert frame["doublet"].sum() == 5
    assert source.obs_names().to_list()[:2] == ["cell-0", "cell-1"]


def test_the_digest_depends_on_the_content_and_not_on_the_name(
    write_h5ad: Callable[..., Path], counts: np.ndarray, tmp_path: Path
) -> None:
    path = write_h5ad(counts)
    (tmp_path / "copy.h5ad").write_bytes(path.read_bytes())
    digest = open_source(path).digest
    assert digest == open_source(tmp_path / "copy.h5ad").digest
    assert len(digest) == 64
    assert digest != open_source(write_h5ad(counts + 1, name="other.h5ad")).digest
    store = write_h5ad(counts, name="a.zarr")
    before = open_source(store).digest
    assert before == open_source(store).digest


def test_the_cell_table_has_the_split_the_named_columns_and_every_obs_column(
    write_h5ad: Callable[..., Path], counts: np.ndarray, tmp_path: Path
) -> None:
    layout = Layout(tmp_path / "store")
    source = open_source(write_h5ad(counts))
    cells = written_cells(
        layout,
        source,
        dataset="toy",
        donor="patient",
        cell_type="label",
        labels=["doublet"],
        split=SplitConfig(seed=4),
    )
    assert cells.columns == [
        *("cell_idx", "cell_id", "dataset", "split", "panel", "donor", "batch", "cell_type"),
        *("patient", "obs_label", "age", "obs_score", "doublet", "note"),
    ]
    assert cells["cell_idx"].to_list() == list(range(N_CELLS))
    assert cells["donor"].to_list() == cells["patient"].to_list()
    assert cells["batch"].null_count() == N_CELLS
    assert (
        cells["split"].to_list()
        == make_splits(N_CELLS, donor=cells["patient"].to_list(), config=SplitConfig(seed=4))[0].tolist()
    )
    assert read_cells(layout.cells_dir("toy")).equals(cells)
    record = read_split_record(layout.cells_dir("toy"))
    assert (record.unit, record.n_units, record.fallback) == ("donor", 4, None)


def test_splits_may_come_from_a_column_and_donors_keep_those_that_an_sae_knows_by_name(
    write_h5ad: Callable[..., Path], counts: np.ndarray, obs: pd.DataFrame, tmp_path: Path
) -> None:
    patients = sorted(set(obs["patient"]))
    known = dict(zip(patients, ("test", "train", "select", "train"), strict=True))
    obs["split"] = obs["patient"].map(known).astype(str)
    layout = Layout(tmp_path / "store")
    by_column = written_cells(layout, open_source(write_h5ad(counts, obs=obs)), donor="patient", split_column="split")
    assert by_column["split"].to_list() == obs["split"].tolist()
    assert "obs_split" not in by_column.columns
    # other cells of the same donors
    new = obs.drop(columns="split").set_axis([f"new-{i}" for i in range(N_CELLS)])
    other = open_source(write_h5ad(counts[:, ::-1].copy(), obs=new, name="other.h5ad"))
    kept = written_cells(layout, other, donor="patient", trained_on=by_column["dataset"][0])
    assert kept["split"].to_list() == by_column["split"].to_list()
    assert Run.open(layout.cells_dir(kept["dataset"][0])).plan["kept_splits"] == known
    dealt = written_cells(layout, other, batch="patient", trained_on=by_column["dataset"][0])
    assert dealt["dataset"][0] == written_cells(layout, other, batch="patient")["dataset"][0]
    with pytest.raises(InputError, match="--split was 'fold'"):
        written_cells(layout, other, split_column="fold")


def test_genes_have_their_number_of_cells_and_mean(
    write_h5ad: Callable[..., Path], counts: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("feature_store.cells.gene_table.BLOCK_ROWS", 7)
    layout = Layout(tmp_path / "store")
    source = open_source(write_h5ad(sparse.csr_matrix(counts), var=pd.DataFrame({"gene_ids": ENSEMBL}, index=SYMBOLS)))
    written_cells(layout, source, dataset="toy")
    genes = read_cells(layout.genes_dir("toy"))
    assert genes["symbol"].to_list() == SYMBOLS
    assert genes["ensembl_id"].to_list() == ENSEMBL
    assert genes["n_cells"].to_list() == (counts > 0).sum(axis=0).tolist()
    assert np.allclose(genes["mean"].to_numpy(), counts.mean(axis=0))


def test_obs_columns_with_the_name_of_a_column_of_any_table_get_a_prefix(
    write_h5ad: Callable[..., Path], counts: np.ndarray, obs: pd.DataFrame, tmp_path: Path
) -> None:
    obs = obs[["patient"]].rename(columns={"patient": "donor"})
    obs["split"] = "mine"
    obs["cell_type"] = "theirs"
    obs["obs_cell_type"] = "taken"
    obs["gene"] = "TP53"
    obs["condition"] = "kept"
    cells = written_cells(Layout(tmp_path / "s"), open_source(write_h5ad(counts, obs=obs)), dataset="d", donor="donor")
    assert cells.columns[8:] == ["obs_split", "obs_cell_type", "obs_obs_cell_type", "obs_gene", "condition"]
    assert cells["donor"].to_list() == obs["donor"].tolist()
    assert set(cells["obs_split"]) == {"mine"}
    assert cells["cell_type"].null_count() == N_CELLS
    assert set(cells["obs_cell_type"]) == {"theirs"}


def test_cell_names_may_repeat(
    write_h5ad: Callable[..., Path], counts: np.ndarray, obs: pd.DataFrame, tmp_path: Path
) -> None:
    obs.index = ["same"] * N_CELLS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = write_h5ad(counts, obs=obs)
    cells = written_cells(Layout(tmp_path / "s"), open_source(path))
    assert cells["cell_id"].unique().to_list() == ["same"]
    assert cells["cell_idx"].n_unique() == N_CELLS


def test_numbers_are_labels_that_are_measured_as_numbers_and_names_of_cells_are_refused(
    write_h5ad: Callable[..., Path], counts: np.ndarray, obs: pd.DataFrame, tmp_path: Path
) -> None:
    obs["barcode"] = [f"AAC{i}" for i in range(N_CELLS)]
    layout = Layout(tmp_path / "store")
    with open_source(write_h5ad(counts)) as source:
        for options in ({"labels": ["note", "barcode"]}, {"cell_type": "barcode"}, {"batch": "age"}):
            with pytest.raises(InputError, match=r"--(label|cell-type|batch) was '(barcode|age)'.*30 .*30 cells"):
                written_cells(layout, source, **options)
        assert not layout.root.exists()
        cells = written_cells(layout, source, labels=["score", "age", "doublet", "note"], dataset="d")
    plan = CellsPlan.of(Run.open(layout.cells_dir("d")))
    assert plan.numbers == ("score", "age")
    assert cells["obs_score"].dtype == pl.Float64


def test_an_unknown_obs_column_is_refused_with_the_nearest_and_nothing_is_written(
    write_h5ad: Callable[..., Path], counts: np.ndarray, tmp_path: Path
) -> None:
    source = open_source(write_h5ad(counts))
    layout = Layout(tmp_path / "store")
    with pytest.raises(InputError, match=r"--cell-type was 'lable'.* patient, .*'label'"):
        written_cells(layout, source, cell_type="lable")
    with pytest.raises(InputError, match="--label was 'condition'"):
        written_cells(layout, source, labels=["condition"])
    assert not layout.root.exists()


def test_writing_cells_again_reads_no_matrix_and_changes_nothing(
    write_h5ad: Callable[..., Path],
    counts: np.ndarray,
    tmp_path: Path,
    folder_hashes: Callable[[Path], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layout = Layout(tmp_path / "store")
    source = open_source(write_h5ad(counts))
    first = written_cells(layout, source, donor="patient")
    before = folder_hashes(layout.root)
    monkeypatch.setattr(Source, "read_rows", None)
    assert written_cells(layout, source, donor="patient").equals(first)
    assert folder_hashes(layout.root) == before


def test_other_options_make_another_data_set_unless_its_name_is_given(
    write_h5ad: Callable[..., Path], counts: np.ndarray, tmp_path: Path
) -> None:
    layout = Layout(tmp_path / "store")
    source = open_source(write_h5ad(counts))
    names = {written_cells(layout, source, **options)["dataset"][0] for options in ({}, {"donor": "patient"})}
    assert len(names) == 2
    assert all(name.startswith("data-") for name in names)
    written_cells(layout, source, dataset="toy")
    with pytest.raises(PlanMismatchError, match=r"donor.*None.*'patient'"):
        written_cells(layout, source, dataset="toy", donor="patient")


def test_pbmc68k_is_read_from_its_log_normalised_raw(tmp_path: Path) -> None:
    scanpy = pytest.importorskip("scanpy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata = scanpy.datasets.pbmc68k_reduced()
    adata.write_h5ad(tmp_path / "pbmc.h5ad")
    source = open_source(tmp_path / "pbmc.h5ad")
    assert (source.matrix, source.value_kind, source.n_cells, source.n_genes) == ("raw", "lognorm", 700, 765)
    assert source.gene_symbols[0] == "HES4"
    assert (dense(source, 100, 200) == adata.raw.X[100:200].toarray()).all()
    cells = written_cells(Layout(tmp_path / "s"), source, cell_type="bulk_labels")
    assert cells["cell_type"].to_list() == adata.obs["bulk_labels"].astype(str).tolist()
    with pytest.raises(InputError, match="--matrix raw"):
        open_source(tmp_path / "pbmc.h5ad", matrix="X")


def test_the_real_files_hold_counts_and_both_kinds_of_names(scsae_data: Path) -> None:
    files = sorted(scsae_data.glob("*.h5ad"))
    assert files
    for path in files:
        source = open_source(path)
        assert (source.matrix, source.value_kind) == ("X", "counts")
        assert source.ensembl_ids is not None
        assert "CD74" in source.gene_symbols or "ISG15" in source.gene_symbols
        expected = anndata.read_h5ad(path, backed="r")
        assert (source.n_cells, source.n_genes) == expected.shape
        assert (dense(source, 40, 60) == expected.X[40:60].toarray()).all()
        expected.file.close()


def test_kang_is_split_by_donor(scsae_data: Path, tmp_path: Path) -> None:
    source = open_source(scsae_data / "kang18_ifnb_2000x9015_counts.h5ad")
    layout = Layout(tmp_path)
    cells = written_cells(layout, source, donor="donor", batch="batch", cell_type="cell_type", labels=["condition"])
    check_whole_units(cells["split"].to_numpy(), cells["donor"].to_list())
    record = read_split_record(layout.cells_dir(cells["dataset"][0]))
    assert (record.unit, record.n_units) == ("donor", 8)
    assert 0.4 < record.cells["train"] / 2000 < 0.6
    assert Run.open(layout.cells_dir(cells["dataset"][0])).verify() == []


@pytest.mark.slow
def test_memory_does_not_grow_with_the_cells(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    bench = pytestconfig.rootpath / "tests" / "benchmarks" / "bench_ingest.py"
    command = [sys.executable, bench, "--cells", "70000", "250000", "--folder", tmp_path]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=pytestconfig.rootpath)
    few, many = (json.loads(line)["peak_mb"] for line in done.stdout.splitlines())
    # the tables themselves take 180 bytes a cell; a Python string a cell and column would take 500
    assert many - few < 250 * 180_000 / 1e6 + 15


def test_importing_the_query_layer_does_not_import_anndata() -> None:
    code = "import sys, feature_store.query.store; print('anndata' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"]
