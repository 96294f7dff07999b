"""Runs that are deleted on purpose: their folder is removed, and the store forgets that they were committed."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from feature_store.query.runs import resolve_any_run
from feature_store.storage import commits
from feature_store.storage.layout import MANIFEST, Layout, committed_tables, entry_of

if TYPE_CHECKING:
    from pathlib import Path


def delete_run(folder: Path) -> None:
    """Delete the folder of a run (KIND/ID of some store), then forget it, as `scsae forget` does."""
    shutil.rmtree(folder)
    layout = Layout(folder.parent.parent)
    commits.forget(layout, resolve_any_run(layout, f"{folder.parent.name}/{folder.name}"))


def forget_deleted(root: Path) -> None:
    """Forget every table of a store that is gone."""
    for entry in committed_tables(root):
        if not root.joinpath(*entry, MANIFEST).is_file():
            path = entry_of(root.joinpath(*entry))
            assert path is not None
            path.unlink()
