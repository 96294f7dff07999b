"""Which format a path has, told by its content: a name says nothing about a download that was renamed."""

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py

from feature_store.cells.files.anndata_file import AnnDataFile
from feature_store.cells.files.cell_file import CellFile, Content, names_with_closest, reading
from feature_store.cells.files.gene_lists import is_parquet, open_gene_lists, parts_in
from feature_store.cells.files.mtx import is_mtx, matrices_in, open_mtx
from feature_store.cells.files.soma import is_experiment, is_soma, open_soma_experiment
from feature_store.cells.files.tenx_h5 import matrices_of_tenx, open_tenx_h5
from feature_store.errors import InputError, NotFoundError
from feature_store.storage.addresses import DataPath, RemotePath
from feature_store.storage.data_files import (
    HEAD_BYTES,
    refuse_other_than_hdf5,
    refuse_other_than_hdf5_head,
    refuse_unfetched,
    refuse_unfetched_below,
)
from feature_store.storage.range_file import RangeFile, open_object

FORMATS = (
    "an .h5ad file, an AnnData .zarr folder, a 10x .h5 file, the folder of a matrix.mtx, one of Parquet parts with "
    "lists of genes, or a SOMA experiment"
)
COLLECTION = "annbatch-preshuffled"
"""The encoding-type of a zarr group of several AnnData, which annbatch writes."""
_ZARR_FILES = ("zarr.json", ".zgroup")


def open_file(path: DataPath, *, matrix: str | None = None, where: str | None = None) -> CellFile:
    """Open a file or folder of cells; at an address, an HDF5 file or a group of zarr.

    `matrix` is a matrix of it, "X", "raw" or "layers/NAME" of an AnnData; None takes the best (`matrix_choice`).
    `where` is a condition on obs, by which a SOMA experiment takes some of its cells; InputError for other formats.
    InputError for a missing or damaged file, one of no known format, an empty matrix, and one without a matrix of
    counts or of log-normalised values (the message lists what every matrix of the file holds). NotFoundError and
    InputError as from `open_object` and `open_remote_group` for an address.
    """
    if isinstance(path, RemotePath):
        _refuse_condition(path, where)
        return _open_address(path, matrix)
    if not path.exists():
        beside = sorted(file.name for file in path.parent.iterdir()) if path.parent.is_dir() else []
        beside = [name for name in beside if name.endswith((".h5ad", ".h5", ".zarr"))]
        is_there = path.parent.is_dir()
        has = f"has {names_with_closest(path.name, beside)}" if beside else "has no .h5ad, .h5 or .zarr file"
        raise InputError(
            f"there is no file {path}; the folder {path.parent.absolute()} {has if is_there else 'does not exist'}"
        )
    if path.is_dir() and is_soma(path):
        return open_soma_experiment(path, matrix=matrix, where=where)
    _refuse_condition(path, where)
    if path.is_dir():
        return _open_folder(path, matrix)
    refuse_unfetched(path)
    if is_parquet(path):
        return open_gene_lists(path, matrix=matrix)
    if is_mtx(path):
        return open_mtx(path, matrix=matrix)
    refuse_other_than_hdf5(path)
    return _open_hdf5(path, matrix)


def _refuse_condition(path: DataPath, where: str | None) -> None:
    """Raise InputError for a condition on what is no SOMA experiment in a folder."""
    if where is not None:
        raise InputError(
            f"--where was {where!r}, but {path} is no SOMA experiment, and only of these a condition takes some of the "
            "cells; leave it out, or write a file of the cells that you want, for example "
            "a[a.obs['tissue'] == 'lung'].write_h5ad('lung.h5ad')"
        )


def files_of(path: DataPath) -> Sequence[DataPath]:
    """The files that a path stands for: the data sets of a collection in their order, any other path itself.

    A collection is a zarr group that annbatch wrote, or the folder of .zarr folders that its first versions wrote. What
    is at an address is never one.
    """
    if isinstance(path, RemotePath) or not path.is_dir():
        return [path]
    if not any((path / name).exists() for name in _ZARR_FILES):
        inside = [one for one in path.iterdir() if re.fullmatch(r"(chunk|dataset)_\d+\.zarr", one.name)]
        return sorted(inside, key=_place) or [path]
    names = [one.name for one in path.iterdir() if re.fullmatch(r"dataset_\d+", one.name)]
    if not names or (path / "obs").exists():
        return [path]
    is_collection = zarr_group(path).attrs.get("encoding-type") == COLLECTION
    inside = sorted((path / name for name in names), key=_place)
    return inside if is_collection else [path]


def _place(path: Path) -> tuple[list[int], str]:
    """The place of a data set by the numbers in its name: dataset_10 comes after dataset_9."""
    return [int(number) for number in re.findall(r"\d+", path.name)], path.name


def _open_folder(path: Path, matrix: str | None) -> CellFile:
    if not any((path / name).exists() for name in _ZARR_FILES):
        if matrices_in(path):
            return open_mtx(path, matrix=matrix)
        if parts_in(path):
            return open_gene_lists(path, matrix=matrix)
        inside = [one.name for one in sorted(path.iterdir()) if _may_be_cells(one)]
        raise InputError(
            f"{path} is a folder but not a zarr group, and has no matrix.mtx and no Parquet parts; give {FORMATS}"
            + (f" (it holds {', '.join(inside[:5])})" if inside else "")
        )
    return _of_anndata(path, zarr_group(path), matrix)


def _may_be_cells(path: Path) -> bool:
    """Whether what lies in a folder looks like cells, by its name or by what is in it."""
    is_folder = path.is_dir() and bool(is_experiment(path) or matrices_in(path) or parts_in(path))
    return is_folder or path.suffix in (".h5ad", ".h5", ".zarr")


def _open_address(path: RemotePath, matrix: str | None) -> CellFile:
    """Open what is at an address: what is called .zarr, or is no object itself, is taken for a group of zarr."""
    from feature_store.cells.files.remote_zarr import open_remote_group

    if path.suffix != ".zarr":
        with suppress(NotFoundError):
            return _open_object(path, matrix)
    group, content = open_remote_group(path)
    if group.attrs.get("encoding-type") == COLLECTION:
        raise InputError(f"{path} is a collection of several AnnData, which is read from a folder alone; download it")
    return _of_anndata(path, group, matrix, content)


def _open_object(path: RemotePath, matrix: str | None) -> CellFile:
    file, content = open_object(path)
    refuse_other_than_hdf5_head(path, file.read(HEAD_BYTES), content.size_bytes)
    return _open_hdf5(path, matrix, file, content)


def _open_hdf5(
    path: DataPath, matrix: str | None, at_address: RangeFile | None = None, content: Content | None = None
) -> CellFile:
    try:
        file = h5py.File(at_address or path, "r", locking="best-effort")
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path} is not an HDF5 file, or is damaged ({error}); give an .h5ad file") from error
    with reading(path, "the list of its groups"):
        is_tenx = bool(matrices_of_tenx(file))
    if is_tenx:
        try:
            return open_tenx_h5(path, file, matrix=matrix, content=content)
        except InputError:
            file.close()
            raise
    return _of_anndata(path, file, matrix, content)


def zarr_group(path: Path) -> Any:
    """The zarr group in a folder. InputError for one that is damaged or was never fetched."""
    import zarr

    for name in _ZARR_FILES:
        if (path / name).is_file():
            refuse_unfetched(path / name)
    try:
        return zarr.open_group(path, mode="r")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{path} is not a zarr group, or is damaged ({error}); copy the folder again") from error


def _of_anndata(path: DataPath, file: Any, matrix: str | None, content: Content | None = None) -> AnnDataFile:
    try:
        missing = [name for name in ("obs", "var") if name not in file]
        if "mod" in file and "X" not in file:
            modalities = ", ".join(file["mod"])
            command = f"import mudata; mudata.read({str(path)!r})['rna'].write_h5ad('rna.h5ad')"
            raise InputError(f'{path} is a MuData with {modalities}; write its RNA alone: python -c "{command}"')
        if missing:
            raise InputError(
                f"{path} is not an AnnData: it has no {' and no '.join(missing)}; it has {', '.join(file) or 'nothing'}"
                f"; give {FORMATS}"
            )
        return AnnDataFile(path, file, matrix=matrix, content=content)
    except InputError:
        if hasattr(file, "close"):
            file.close()
        if isinstance(path, Path) and path.is_dir():
            refuse_unfetched_below(path)
        raise
