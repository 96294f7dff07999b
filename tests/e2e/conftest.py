"""Many small shards to disturb, and the store of a run that nothing disturbed."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pipelines.config import ExtractOptions


@dataclass(frozen=True, kw_only=True)
class Calm:
    """An extraction of two layers in many shards, and the store of an undisturbed run of it."""

    options: ExtractOptions
    store: Path
    n_shards: int


@pytest.fixture(scope="session")
def extracted_calmly(ray_local, tiny_model, tmp_path_factory):
    """Extract so many shards of 4 cells, of the tiny genes, undisturbed."""
    import anndata
    import pandas as pd
    import scipy.sparse as sp

    from pipelines.extract import extract

    def make(n_shards) -> Calm:
        folder, n_cells = tmp_path_factory.mktemp("calm"), 4 * n_shards
        counts = np.random.default_rng(7).poisson(1.0, (n_cells, 30)).astype(np.float32)
        cells = anndata.AnnData(
            X=sp.csr_matrix(counts),
            obs=pd.DataFrame(index=[f"cell{i}" for i in range(n_cells)]),
            var=pd.DataFrame(index=[f"GENE{i}" for i in range(30)]),
        )
        cells.write_h5ad(folder / "many.h5ad")
        options = ExtractOptions(
            data=folder / "many.h5ad", model=str(tiny_model), layer=("0", "1"), shard_cells=4, num_actors=2
        )
        extract(options, folder / "store")
        return Calm(options=options, store=folder / "store", n_shards=n_shards)

    return make


@pytest.fixture(scope="session")
def calm(extracted_calmly) -> Calm:
    """300 shards."""
    return extracted_calmly(300)
