"""Every way in which AnnData is stored is read as anndata itself reads it; every way in which it is broken is named."""

from __future__ import annotations

import json
import shutil
import warnings
from typing import TYPE_CHECKING, Any

import anndata
import h5py
import numpy as np
import pandas as pd
import polars as pl
import pytest
from cell_tables import written_cells
from scipy import sparse

from feature_store.cells import CSRRows, open_source
from feature_store.cells.gene_table import matrix_tables
from feature_store.errors import InputError
from feature_store.storage.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

N_CELLS, N_GENES = 60, 9


@pytest.fixture
def counts(rng: np.random.Generator) -> np.ndarray:
    return rng.poisson(1.2, (N_CELLS, N_GENES)).astype(np.float32)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Write an AnnData as .h5ad, or as .zarr with `zarr_format`; `settings` are anndata's own."""

    def write(adata: anndata.AnnData, *, zarr_format: int | None = None, settings: Any = None, **options: Any) -> Path:
        path = tmp_path / ("data.zarr" if zarr_format else "data.h5ad")
        # anndata warns about its own default, and zarr about strings, while they write
        with warnings.catch_warnings(), anndata.settings.override(**(settings or {})):
            warnings.simplefilter("ignore")
            if zarr_format is None:
                adata.write_h5ad(path, **options)
            else:
                with anndata.settings.override(zarr_write_format=zarr_format):
                    adata.write_zarr(path, **options)
        return path

    return write


def dense(rows: CSRRows, n_genes: int) -> np.ndarray:
    return sparse.csr_array((rows.data, rows.indices, rows.indptr), shape=(len(rows.indptr) - 1, n_genes)).toarray()


def int64_indices(matrix: np.ndarray) -> sparse.csr_matrix:
    csr = sparse.csr_matrix(matrix)
    csr.indices, csr.indptr = csr.indices.astype(np.int64), csr.indptr.astype(np.int64)
    return csr


MATRICES: dict[str, Callable[[np.ndarray], Any]] = {
    "csr": sparse.csr_matrix,
    "csr array": sparse.csr_array,
    "csr float64": lambda x: sparse.csr_matrix(x.astype(np.float64)),
    "csr int32": lambda x: sparse.csr_matrix(x.astype(np.int32)),
    "csr uint8": lambda x: sparse.csr_matrix(x.astype(np.uint8)),
    "csr uint16": lambda x: sparse.csr_matrix(x.astype(np.uint16)),
    "csr int64 indices": int64_indices,
    "dense": np.asarray,
    "dense float64": lambda x: x.astype(np.float64),
    "dense int64": lambda x: x.astype(np.int64),
    "dense uint8": lambda x: x.astype(np.uint8),
}
STORES: dict[str, dict[str, Any]] = {
    "h5ad": {},
    "h5ad gzip": {"compression": "gzip"},
    "h5ad lzf": {"compression": "lzf"},
    "zarr 2": {"zarr_format": 2},
    "zarr 3": {"zarr_format": 3},
    "zarr 3 sharded": {"zarr_format": 3, "settings": {"auto_shard_zarr_v3": True}},
    "zarr 3 in chunks": {"zarr_format": 3, "chunks": (7, 4)},
}


@pytest.mark.parametrize(
    ("matrix", "store"),
    # only dense arrays are given their chunks
    [(m, s) for m in MATRICES for s in STORES if m.startswith("dense") or "chunks" not in STORES[s]],
)
def test_every_matrix_in_every_store_is_read_as_anndata_reads_it(
    save: Callable[..., Path], counts: np.ndarray, matrix: str, store: str
) -> None:
    path = save(anndata.AnnData(MATRICES[matrix](counts)), **STORES[store])
    with open_source(path) as source:
        assert (source.matrix, source.value_kind) == ("X", "counts")
        for start, stop in ((0, N_CELLS), (0, 1), (13, 29), (N_CELLS - 1, N_CELLS), (5, 5)):
            rows = source.read_rows(start, stop)
            assert (rows.indptr.dtype, rows.indices.dtype, rows.data.dtype) == (np.int64, np.int32, np.float32)
            assert (dense(rows, N_GENES) == counts[start:stop]).all()


def test_indices_of_the_smallest_integers_are_read(save: Callable[..., Path], counts: np.ndarray) -> None:
    path = save(
        anndata.AnnData(sparse.csr_matrix(counts)), settings={"write_csr_csc_indices_with_min_possible_dtype": True}
    )
    with h5py.File(path) as file:
        assert file["X/indices"].dtype == np.uint8
    assert (dense(open_source(path).read_rows(0, N_CELLS), N_GENES) == counts).all()


def test_a_dense_matrix_is_read_in_pieces_that_do_not_change_it(
    save: Callable[..., Path], counts: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("feature_store.cells.matrices.PIECE_VALUES", 7 * N_GENES)
    for options in ({}, {"compression": "gzip"}, {"zarr_format": 3, "chunks": (4, 9)}):
        with open_source(save(anndata.AnnData(counts), **options)) as source:
            for start, stop in ((0, N_CELLS), (6, 8), (7, 7), (0, 0), (3, 41)):
                assert (dense(source.read_rows(start, stop), N_GENES) == counts[start:stop]).all()


def test_layers_and_a_raw_of_more_genes_are_read_with_their_own_genes(
    save: Callable[..., Path], counts: np.ndarray
) -> None:
    log = np.log1p(counts / 3)
    adata = anndata.AnnData(log[:, :4].copy(), layers={"counts": sparse.csr_matrix(counts[:, :4])})
    whole = anndata.AnnData(sparse.csr_matrix(counts), obs=adata.obs)
    whole.var_names = [f"WIDE{i}" for i in range(N_GENES)]
    adata.raw = whole
    for options in ({}, {"zarr_format": 2}, {"zarr_format": 3}):
        path = save(adata, **options)
        with open_source(path, matrix="layers/counts") as layer:
            assert (layer.matrix, layer.n_genes) == ("layers/counts", 4)
            assert (dense(layer.read_rows(0, N_CELLS), 4) == counts[:, :4]).all()
        with open_source(path, matrix="raw") as raw:
            assert raw.gene_symbols == [f"WIDE{i}" for i in range(N_GENES)]
            assert (dense(raw.read_rows(9, 31), N_GENES) == counts[9:31]).all()


def test_the_order_of_the_values_within_a_row_changes_nothing(save: Callable[..., Path], counts: np.ndarray) -> None:
    ordered = sparse.csr_matrix(counts)
    shuffled = ordered.copy()
    for row in range(N_CELLS):
        own = slice(shuffled.indptr[row], shuffled.indptr[row + 1])
        shuffled.indices[own], shuffled.data[own] = shuffled.indices[own][::-1], shuffled.data[own][::-1]
    source = open_source(save(anndata.AnnData(shuffled)))
    for mine, wanted in zip(source.read_rows(0, N_CELLS), (ordered.indptr, ordered.indices, ordered.data), strict=True):
        assert (mine == wanted).all()


def obs_of_every_kind() -> pd.DataFrame:
    n = N_CELLS
    return pd.DataFrame(
        {
            "category": pd.Categorical([None if i == 3 else f"type {i % 3}" for i in range(n)]),
            "years": pd.Categorical([20 + i % 4 for i in range(n)], ordered=True),
            "dose": pd.Categorical(np.array([0.1, 2.5] * (n // 2), dtype=np.float32)),
            "treated": pd.Categorical([i % 2 == 0 for i in range(n)]),
            "one category each": pd.Categorical([f"barcode {i}" for i in range(n)]),
            "text": [f"note {i % 50} é" for i in range(n)],
            "small": np.arange(n, dtype=np.int8),
            "wide": np.arange(n, dtype=np.uint64),
            "single": np.linspace(0, 1, n, dtype=np.float32),
            "score": [np.nan if i % 5 == 0 else i / 3 for i in range(n)],
            "flag": [i % 3 == 0 for i in range(n)],
            "nullable int": pd.array([None if i == 2 else i for i in range(n)], dtype="Int64"),
            "nullable flag": pd.array([None if i == 4 else i % 2 == 0 for i in range(n)], dtype="boolean"),
        },
        index=[f"cell {i} ü" for i in range(n)],
    )


@pytest.mark.parametrize("store", ["h5ad", "h5ad gzip", "zarr 2", "zarr 3"])
def test_every_kind_of_obs_column_is_read_as_anndata_reads_it(
    save: Callable[..., Path], counts: np.ndarray, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("feature_store.cells.annotations.BLOCK_CELLS", 11)
    wanted = obs_of_every_kind()
    path = save(anndata.AnnData(counts, obs=wanted.copy()), **STORES[store])
    source = open_source(path)
    found = source.obs()
    assert found.columns == list(wanted.columns)
    assert dict(found.schema) == {
        **dict.fromkeys(("category", "years", "dose", "treated", "one category each", "text"), pl.String()),
        **{"small": pl.Int8(), "wide": pl.UInt64(), "single": pl.Float32(), "score": pl.Float64()},
        **{"flag": pl.Boolean(), "nullable int": pl.Int64(), "nullable flag": pl.Boolean()},
    }
    for name in wanted.columns:
        expected = [None if pd.isna(value) else value for value in wanted[name].astype(object)]
        if found.schema[name] == pl.String:
            # by array: as Python floats, a float32 of 0.1 would be 0.10000000149011612
            expected = [None if pd.isna(value) else str(value) for value in np.asarray(wanted[name])]
        assert found[name].to_list() == expected, name
    assert source.obs_names().to_list() == wanted.index.tolist()


def test_nullable_strings_are_read_with_their_nulls(save: Callable[..., Path], counts: np.ndarray) -> None:
    text = pd.array([None if i == 1 else f"{i}" for i in range(N_CELLS)], dtype="string")
    adata = anndata.AnnData(counts, obs=pd.DataFrame({"text": text}, index=[f"c{i}" for i in range(N_CELLS)]))
    path = save(adata, settings={"allow_write_nullable_strings": True}, convert_strings_to_categoricals=False)
    with h5py.File(path) as file:
        assert file["obs/text"].attrs["encoding-type"] == "nullable-string-array"
    assert open_source(path).obs()["text"].to_list() == [None if i == 1 else f"{i}" for i in range(N_CELLS)]


def test_obs_of_the_first_encoding_is_read_with_its_categories(tmp_path: Path, counts: np.ndarray) -> None:
    path = tmp_path / "old.h5ad"
    with h5py.File(path, "w") as file:
        x = file.create_dataset("X", data=counts)
        x.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        strings = h5py.string_dtype()
        for name, n in (("obs", N_CELLS), ("var", N_GENES)):
            frame = file.create_group(name)
            columns = np.array(["kind", "score"] if name == "obs" else [], dtype=strings)
            frame.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.1.0", "_index": "index"})
            frame.attrs["column-order"] = columns
            frame["index"] = np.array([f"{name}{i}" for i in range(n)], dtype=strings)
        obs = file["obs"]
        obs["score"] = np.arange(N_CELLS) / 2
        obs["kind"] = np.arange(N_CELLS, dtype=np.int8) % 3 - 1
        obs["__categories/kind"] = np.array(["a", "b"], dtype=strings)
        obs["__categories/kind"].attrs["ordered"] = False
        obs["kind"].attrs["categories"] = obs["__categories/kind"].ref
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = open_source(path)
        found, names = source.obs(), source.obs_names()
    assert found["kind"].to_list()[:4] == [None, "a", "b", None]
    assert found["score"].to_list() == [i / 2 for i in range(N_CELLS)]
    assert names.to_list()[:2] == ["obs0", "obs1"]
    assert source.gene_symbols[0] == "var0"


def test_the_real_files_read_as_anndata_reads_them_in_every_store(scsae_data: Path, save: Callable[..., Path]) -> None:
    adata = anndata.read_h5ad(scsae_data / "kang18_ifnb_2000x9015_counts.h5ad")[:300].copy()
    wanted = adata.X.toarray()
    for options in (*STORES.values(), {"as_dense": ["X"], "compression": "lzf"}):
        if "chunks" in options:
            continue
        with open_source(save(adata, **options)) as source:
            assert (dense(source.read_rows(0, 300), adata.n_vars) == wanted).all()
            obs = source.obs()
        assert obs.columns == list(adata.obs.columns)
        for name in obs.columns:
            if obs.schema[name] == pl.String:
                assert obs[name].to_list() == adata.obs[name].astype(str).tolist()
            else:
                assert np.allclose(obs[name].to_numpy(), adata.obs[name].to_numpy())


def csr_file(tmp_path: Path, counts: np.ndarray, **damage: Any) -> Path:
    """A .h5ad of `counts` whose arrays X/indptr, X/indices or X/data were replaced; None removes one."""
    path = tmp_path / "damaged.h5ad"
    anndata.AnnData(sparse.csr_matrix(counts)).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        for name, change in damage.items():
            values = file[f"X/{name}"][:]
            del file[f"X/{name}"]
            if change is not None:
                file[f"X/{name}"] = change(values)
    return path


def with_value(place: int, value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values[place] = value
        return values

    return change


ONES = np.ones((N_CELLS, N_GENES), dtype=np.float32)
DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "a column twice": (
        {"indices": with_value(3 * N_GENES + 2, 1)},
        r"row 3: column 1 .*sum_duplicates",
    ),
    "a column too far": ({"indices": with_value(4 * N_GENES + 8, 9)}, r"row 4: column 9 .*\[0, 9\)"),
    "a negative column": ({"indices": with_value(0, -1)}, r"row 0: column -1 .*\[0, 9\)"),
    "indptr descends": ({"indptr": with_value(5, 99)}, r"rows \[.*\): indptr.* 540"),
    "indptr too far": ({"indptr": with_value(N_CELLS, 541)}, r"indptr.* 540"),
    "indptr too short": ({"indptr": lambda x: x[:-1]}, r"CSR.*\(60, 9\).* indptr .*\(60,\)"),
    "fewer values than columns": ({"data": lambda x: x[:-1]}, r"indices \(540,\), data \(539,\)"),
    "no values": ({"data": None}, r"X of .* data; "),
    "values of text": ({"data": lambda x: x.astype("S1")}, r"\|S1.*--matrix"),
    "values true or false": ({"data": lambda x: x > 0}, r"bool.*--matrix"),
    "beyond float32": (
        {"data": lambda x: x.astype(np.float64) * 1e300},
        "row 0, column 0: .* inf ",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_sparse_matrix_is_refused_naming_where(tmp_path: Path, damage: str) -> None:
    change, message = DAMAGE[damage]
    with pytest.raises(InputError, match=message) as error:
        open_source(csr_file(tmp_path, ONES, **change))
    assert "damaged.h5ad" in str(error.value)


def test_damage_that_the_sample_missed_is_refused_when_the_genes_are_counted(tmp_path: Path) -> None:
    counts = np.ones((20_000, 2), dtype=np.float32)
    source = open_source(csr_file(tmp_path, counts, indices=with_value(2 * 1300, 1)))
    with pytest.raises(InputError, match="row 1300: column 1 "):
        written_cells(Layout(tmp_path / "store"), source)
    assert not (tmp_path / "store").exists()


def test_a_file_that_is_empty_or_cut_off_is_refused(tmp_path: Path, save: Callable[..., Path]) -> None:
    (tmp_path / "empty.h5ad").touch()
    with pytest.raises(InputError, match=r"empty\.h5ad.*0 bytes"):
        open_source(tmp_path / "empty.h5ad")
    whole = save(anndata.AnnData(np.ones((500, 40), np.float32)), compression="gzip").read_bytes()
    for share in (0.05, 0.5, 0.99):
        (tmp_path / "cut.h5ad").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(InputError, match=r"cut\.h5ad.*HDF5"):
            open_source(tmp_path / "cut.h5ad")


def test_a_block_whose_bytes_changed_is_refused_naming_its_rows(tmp_path: Path, save: Callable[..., Path]) -> None:
    counts = np.random.default_rng(0).poisson(1.0, (4000, 50)).astype(np.float32)
    path = save(anndata.AnnData(sparse.csr_matrix(counts)), compression="gzip")
    with h5py.File(path) as file:
        chunk = file["X/data"].id.get_chunk_info(file["X/data"].id.get_num_chunks() // 2)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset + 10 : chunk.byte_offset + 60] = bytes(50)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"X of .*: rows \[\d+, \d+\).*copy it again"):
        matrix_tables(open_source(path))


def test_no_cells_are_refused(save: Callable[..., Path]) -> None:
    for matrix in (np.zeros((0, 3), np.float32), sparse.csr_matrix((0, 3), dtype=np.float32)):
        with pytest.raises(InputError, match="0 cells x 3 genes"):
            open_source(save(anndata.AnnData(matrix)))


@pytest.fixture
def zarr_folder(save: Callable[..., Path]) -> Path:
    counts = sparse.random_array((3000, 400), density=0.3, format="csr", random_state=0, dtype=np.float32)
    counts.data = np.ceil(counts.data * 9)
    obs = pd.DataFrame({"donor": ["a", "b", "c"] * 1000}, index=[f"c{i}" for i in range(3000)])
    return save(anndata.AnnData(sparse.csr_matrix(counts), obs=obs), zarr_format=3)


def chunks_of(folder: Path, array: str) -> list[Path]:
    return sorted(path for path in (folder / array / "c").rglob("*") if path.is_file())


def test_a_missing_chunk_of_a_zarr_matrix_is_refused(zarr_folder: Path) -> None:
    chunks = chunks_of(zarr_folder, "X/data")
    assert len(chunks) > 1
    chunks[1].unlink()
    with pytest.raises(InputError, match=rf"X of .*: 1 of {len(chunks)} chunks.*copy it"):
        open_source(zarr_folder)


@pytest.mark.parametrize("array", ["X/indices", "X/indptr"])
def test_a_missing_chunk_of_indices_or_indptr_is_refused(zarr_folder: Path, array: str) -> None:
    chunks_of(zarr_folder, array)[0].unlink()
    with pytest.raises(InputError, match=r"sum_duplicates|indptr"):
        open_source(zarr_folder)


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("zarr.json", "zarr group"),
        ("obs", r"no obs|obs of "),
        ("var", r"no var|var of "),
        ("X/indices", "no indices|chunks|sum_duplicates|copy it again"),
        ("obs/donor/codes", "obs column 'donor' of "),
        ("obs/_index", "the index of obs of "),
    ],
)
def test_a_half_copied_zarr_folder_is_refused(zarr_folder: Path, tmp_path: Path, removed: str, message: str) -> None:
    without_consolidated_metadata(zarr_folder)
    gone = zarr_folder / removed
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(InputError, match=message):
        written_cells(Layout(tmp_path / "store"), open_source(zarr_folder), donor="donor")
    assert not (tmp_path / "store").exists()


def test_a_zarr_folder_whose_description_was_cut_off_is_refused(zarr_folder: Path) -> None:
    (zarr_folder / "zarr.json").write_text((zarr_folder / "zarr.json").read_text()[:100])
    with pytest.raises(InputError, match="copy the folder again"):
        open_source(zarr_folder)


def without_consolidated_metadata(folder: Path) -> None:
    """Remove the consolidated metadata, as in a folder that was copied file by file."""
    metadata = json.loads((folder / "zarr.json").read_text())
    metadata.pop("consolidated_metadata", None)
    (folder / "zarr.json").write_text(json.dumps(metadata))


def test_obs_of_another_length_than_the_matrix_is_refused(save: Callable[..., Path], counts: np.ndarray) -> None:
    obs = pd.DataFrame({"donor": ["a", "b"] * (N_CELLS // 2)}, index=[f"c{i}" for i in range(N_CELLS)])
    path = save(anndata.AnnData(counts, obs=obs))
    with h5py.File(path, "r+") as file:
        codes = file["obs/donor/codes"][:-1]
        del file["obs/donor/codes"]
        file["obs/donor/codes"] = codes
        file["obs/donor/codes"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    with pytest.raises(InputError, match=r"'donor' of .* 59 .* 60 "):
        open_source(path).obs()
    with h5py.File(path, "r+") as file:
        names = file["var/_index"][:-1]
        del file["var/_index"]
        file["var/_index"] = names
        file["var/_index"].attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
    with pytest.raises(InputError, match=r"X of .* 9 .* 8 "):
        open_source(path)


@pytest.mark.parametrize("zarr_format", [None, 2, 3])
def test_an_array_of_obsm_is_read_in_ranges_as_anndata_reads_it(save, counts, rng, zarr_format):
    cells = anndata.AnnData(counts, obsm={"X_emb": rng.normal(size=(N_CELLS, 5))})
    source = open_source(save(cells, zarr_format=zarr_format))
    array = source.obsm("X_emb")
    assert array.shape == (N_CELLS, 5)
    for start, stop in ((0, N_CELLS), (7, 9), (3, 3)):
        np.testing.assert_array_equal(array.read(start, stop), cells.obsm["X_emb"][start:stop])


def test_what_is_no_array_of_obsm_is_named(save, counts):
    cells = anndata.AnnData(counts, obsm={"sparse": sparse.csr_matrix(counts), "text": np.full((N_CELLS, 2), "a")})
    source = open_source(save(cells))
    for key, words in (("spars", "did you mean 'sparse'"), ("sparse", "a sparse matrix"), ("text", "of object")):
        with pytest.raises(InputError, match=rf"data\.h5ad .*{words}|obsm/{key} of .*data\.h5ad holds .*{words}"):
            source.obsm(key)
    with pytest.raises(InputError, match="its obsm has none"):
        open_source(save(anndata.AnnData(counts), zarr_format=3)).obsm("X_emb")
