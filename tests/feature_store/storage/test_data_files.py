"""Pointers, pages, archives and half downloads in the place of data are named, with what to do."""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING

import anndata
import h5py
import numpy as np
import pytest

from feature_store.associations.gene_sets import read_gmt
from feature_store.cells import open_source
from feature_store.errors import InputError
from feature_store.storage.data_files import refuse_other_than_hdf5

if TYPE_CHECKING:
    from pathlib import Path

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 16089058\n"
IN_THE_PLACE = {
    "empty": (b"", ["empty", "fetch"]),
    "lfs pointer": (POINTER, ["Git LFS", "16,089,058", "git lfs pull"]),
    "annex pointer": (b"/annex/objects/SHA256E-s9--1.h5ad\n", ["git-annex", "git annex get"]),
    "page": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", ["web page", "download"]),
    "answer": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', ["server", "download"]),
    "zeros": (bytes(9000), ["zeros", "fetch"]),
}


@pytest.fixture
def cells(rng: np.random.Generator) -> anndata.AnnData:
    return anndata.AnnData(rng.poisson(1.0, (200, 30)).astype(np.float32))


@pytest.mark.parametrize("what", IN_THE_PLACE)
@pytest.mark.parametrize("name", ["data.h5ad", "data.h5", "data.zarr", "sets.gmt"])
def test_what_lies_in_the_place_of_data_is_named(tmp_path: Path, name: str, what: str) -> None:
    content, words = IN_THE_PLACE[what]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        (read_gmt if name.endswith(".gmt") else open_source)(path)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in (str(path), *words)), message


@pytest.mark.parametrize("share", [0.001, 0.3, 0.999])
@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_a_half_download_says_how_many_bytes_are_there(
    tmp_path: Path, cells: anndata.AnnData, share: float, libver: str
) -> None:
    path = tmp_path / "a.h5ad"
    with h5py.File(path, "w", libver=libver) as file:
        file["X"] = cells.X
    refuse_other_than_hdf5(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: max(9, int(len(whole) * share))])
    with pytest.raises(InputError, match=r"incomplete.* bytes .*fetch") as error:
        open_source(path)
    if share > 0.1:
        assert f"{path.stat().st_size:,} of {len(whole):,} bytes" in str(error.value)


@pytest.mark.parametrize("part", ["zarr.json", "c"])
def test_pointers_in_the_place_of_the_files_of_a_zarr_folder_are_named(
    tmp_path: Path, cells: anndata.AnnData, part: str
) -> None:
    path = tmp_path / "a.zarr"
    # zarr warns about strings while it writes
    with warnings.catch_warnings(), anndata.settings.override(zarr_write_format=3):
        warnings.simplefilter("ignore")
        cells.write_zarr(path)
    for file in path.rglob("*"):
        if file.is_file() and part in file.relative_to(path).parts:
            file.write_bytes(POINTER)
    with pytest.raises(InputError, match=r"a\.zarr.*Git LFS.*git lfs pull"):
        open_source(path)


def test_a_compressed_file_is_refused_with_the_command_that_unpacks_it(tmp_path: Path, cells: anndata.AnnData) -> None:
    cells.write_h5ad(tmp_path / "a.h5ad")
    packed = tmp_path / "b.h5ad"
    packed.write_bytes(gzip.compress((tmp_path / "a.h5ad").read_bytes()))
    with pytest.raises(InputError, match="gzip") as error:
        open_source(packed)
    command = str(error.value).rpartition(": ")[2]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    with open_source(tmp_path / command.rpartition(" ")[2]) as source:
        assert source.n_cells == 200


def test_a_table_of_text_is_refused_with_the_command_that_converts_it(tmp_path: Path, cells: anndata.AnnData) -> None:
    path = tmp_path / "a.csv"
    cells.to_df().to_csv(path)
    with pytest.raises(InputError, match="convert") as error:
        open_source(path)
    code = re.search(r'python -c "(.*)"$', str(error.value))[1]  # type: ignore[index]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    with open_source(tmp_path / "a.h5ad") as source:
        assert (source.n_cells, source.n_genes) == (200, 30)


def test_a_mudata_is_refused_with_the_command_that_writes_its_rna(tmp_path: Path, cells: anndata.AnnData) -> None:
    cells.write_h5ad(tmp_path / "rna.h5ad")
    path = tmp_path / "a.h5mu"
    with h5py.File(path, "w") as file, h5py.File(tmp_path / "rna.h5ad") as rna:
        for name in ("obs", "var"):
            rna.copy(name, file)
        for name in ("rna", "prot"):
            file.create_group(f"mod/{name}")
    with pytest.raises(InputError, match=r"MuData with prot, rna; .*write_h5ad"):
        open_source(path)


def test_a_copied_file_is_not_refused(tmp_path: Path, cells: anndata.AnnData) -> None:
    cells.write_h5ad(tmp_path / "a.h5ad")
    shutil.copy(tmp_path / "a.h5ad", tmp_path / "b.h5ad")
    open_source(tmp_path / "b.h5ad").close()
