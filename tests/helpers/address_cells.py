"""Whether data at an address are those of the local file, and what changes a file."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import cell_files
import h5py
import numpy as np
from scipy import sparse

from feature_store.cells import Source, open_source

if TYPE_CHECKING:
    from pathlib import Path


FORMATS = {
    "h5ad": cell_files.h5ad,
    "h5ad, dense": lambda adata, folder: cell_files.h5ad(adata, folder, convert=lambda counts: counts.toarray()),
    "10x, 3": cell_files.tenx_3,
    "zarr, 2": lambda adata, folder: cell_files.zarr_folder(adata, folder, version=2),
    "zarr, 3": cell_files.zarr_folder,
    "zarr, sharded": lambda adata, folder: cell_files.zarr_folder(adata, folder, sharded=True),
}


def rows_of(source: Source) -> np.ndarray[Any, Any]:
    rows = source.read_rows(0, source.n_cells)
    return sparse.csr_array((rows.data, rows.indices, rows.indptr), shape=(source.n_cells, source.n_genes)).toarray()


def same(address: str, path: Path) -> None:
    with open_source(address) as there, open_source(path) as here:
        np.testing.assert_array_equal(rows_of(there), rows_of(here))
        assert there.obs().equals(here.obs())
        assert there.obs_names().equals(here.obs_names())
        assert (there.gene_symbols, there.ensembl_ids) == (here.gene_symbols, here.ensembl_ids)
        assert (there.formats, there.matrix, there.value_kind) == (here.formats, here.matrix, here.value_kind)


def change(path: Path) -> None:
    """Write other values of the same size."""
    before = path.stat()
    with h5py.File(path, "r+") as file:
        file["X/data"][:] = file["X/data"][:] + 1
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
