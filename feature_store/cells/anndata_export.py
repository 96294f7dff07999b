"""Cell codes as an AnnData, for scanpy and other tools that read one."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import polars as pl
from scipy import sparse

if TYPE_CHECKING:
    import anndata


def to_anndata(obs: pl.DataFrame, codes: sparse.csr_array, *, key: str, about: Mapping[str, Any]) -> "anndata.AnnData":
    """An AnnData with the cell table in obs, codes [n_cells n_features] in obsm[key], and `about` in uns.

    `about` goes to `uns` under `key` without its "X_"; frames in it become DataFrames. Values that .h5ad cannot hold
    are converted: text to categories, dates and lists to text; columns without any value are left out.
    """
    import anndata

    names = obs["cell_id"] if obs["cell_id"].is_unique().all() else obs["cell_idx"]
    cells = _pandas(obs).set_index(names.cast(pl.String).to_numpy())
    adata = anndata.AnnData(obs=cells, obsm={key: sparse.csr_matrix(codes)})
    adata.uns[key.removeprefix("X_")] = {
        name: _pandas(value) if isinstance(value, pl.DataFrame) else value for name, value in about.items()
    }
    return adata


def _pandas(frame: pl.DataFrame) -> Any:
    """A pandas DataFrame that anndata can write; its index is text."""
    columns = []
    for column in frame.iter_columns():
        if column.null_count() == len(column) and len(column):
            continue
        if isinstance(column.dtype, pl.List):
            columns.append(column.cast(pl.List(pl.String)).list.join(",").cast(pl.Categorical))
        elif column.dtype.is_numeric() or (column.dtype == pl.Boolean and not column.null_count()):
            columns.append(column)
        else:
            columns.append(column.cast(pl.String).cast(pl.Categorical))
    pandas = pl.DataFrame(columns).to_pandas()
    return pandas.set_index(pandas.index.astype(str))
