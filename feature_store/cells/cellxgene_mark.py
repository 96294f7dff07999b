"""The mark by which a file says that it follows the schema of CELLxGENE.

`uns["schema_reference"]` holds the address of the schema (single-cell-curation), and `uns["schema_version"]` its
version; older files have the version alone. A file without a version is not guessed at.
"""

import re
from typing import Any, NamedTuple

import numpy as np

_VERSION = re.compile(r"\d+(\.\d+)+")
_REFERENCE = "single-cell-curation"
_FILTERED = "feature_is_filtered"


class CellxgeneMark(NamedTuple):
    """The version of the schema that a file names, and the number of features whose values X lacks by a filter."""

    version: str
    n_filtered: int


def cellxgene_mark(file: Any) -> CellxgeneMark | None:
    """The mark of an opened AnnData (HDF5 or zarr); None if it has none, or one of another schema."""
    version, reference = (_text(file, f"uns/{name}") for name in ("schema_version", "schema_reference"))
    if not _VERSION.fullmatch(version) or (reference and _REFERENCE not in reference):
        return None
    column = f"var/{_FILTERED}"
    n_filtered = int(np.asarray(file[column][()]).sum()) if column in file and hasattr(file[column], "shape") else 0
    return CellxgeneMark(version, n_filtered)


def _text(file: Any, name: str) -> str:
    """The text at a place; "" if there is none, or something else."""
    if name not in file or getattr(file[name], "shape", None) != ():
        return ""
    value = file[name][()]
    value = value.item() if isinstance(value, np.ndarray) else value
    return value.decode() if isinstance(value, bytes) else str(value)
