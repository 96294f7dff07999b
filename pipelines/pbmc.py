"""The demo's cells: 700 PBMC that scanpy ships inside its package, as an .h5ad like any user's.

Zheng et al. 2017 (doi:10.1038/ncomms14049), one donor, sorted-cell labels; `.raw` holds log-normalised values of 765
genes, and the barcode's suffix is the 10x GEM channel. The file written is the same byte for byte each time.
"""

import warnings
from pathlib import Path

CELL_TYPE = "cell_type"
BATCH = "channel"
FILE_NAME = "pbmc68k_reduced.h5ad"


def write_pbmc68k(folder: Path) -> Path:
    """Write the cells to `folder` unless they are there; return the file (X log-normalised; obs: type, channel)."""
    target = folder / FILE_NAME
    if target.exists():
        return target
    import anndata
    import pandas as pd

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import scanpy

        shipped = scanpy.datasets.pbmc68k_reduced()
        channel = [f"channel {name.rsplit('-', 1)[1]}" for name in shipped.obs_names]
        obs = pd.DataFrame(
            {CELL_TYPE: shipped.obs["bulk_labels"].astype(str).to_numpy(), BATCH: channel}, index=shipped.obs_names
        )
        cells = anndata.AnnData(X=shipped.raw.X, obs=obs, var=pd.DataFrame(index=shipped.raw.var_names))
    folder.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    cells.write_h5ad(temporary, compression="gzip")
    temporary.replace(target)
    return target
