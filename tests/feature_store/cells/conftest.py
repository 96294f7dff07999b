"""Servers of data files, cells with ids, and a larger file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anndata
import numpy as np
import pytest
from scipy import sparse
from served_files import Bucket, ServedFolder, bucket, served_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedFolder]:
    (tmp_path / "served").mkdir()
    with served_folder(tmp_path / "served") as found:
        yield found


@pytest.fixture(scope="module")
def s3() -> Iterator[Bucket]:
    with pytest.MonkeyPatch.context() as patch, bucket(patch, "cells") as made:
        yield made


@pytest.fixture
def cells_with_ids(tiny_cells: anndata.AnnData) -> anndata.AnnData:
    adata = tiny_cells.copy()
    adata.var["gene_ids"] = [f"ENSG{i:011d}" for i in range(adata.n_vars)]
    adata.obs["age"] = np.arange(adata.n_obs) % 7 + 0.5
    return adata


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An .h5ad of 6 MB whose arrays lie in chunks that are compressed."""
    rng = np.random.default_rng(0)
    counts = sparse.random(4000, 1000, density=0.5, format="csr", random_state=rng, dtype=np.float32)
    counts.data = rng.integers(1, 60_000, counts.nnz).astype(np.float32)
    path = tmp_path_factory.mktemp("large") / "large.h5ad"
    anndata.AnnData(counts).write_h5ad(path, compression="gzip")
    return path
