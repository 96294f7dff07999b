"""The cells of the demo: 700 PBMC that scanpy contains, written as an .h5ad file.

The cells are from one donor and have the labels of sorted cells (Zheng et al. 2017, doi:10.1038/ncomms14049). `.raw`
has log-normalised values of 765 genes, and the suffix of a barcode is the 10x GEM channel. The file has the same bytes
each time.
"""

import warnings
from pathlib import Path

CELL_TYPE = "cell_type"
BATCH = "channel"
FILE_NAME = "pbmc68k_reduced.h5ad"


def write_pbmc68k(folder: Path) -> Path:
    """Write the cells to `folder` unless the file exists; return the file (X log-normalised; obs: type, channel)."""
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
