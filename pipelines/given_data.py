"""The cells that a notebook gives: paths and addresses, or an AnnData, which is written into the store as a file.

Every stage reads its cells from files, in several processes and again later. So what an AnnData holds of them is
written once to `data/cells-<sha256>.h5ad` in the store, under the hash of the file's bytes: X, the layers and raw, or
only the matrix that was named, with obs, var, obsm and the mark of CELLxGENE in uns. The same content is the same file,
whether it comes from an object, a view of one, or a backed one, and therefore the same runs. The rest of the object
(uns, obsp, varm, varp) changes nothing. Measured (50,000 cells of 200 values): .2 CPU seconds, 82 MB.
"""

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from feature_store.cells import Source, open_source, recorded_digests
from feature_store.errors import InputError
from feature_store.query.suggestions import did_you_mean, join_names
from feature_store.storage import filesystem
from feature_store.storage.addresses import DataPath, data_path
from feature_store.storage.layout import TEMPORARY, Layout
from pipelines.errors import UsageError
from pipelines.runtime.progress import delayed_progress_bar, stderr_console

SCRATCH = ".scratch"
SAID_BYTES = 200_000_000
"""Size of a written file from which a line says that it was written."""
_MARK = ("schema_version", "schema_reference")
"""What the mark of CELLxGENE consists of in uns."""


def open_given(data: Any, layout: Layout, *, matrix: str | None, where: str | None) -> Source:
    """Open the cells of one path or address, of several, or of an AnnData.

    Raises:
        InputError: it is none of these, or cannot be opened.
    """
    return open_source(
        files_of(data, data_folder(layout), matrix=matrix),
        matrix=matrix,
        where=where,
        progress=delayed_progress_bar,
        known_digest=recorded_digests(layout),
    )


def data_folder(layout: Layout) -> Path:
    """Return the folder of a store with the cells of AnnData objects."""
    return layout.local_root / "data"


def is_anndata(value: Any) -> bool:
    """Return whether a value is an AnnData; where anndata was never imported, nothing is one."""
    loaded = sys.modules.get("anndata")
    return loaded is not None and isinstance(value, loaded.AnnData)


def files_of(data: Any, folder: Path, *, matrix: str | None = None) -> list[DataPath]:
    """Return the files of paths, addresses and AnnData objects, one or several; objects are written into the folder.

    Raises:
        InputError: a value is none of these, or an AnnData holds what .h5ad does not.
        UsageError: an AnnData has no matrix of the name.
    """
    several = list(data) if isinstance(data, Sequence) and not isinstance(data, str) else [data]
    names = (matrix or "").split(",") if matrix and len(several) > 1 else [matrix]
    names = names * len(several) if len(names) == 1 else names
    found: list[DataPath] = []
    for place, one in enumerate(several):
        if is_anndata(one):
            found.append(_written(one, folder, matrix=names[place] if place < len(names) else None))
        elif isinstance(one, DataPath | str):
            found.append(data_path(one))
        else:
            raise InputError(f"the cells were {type(one).__name__}; give the path of an .h5ad file, or an AnnData")
    if not found:
        raise InputError("the cells were an empty list; give the path of an .h5ad file, or an AnnData")
    return found


def _written(adata: Any, folder: Path, *, matrix: str | None) -> Path:
    """Write an AnnData under the hash of its bytes: the same one is written once."""
    import anndata

    cells = _cells_of(adata, matrix)
    with filesystem.clear_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _scratch_folder(folder) as scratch:
            made = scratch / "cells.h5ad"
            try:
                # careful: the default turns the text columns of the caller's AnnData into categories
                with anndata.settings.override(allow_write_nullable_strings=True):
                    cells.write_h5ad(made, convert_strings_to_categoricals=False)
            except (TypeError, ValueError, KeyError, RuntimeError) as error:
                raise InputError(
                    f"the AnnData holds what .h5ad does not ({error}); give each column of obs and var values of one "
                    "type, or write a file with adata.write_h5ad and give its path"
                ) from error
            path = folder / f"cells-{filesystem.sha256(made)[:12]}.h5ad"
            if not path.exists():
                filesystem.fsync(made)
                made.rename(path)
                if (size := path.stat().st_size) >= SAID_BYTES:
                    stderr_console().print(f"the AnnData was written to {path} ({size / 1e9:.1f} GB)", soft_wrap=True)
    return path


def _cells_of(adata: Any, matrix: str | None) -> Any:
    """Return an AnnData of what the stages read of another, whose arrays it shares."""
    import anndata

    names = ["X"] if adata.X is not None else []
    names += [*(f"layers/{name}" for name in adata.layers), *(["raw"] if adata.raw is not None else [])]
    if matrix is not None and matrix not in names:
        raise UsageError(
            f"matrix was {matrix!r}, which the AnnData does not have{did_you_mean(matrix, names)}; it has "
            f"{join_names(names) or 'none'}"
        )
    wanted = set(names if matrix is None else [matrix])
    raw = {"X": adata.raw.X, "var": adata.raw.var} if "raw" in wanted else None
    with warnings.catch_warnings():
        # names that repeat are allowed here, and the caller has seen the warning
        warnings.simplefilter("ignore", UserWarning)
        return anndata.AnnData(
            X=adata.X if "X" in wanted else None,
            obs=adata.obs,
            var=adata.var,
            obsm=dict(adata.obsm),
            layers={name: adata.layers[name] for name in adata.layers if f"layers/{name}" in wanted},
            raw=raw,
            uns={name: adata.uns[name] for name in _MARK if name in adata.uns},
        )


@contextmanager
def _scratch_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, which belongs to a locked file; those that killed processes left are removed.

    The .h5ad cannot be the locked file itself: HDF5 locks what it writes.
    """
    with filesystem.temporary_file(folder, "cells") as owner:
        filesystem.remove_abandoned(folder)
        for left in folder.glob(f"{TEMPORARY}*{SCRATCH}"):
            if not left.with_name(left.name.removesuffix(SCRATCH)).exists():
                filesystem.remove_folder(left)
        scratch = owner.with_name(owner.name + SCRATCH)
        scratch.mkdir()
        try:
            yield scratch
        finally:
            filesystem.remove_folder(scratch)
