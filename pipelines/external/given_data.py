"""The cells that a writer is given: files, or an AnnData, which is written into the store if it is in memory alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from feature_store.cells import Source, open_source
from feature_store.errors import InputError
from feature_store.storage import filesystem
from feature_store.storage.addresses import DataPath, data_path
from feature_store.storage.layout import TEMPORARY, Layout
from pipelines.inputs import recorded_digests
from pipelines.runtime.progress import delayed_progress_bar

DATA = "data"
"""Folder of the store with the cells that were in memory alone."""
SCRATCH = ".scratch"


def open_given(data: Any, layout: Layout, *, matrix: str | None, where: str | None) -> Source:
    """Open the cells of one path or address, of several, or of an AnnData.

    Raises:
        InputError: it is none of these, or cannot be opened.
    """
    return open_source(
        _files_of(data, layout),
        matrix=matrix,
        where=where,
        progress=delayed_progress_bar,
        known_digest=recorded_digests(layout),
    )


def _files_of(data: Any, layout: Layout) -> list[DataPath]:
    if isinstance(data, str | Path):
        return [data_path(data)]
    if isinstance(data, Sequence) and data and all(isinstance(one, str | Path) for one in data):
        return [data_path(one) for one in data]
    if not hasattr(data, "write_h5ad"):
        raise InputError(f"the cells were {type(data).__name__}; give the path of an .h5ad file, or an AnnData")
    if data.isbacked:
        return [Path(data.filename)]
    return [_written(data, layout.local_root / DATA)]


def _written(adata: Any, folder: Path) -> Path:
    """Write an AnnData under the hash of its bytes: the same one is written once."""
    with filesystem.clear_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _scratch_folder(folder) as scratch:
            made = scratch / "cells.h5ad"
            # careful: the default turns the text columns of the caller's AnnData into categories
            adata.write_h5ad(made, convert_strings_to_categoricals=False)
            path = folder / f"cells-{filesystem.sha256(made)[:12]}.h5ad"
            if not path.exists():
                filesystem.fsync(made)
                made.rename(path)
    return path


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
