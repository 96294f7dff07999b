"""10x: the .h5 files of Cell Ranger, such as filtered_feature_bc_matrix.h5.

    version 3 and later   /matrix/{barcodes, data, indices, indptr, shape}, /matrix/features/{id, name, feature_type}
    version 2             /GENOME/{barcodes, data, genes, gene_names, indices, indptr, shape}, a group for each genome

Both store features x barcodes by column, which is cells x features by row, so cells are read as from a CSR matrix.
Format: Cell Ranger, "Feature-Barcode Matrices in HDF5".
"""

from typing import Any

import numpy as np
import polars as pl

from feature_store.cells.annotations import ObsColumn
from feature_store.cells.files.cell_file import Content, OneMatrixFile, named_or_only, reading
from feature_store.cells.matrices import SparseRows
from feature_store.storage.addresses import DataPath

VERSION_3 = "matrix"
_OF_A_MATRIX = {"barcodes", "data", "indices", "indptr", "shape"}
_OF_VERSION_2 = _OF_A_MATRIX | {"genes", "gene_names"}


def matrices_of_tenx(file: Any) -> list[str]:
    """The groups of an HDF5 file that are matrices of 10x; none if it is no file of 10x."""
    found = [name for name in file if hasattr(file[name], "keys")]
    if VERSION_3 in found and {*_OF_A_MATRIX, "features"} <= set(file[VERSION_3]):
        return [VERSION_3]
    return [name for name in found if set(file[name]) >= _OF_VERSION_2]


def open_tenx_h5(
    path: DataPath, file: Any, *, matrix: str | None = None, content: Content | None = None
) -> OneMatrixFile:
    """Open a file of 10x, an opened HDF5 file.

    `matrix` is "matrix" in version 3, and the genome in version 2, which a file of several genomes needs. InputError as
    from `OneMatrixFile`, and for arrays that are missing or do not fit together.
    """
    genomes = matrices_of_tenx(file)
    name = named_or_only(genomes, matrix, path, what="genomes")
    group = file[name]
    with reading(path, f"{name}/shape"):
        n_features, n_cells = (int(n) for n in group["shape"][:])
    rows = SparseRows(
        group["indptr"], group["indices"], group["data"], shape=(n_cells, n_features), where=f"{name} of {path}"
    )
    is_3 = name == VERSION_3 and "features" in group
    with reading(path, "the features"):
        var = _var(group["features"], "id", "name") if is_3 else _var(group, "genes", "gene_names")
    barcodes = group["barcodes"]
    return OneMatrixFile(
        path,
        format="10x .h5, Cell Ranger 3 or later" if is_3 else "10x .h5, Cell Ranger 2",
        name=name,
        rows=rows,
        var=var,
        index=ObsColumn(n_cells=barcodes.shape[0], read=lambda start, stop: _texts("cell_id", barcodes[start:stop])),
        ignored=[f"the genomes {', '.join(one for one in genomes if one != name)}"] if len(genomes) > 1 else [],
        reason="the only matrix of the file" if matrix is None else "named with --matrix",
        content=content,
        close=file.close,
    )


def _var(group: Any, ids: str, names: str) -> Any:
    """The features as the var frame of an AnnData: names with ids and, in version 3, types."""
    import pandas as pd

    columns = {"gene_ids": _texts("", group[ids][:]).to_list()}
    if "feature_type" in group:
        columns["feature_types"] = _texts("", group["feature_type"][:]).to_list()
    return pd.DataFrame(columns, index=_texts("", group[names][:]).to_list())


def _texts(name: str, values: Any) -> pl.Series:
    """Bytes of HDF5, of one length or of several, as text."""
    found = [one.decode() if isinstance(one, bytes) else str(one) for one in np.asarray(values).tolist()]
    return pl.Series(name, found, dtype=pl.String)
