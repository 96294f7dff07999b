"""Tables and matrices of cells as an AnnData, for scanpy, cellxgene and other tools that read one."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from scipy import sparse

if TYPE_CHECKING:
    import anndata


def to_anndata(
    obs: pl.DataFrame,
    *,
    X: Any = None,
    var: pl.DataFrame | None = None,
    var_names: pl.Series | None = None,
    obsm: Mapping[str, Any],
    uns: Mapping[str, Any],
) -> "anndata.AnnData":
    """An AnnData with the cell table in obs, X [n_cells n_var] with the frame `var` beside it, arrays, and `uns`.

    The names of obs are cell_id, or cell_idx where ids repeat; those of var get "-1", "-2" and so on where they repeat.
    Matrices stay sparse, as CSR. Frames, also those in mappings of `uns`, become DataFrames. Values that .h5ad cannot
    hold are converted: text to categories, dates and lists to text; columns without any value are left out.
    """
    import anndata

    names = obs["cell_id"] if obs["cell_id"].is_unique().all() else obs["cell_idx"]
    return anndata.AnnData(
        X=_as_csr(X),
        obs=_pandas(obs).set_index(names.cast(pl.String).to_numpy()),
        var=None if var is None or var_names is None else _pandas(var).set_index(_unique(var_names)),
        obsm={key: _as_csr(array) for key, array in obsm.items()},
        uns=_frames_to_pandas(uns),
    )


def _as_csr(array: Any) -> Any:
    """A sparse array as the matrix that scanpy knows, with indices of 4 bytes where they fit; or what else it is."""
    if not isinstance(array, sparse.csr_array):
        return array
    matrix: Any = sparse.csr_matrix(array)
    if max(matrix.nnz, *matrix.shape) <= np.iinfo(np.int32).max:
        matrix.indices, matrix.indptr = matrix.indices.astype(np.int32), matrix.indptr.astype(np.int32)
    return matrix


def _unique(names: pl.Series) -> Any:
    from anndata.utils import make_index_unique
    from pandas import Index

    return make_index_unique(Index(names.cast(pl.String).to_list(), dtype=object))


def _frames_to_pandas(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _frames_to_pandas(one) for name, one in value.items()}
    return _pandas(value) if isinstance(value, pl.DataFrame) else value


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
