"""The atlas as static files: every resource at its path, with the page and its scripts, for any web host.

>>> export(store, "atlas")     # python -m http.server -d atlas

A browser reads scripts and data over HTTP only, so the folder has to be served, if only by Python's own server.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from feature_store.atlas.page import STATIC, index_html
from feature_store.atlas.resources import Resources
from feature_store.errors import InputError, StoreWriteError
from feature_store.query.store import FeatureStore

MARK = "scsae-atlas.txt"
"""The file that marks a folder as an export, which a later export may replace."""
_MARK_TEXT = "An exported atlas of scsae; serve this folder over HTTP, e.g. `python -m http.server`.\n"


def check_folder(folder: Path) -> None:
    """InputError if a folder holds anything but an earlier export."""
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / MARK).is_file())):
        raise InputError(f"{folder} holds files that are not an exported atlas; name a new or an empty folder")


def export(store: FeatureStore, folder: str | Path, *, progress: Callable[[int, int], None] | None = None) -> int:
    """Write the atlas of a store to a folder, and return the number of bytes of its data.

    `progress(n_done, n_all)` is called after every file. The folder is absent, empty or an earlier export, which is
    replaced.

    Raises:
        InputError: the folder holds something else.
        StoreWriteError: the folder cannot be written.
    """
    folder = Path(folder)
    check_folder(folder)
    resources = Resources(store)
    paths = list(resources.paths())
    written = 0
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        (folder / MARK).write_text(_MARK_TEXT)
        (folder / "index.html").write_bytes(index_html(store))
        shutil.copytree(STATIC, folder / "static", ignore=shutil.ignore_patterns("__pycache__"))
        for n_done, path in enumerate(paths, start=1):
            found = resources.get(path)
            if found is None:
                raise InputError(f"the atlas lists {path} but cannot make it; `scsae verify` finds damaged files")
            file = folder / "data" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            written += file.write_bytes(found.body)
            if progress is not None:
                progress(n_done, len(paths))
    except OSError as error:
        raise StoreWriteError(
            f"cannot write {folder}: {error.strerror or error}; free some space, or name another folder"
        ) from error
    return written
