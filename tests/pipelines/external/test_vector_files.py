"""Files of vectors: every format gives the numbers that were written, in any range; every fault is one error."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import anndata
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from feature_store.cells import Source, open_source
from feature_store.errors import InputError
from pipelines.external.vectors import checked_digest, open_vectors

if TYPE_CHECKING:
    from pathlib import Path

N, WIDTH = 72, 7


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(N, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny_cells: anndata.AnnData, values: np.ndarray):
    cells = tiny_cells.copy()
    cells.obsm["X_emb"] = values
    cells.obsm["X_cube"] = values[:, :, None]
    cells.obsm["table"] = pd.DataFrame(values, index=cells.obs_names, columns=[f"d{i}" for i in range(WIDTH)])
    file = tmp_path_factory.mktemp("vectors") / "cells.h5ad"
    cells.write_h5ad(file)
    return open_source(file)


def npy(path: Path, values: np.ndarray) -> str:
    np.save(path / "v.npy", values)
    return str(path / "v.npy")


def fortran(path: Path, values: np.ndarray) -> str:
    np.save(path / "v.npy", np.asfortranarray(values.astype(np.float64)))
    return str(path / "v.npy")


def safetensors(path: Path, values: np.ndarray) -> str:
    save_file({"emb": torch.from_numpy(values)}, path / "v.safetensors")
    return str(path / "v.safetensors")


def keyed(path: Path, values: np.ndarray) -> str:
    save_file({"emb": torch.from_numpy(values), "other": torch.zeros(2, 2)}, path / "v.safetensors")
    return f"{path / 'v.safetensors'}:emb"


def tensor(path: Path, values: np.ndarray) -> str:
    torch.save(torch.nn.Parameter(torch.from_numpy(values)), path / "v.pt")
    return str(path / "v.pt")


def old_torch(path: Path, values: np.ndarray) -> str:
    torch.save(torch.from_numpy(values), path / "v.pt", _use_new_zipfile_serialization=False)
    return str(path / "v.pt")


def of_dictionary(path: Path, values: np.ndarray) -> str:
    torch.save({"emb": torch.from_numpy(values), "names": ["a"], "step": torch.tensor(3)}, path / "v.pt")
    return str(path / "v.pt")


def columns(path: Path, values: np.ndarray) -> str:
    pl.DataFrame({f"d{i}": values[:, i] for i in range(WIDTH)}).write_parquet(path / "v.parquet", row_group_size=20)
    return str(path / "v.parquet")


def lists(path: Path, values: np.ndarray) -> str:
    pl.DataFrame({"vector": values.tolist()}).write_parquet(path / "v.parquet", row_group_size=20)
    return str(path / "v.parquet")


def arrays(path: Path, values: np.ndarray) -> str:
    frame = pl.DataFrame({"cell_id": [f"cell{i}" for i in range(N)], "vector": values})
    frame.sample(fraction=1, shuffle=True, seed=1).write_parquet(path / "v.parquet", row_group_size=20)
    return str(path / "v.parquet")


def of_pandas(path: Path, values: np.ndarray) -> str:
    frame = pd.DataFrame(values, index=[f"cell{i}" for i in range(N)], columns=[str(i) for i in range(WIDTH)])
    others = pd.DataFrame(values[:5] * np.nan, index=[f"other{i}" for i in range(5)], columns=frame.columns)
    pd.concat([others, frame.iloc[::-1]]).to_parquet(path / "v.parquet")
    return str(path / "v.parquet")


def obsm(_path: Path, _values: np.ndarray) -> str:
    return "obsm/X_emb"


FORMS = [npy, fortran, safetensors, keyed, tensor, old_torch, of_dictionary, columns, lists, arrays, of_pandas, obsm]


@pytest.mark.parametrize("write", FORMS)
def test_every_format_gives_the_vectors_of_the_cells_and_one_digest(write, tmp_path, source, values):
    vectors = open_vectors(write(tmp_path, values), source)
    assert (vectors.n_rows, vectors.width) == values.shape
    for start, stop in ((0, N), (0, 1), (19, 21), (5, 5), (71, 72)):
        read = vectors.read(start, stop)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, values[start:stop])
    cells = np.array([0, 3, 19, 20, 41, 71])
    np.testing.assert_array_equal(vectors.read_cells(cells), values[cells])
    assert checked_digest(vectors, source, dtype="f32") == digest_of("obsm/X_emb", source)


def digest_of(text: str, source: Source) -> str:
    return checked_digest(open_vectors(text, source), source, dtype="f32")


def test_half_precision_and_integers_are_read_exactly(tmp_path, source, values):
    half, whole = torch.from_numpy(values).bfloat16(), np.arange(N * 3).reshape(N, 3)
    save_file({"emb": half}, tmp_path / "v.safetensors")
    torch.save(half.half(), tmp_path / "v.pt")
    np.save(tmp_path / "v.npy", whole)
    found = {name: open_vectors(str(tmp_path / name), source).read(0, N) for name in ("v.safetensors", "v.pt", "v.npy")}
    np.testing.assert_array_equal(found["v.safetensors"], half.float().numpy())
    np.testing.assert_array_equal(found["v.pt"], half.half().float().numpy())
    np.testing.assert_array_equal(found["v.npy"], whole)


def test_ids_say_how_many_matched_and_how_many_rows_were_left_out(tmp_path, source, values):
    assert "72 of 72" in open_vectors(arrays(tmp_path, values), source).joined
    assert "5 rows" in open_vectors(of_pandas(tmp_path, values), source).joined


def test_vectors_of_several_files_follow_each_other(tmp_path, tiny_cells, values):
    paths = []
    for name, low, high in (("a.h5ad", 0, 30), ("b.h5ad", 30, N)):
        part = tiny_cells[low:high].copy()
        part.obsm["X_emb"] = values[low:high]
        part.write_h5ad(tmp_path / name)
        paths.append(tmp_path / name)
    vectors = open_vectors("obsm/X_emb", open_source(paths))
    for start, stop in ((0, N), (29, 31), (30, 40), (0, 30)):
        np.testing.assert_array_equal(vectors.read(start, stop), values[start:stop])
    other = anndata.read_h5ad(paths[1])
    other.obsm["X_emb"] = values[30:, :3]
    other.write_h5ad(tmp_path / "c.h5ad")
    with pytest.raises(InputError, match=r"obsm/X_emb .*a\.h5ad: 7, .*c\.h5ad: 3"):
        open_vectors("obsm/X_emb", open_source([paths[0], tmp_path / "c.h5ad"]))


def with_nan(path: Path, values: np.ndarray) -> str:
    return npy(path, np.where(np.arange(N * WIDTH).reshape(N, WIDTH) == 24, np.nan, values))


def with_infinity(path: Path, values: np.ndarray) -> str:
    return npy(path, np.where(np.arange(N * WIDTH).reshape(N, WIDTH) == 24, 1e40, values.astype(np.float64)))


def too_large(path: Path, values: np.ndarray) -> str:
    return npy(path, np.where(np.arange(N * WIDTH).reshape(N, WIDTH) == 24, 1e5, values))


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (with_nan, r"v\.npy, row 3 \(cell 'cell3'\), dimension 3 is nan"),
        (with_infinity, r"v\.npy, row 3 \(cell 'cell3'\), dimension 3 is inf"),
        (too_large, r"row 3 \(cell 'cell3'\), dimension 3 is 100000; f16 ends at 65504.*--dtype bf16"),
    ],
)
def test_a_number_that_cannot_be_stored_is_named_by_row_and_cell(write, words, tmp_path, source, values):
    vectors = open_vectors(write(tmp_path, values), source)
    with pytest.raises(InputError, match=words):
        checked_digest(vectors, source, dtype="f16")


def null(path: Path, values: np.ndarray) -> str:
    pl.DataFrame({"a": [*values[:-1, 0].tolist(), None], "b": values[:, 1]}).write_parquet(path / "v.parquet")
    return str(path / "v.parquet")


def test_a_null_is_no_number(tmp_path, source, values):
    with pytest.raises(InputError, match=r"row 71 \(cell 'cell71'\), dimension 0 is nan"):
        digest_of(null(tmp_path, values), source)


class Thing:
    """A class that no file may make an object of."""


def fewer(path: Path, values: np.ndarray) -> str:
    return npy(path, values[:-1])


def flat(path: Path, values: np.ndarray) -> str:
    return npy(path, values.ravel())


def three(path: Path, values: np.ndarray) -> str:
    return npy(path, values[:, :, None])


def texts(path: Path, values: np.ndarray) -> str:
    return npy(path, values.astype(str))


def complex_numbers(path: Path, values: np.ndarray) -> str:
    return npy(path, values.astype(complex))


def objects(path: Path, values: np.ndarray) -> str:
    np.save(path / "v.npy", values.astype(object), allow_pickle=True)
    return str(path / "v.npy")


def archive(path: Path, values: np.ndarray) -> str:
    np.savez(path / "v.npz", values)
    return str(shutil.move(path / "v.npz", path / "v.npy"))


def cut_off(path: Path, values: np.ndarray) -> str:
    file = npy(path, values)
    (path / "v.npy").write_bytes((path / "v.npy").read_bytes()[:-100])
    return file


def empty(path: Path, _values: np.ndarray) -> str:
    (path / "v.npy").write_bytes(b"")
    return str(path / "v.npy")


def pointer(path: Path, _values: np.ndarray) -> str:
    (path / "v.npy").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")
    return str(path / "v.npy")


def pickled(path: Path, values: np.ndarray) -> str:
    torch.save({"emb": torch.from_numpy(values), "made by": Thing()}, path / "v.pt")
    return str(path / "v.pt")


def no_torch(path: Path, _values: np.ndarray) -> str:
    (path / "v.pt").write_text("emb")
    return str(path / "v.pt")


def list_of_tensors(path: Path, values: np.ndarray) -> str:
    torch.save([torch.from_numpy(values)], path / "v.pt")
    return str(path / "v.pt")


def two_tensors(path: Path, values: np.ndarray) -> str:
    save_file({"a": torch.from_numpy(values), "b": torch.from_numpy(values.copy())}, path / "v.safetensors")
    return str(path / "v.safetensors")


def wrong_key(path: Path, values: np.ndarray) -> str:
    return f"{two_tensors(path, values)}:c"


def truths(path: Path, values: np.ndarray) -> str:
    save_file({"a": torch.from_numpy(values > 0)}, path / "v.safetensors")
    return str(path / "v.safetensors")


def no_safetensors(path: Path, _values: np.ndarray) -> str:
    (path / "v.safetensors").write_bytes(b"emb" * 10)
    return str(path / "v.safetensors")


def no_parquet(path: Path, _values: np.ndarray) -> str:
    (path / "v.parquet").write_text("emb" * 10)
    return str(path / "v.parquet")


def with_text_column(path: Path, values: np.ndarray) -> str:
    pl.DataFrame({"a": values[:, 0], "batch": ["b"] * N}).write_parquet(path / "v.parquet")
    return str(path / "v.parquet")


def ids_alone(path: Path, _values: np.ndarray) -> str:
    pl.DataFrame({"cell_id": [f"cell{i}" for i in range(N)]}).write_parquet(path / "v.parquet")
    return str(path / "v.parquet")


def unequal_lists(path: Path, values: np.ndarray) -> str:
    rows = values.tolist()
    rows[25] = rows[25][:3]
    pl.DataFrame({"vector": rows}).write_parquet(path / "v.parquet", row_group_size=20)
    return str(path / "v.parquet")


def by_id(path: Path, ids: list[str], values: np.ndarray) -> str:
    pl.DataFrame({"cell_id": ids, "a": values[: len(ids), 0]}).write_parquet(path / "v.parquet")
    return str(path / "v.parquet")


def ids_missing(path: Path, values: np.ndarray) -> str:
    return by_id(path, [f"cell{i}" for i in range(N - 2)], values)


def ids_of_others(path: Path, values: np.ndarray) -> str:
    return by_id(path, [f"cell{i}-1" for i in range(N)], values)


def ids_twice(path: Path, values: np.ndarray) -> str:
    return by_id(path, [f"cell{i}" for i in range(N - 1)] + ["cell7"], values)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (fewer, r"v\.npy has 71 vectors, and .*cells\.h5ad has 72 cells"),
        (flat, r"v\.npy holds an array of shape \(504,\)"),
        (three, r"v\.npy holds an array of shape \(72, 7, 1\)"),
        (texts, r"v\.npy holds an array .* of <U"),
        (complex_numbers, r"v\.npy holds an array .* of complex128"),
        (objects, r"v\.npy cannot be read as an array of numbers"),
        (archive, r"v\.npy is an archive"),
        (cut_off, r"v\.npy cannot be read"),
        (empty, r"v\.npy is empty"),
        (pointer, r"v\.npy is a Git LFS pointer"),
        (pickled, r"v\.pt holds pickled objects"),
        (no_torch, r"v\.pt .*is no torch file"),
        (list_of_tensors, r"v\.pt holds a list"),
        (two_tensors, r"v\.safetensors holds a \(72, 7\), b \(72, 7\); name the array .*v\.safetensors:KEY"),
        (wrong_key, r"v\.safetensors has no 'c'; it holds a \(72, 7\)"),
        (truths, r"v\.safetensors:a holds an array .* of BOOL"),
        (no_safetensors, r"v\.safetensors is no safetensors file"),
        (no_parquet, r"v\.parquet is no Parquet file"),
        (with_text_column, r"v\.parquet has to hold numeric columns.*batch \("),
        (ids_alone, r"v\.parquet has to hold numeric columns.*no other column"),
        (unequal_lists, r"row 25 of .*v\.parquet is a list of 3 numbers, and the first one has 7"),
        (ids_missing, r"70 of 72 cells have a row in .*v\.parquet by cell_id, and 2 have none \(cell70, cell71"),
        (ids_of_others, r"0 of 72 cells have a row in .*72 have none \(cell0, cell1, cell2, \.\.\.; .*cell0-1"),
        (ids_twice, r"several rows of the cell 'cell7'"),
        (lambda *_: "obsm/X_em", r"cells\.h5ad has no obsm/X_em; its obsm has .*X_emb.*did you mean 'X_emb'"),
        (lambda *_: "obsm/X_cube", r"obsm/X_cube of .* holds an array \(72, 7, 1\)"),
        (lambda *_: "obsm/table", r"obsm/table of .* holds a table"),
        (lambda path, _: str(path / "none.npy"), r"no file .*none\.npy; its folder has no \.npy file"),
    ],
)
def test_a_fault_is_one_error_that_names_the_file_and_what_is_wrong(write, words, tmp_path, source, values):
    with pytest.raises(InputError, match=words):
        digest_of(write(tmp_path, values), source)


def test_cells_of_one_name_are_not_joined_by_name(tmp_path, tiny_cells, values):
    cells = tiny_cells.copy()
    cells.obs_names = ["cell1", *cells.obs_names[1:]]
    cells.write_h5ad(tmp_path / "twice.h5ad")
    with pytest.raises(InputError, match=r"twice\.h5ad has 2 cells of the name 'cell1'"):
        open_vectors(arrays(tmp_path, values), open_source(tmp_path / "twice.h5ad"))


@pytest.mark.parametrize("write", [columns, arrays])
def test_every_row_group_is_read_once_in_whatever_order_the_rows_are(write, tmp_path, source, values, monkeypatch):
    read: list[int] = []
    whole = pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, group: int, **options: object) -> pa.Table:
        read.append(group)
        return whole(self, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    vectors = open_vectors(write(tmp_path, values), source)
    for start in range(0, N, 6):
        vectors.read(start, start + 6)
    assert sorted(read) == [0, 1, 2, 3]


def test_what_the_digest_is_of_does_not_depend_on_the_width_alone(source, values, tmp_path):
    digests = set()
    for number, changed in enumerate((values, -values, values[:, ::-1], np.hstack([values, values]))):
        (tmp_path / str(number)).mkdir()
        digests.add(digest_of(npy(tmp_path / str(number), changed), source))
    assert len(digests) == 4
    assert all(len(json.dumps(digest)) == 66 for digest in digests)
