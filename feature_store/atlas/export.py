"""The atlas as static files: every resource, in bundles, with the page and its scripts, for any web host.

>>> export(store, "atlas")     # python -m http.server -d atlas

A browser reads scripts and data over HTTP only, so the folder has to be served, if only by Python's own server. Bundles
are made by one process a core, each of which opens the same runs of the store.
"""

import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from feature_store.atlas import bundles
from feature_store.atlas.page import STATIC, index_html
from feature_store.atlas.resources import Resources
from feature_store.errors import InputError, StoreWriteError
from feature_store.query.store import FeatureStore

MARK = "scsae-atlas.txt"
"""The file that marks a folder as an export, which a later export may replace."""
_MARK_TEXT = "An exported atlas of scsae; serve this folder over HTTP, e.g. `python -m http.server`.\n"
LEAST_FOR_PROCESSES = 40
"""Bundles from which more processes than this one make them; starting one takes two seconds."""
_opened: dict[str, Resources] = {}
"""The resources of this process, if it makes bundles for another one."""


def check_folder(folder: Path) -> None:
    """InputError if a folder holds anything but an earlier export."""
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / MARK).is_file())):
        raise InputError(f"{folder} holds files that are not an exported atlas; name a new or an empty folder")


def export(store: FeatureStore, folder: str | Path, *, progress: Callable[[int, int], None] | None = None) -> int:
    """Write the atlas of a store to a folder, and return the number of bytes of its data.

    `progress(n_done, n_all)` is called after every bundle. The folder is absent, empty or an earlier export, which is
    replaced.

    Raises:
        InputError: the folder holds something else.
        StoreWriteError: the folder cannot be written.
    """
    folder = Path(folder)
    check_folder(folder)
    resources = Resources(store)
    planned = list(bundles.planned(list(resources.kinds())))
    try:
        if folder.exists():
            shutil.rmtree(folder)
        (folder / "data").mkdir(parents=True)
        (folder / MARK).write_text(_MARK_TEXT)
        (folder / "index.html").write_bytes(index_html(store, bundled=True))
        shutil.copytree(STATIC, folder / "static", ignore=shutil.ignore_patterns("__pycache__"))
        written = (folder / "data" / bundles.INDEX).write_bytes(bundles.index(planned))
        for n_done, (name, bundle) in enumerate(_bundles(resources, planned), start=1):
            written += (folder / "data" / name).write_bytes(bundle)
            if progress is not None:
                progress(n_done, len(planned))
    except OSError as error:
        raise StoreWriteError(
            f"cannot write {folder}: {error.strerror or error}; free some space, or name another folder"
        ) from error
    return written


def _bundles(resources: Resources, planned: Sequence[tuple[str, Sequence[str]]]) -> Iterator[tuple[str, bytes]]:
    """Each bundle with its name; in several processes where there are many of them."""
    n_processes = min(os.cpu_count() or 1, len(planned) // LEAST_FOR_PROCESSES)
    if n_processes < 2:
        for name, paths in planned:
            yield name, _bundle(resources, paths)
        return
    store = resources.data.store
    with ProcessPoolExecutor(
        n_processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_open,
        initargs=(store.layout, store.lineage),
    ) as pool:
        made = pool.map(_bundle_here, [paths for _, paths in planned], chunksize=4)
        for (name, _), bundle in zip(planned, made, strict=True):
            yield name, bundle


def _bundle(resources: Resources, paths: Sequence[str]) -> bytes:
    found = []
    for path in paths:
        resource = resources.get(path)
        if resource is None:
            raise InputError(f"the atlas lists {path} but cannot make it; `scsae verify` finds damaged files")
        found.append((path, resource.body))
    return bundles.packed(found)


def _open(*of: Any) -> None:
    """Open the runs of another process's store, which a store that is opened anew might no longer read."""
    _opened["here"] = Resources(FeatureStore(*of))


def _bundle_here(paths: Sequence[str]) -> bytes:
    return _bundle(_opened["here"], paths)
