"""The mark by which a file says that it follows the schema of CELLxGENE.

`uns["schema_reference"]` holds the address of the schema (single-cell-curation), and `uns["schema_version"]` its
version; older files have the version alone. A file without a version is not guessed at, but for an experiment of the
Census, which has no uns: its columns of ontology terms and of the data set of each cell are the mark.
"""

import re
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

_VERSION = re.compile(r"\d+(\.\d+)+")
_REFERENCE = "single-cell-curation"
_FILTERED = "feature_is_filtered"
_TERMS = tuple(f"{name}_ontology_term_id" for name in ("assay", "cell_type", "disease", "tissue"))
CENSUS_OBS = frozenset(
    ("dataset_id", "is_primary_data", "donor_id", "assay", "cell_type", "disease", "tissue", *_TERMS)
)
CENSUS_VAR = frozenset(("feature_id", "feature_name"))
CENSUS = "that of the Census, by its columns"


class CellxgeneMark(NamedTuple):
    """The version of the schema that a file names, or how it was recognised, and the number of features whose values X
    lacks by a filter.
    """

    version: str
    n_filtered: int


def cellxgene_mark(file: Any) -> CellxgeneMark | None:
    """The mark of an opened AnnData (HDF5 or zarr); None if it has none, or one of another schema."""
    version, reference = (_text(file, f"uns/{name}") for name in ("schema_version", "schema_reference"))
    if mark_of(version, reference) is None:
        return None
    column = f"var/{_FILTERED}"
    n_filtered = int(np.asarray(file[column][()]).sum()) if column in file and hasattr(file[column], "shape") else 0
    return mark_of(version, reference, n_filtered)


def mark_of(version: str, reference: str, n_filtered: int = 0) -> CellxgeneMark | None:
    """The mark that a version and an address make; None for no version, and for the address of another schema."""
    if not _VERSION.fullmatch(version) or (reference and _REFERENCE not in reference):
        return None
    return CellxgeneMark(version, n_filtered)


def census_mark(obs: Collection[str], var: Collection[str]) -> CellxgeneMark | None:
    """The mark of an experiment of the Census by the names of its columns; None if it lacks one."""
    is_census = set(obs) >= CENSUS_OBS and set(var) >= CENSUS_VAR
    return CellxgeneMark(CENSUS, 0) if is_census else None


def _text(file: Any, name: str) -> str:
    """The text at a place; "" if there is none, or something else."""
    if name not in file or getattr(file[name], "shape", None) != ():
        return ""
    value = file[name][()]
    value = value.item() if isinstance(value, np.ndarray) else value
    return value.decode() if isinstance(value, bytes) else str(value)
