"""The list of commits of a store: one small file a table, which tells a table that is gone from one that never was.

    <root>/commits/codes~4f2a09c1d3e5~by_cell.json      {table, manifest, created}

`commit.Run.finalize` writes it right after the manifest: the table, the sha256 of the manifest's content and its
creation time. Readers list the names, by one request, and open no file; a manifest that is made again takes its time
from here, so that the order of runs, and with it the defaults, stay. A process that dies between the manifest and this
file leaves a table that is not on the list; it counts as any other, and the next manifest that is made in the store, or
the same command again, puts it on the list. `forget` takes off what is gone.
"""

from datetime import datetime
from pathlib import Path

from feature_store.errors import IntegrityError, NotFoundError
from feature_store.storage import filesystem
from feature_store.storage.hashing import sealed
from feature_store.storage.layout import (
    KINDS,
    MANIFEST,
    Layout,
    RunInfo,
    committed_tables,
    entry_of,
    needed_tables,
)


def put_on_list(table: Path, *, manifest: str, created: datetime) -> None:
    """Write the file of a table unless it is there with this content; a table that is in no store has none."""
    entry = entry_of(table)
    if entry is None:
        return
    content = {"table": entry.stem, "manifest": manifest, "created": created.isoformat(timespec="microseconds")}
    text = sealed(content)
    try:
        if filesystem.read_bytes(entry) == text.encode():
            return
    except FileNotFoundError:
        filesystem.make_folder(entry.parent)
    # careful: no run cleans this folder, which is that of all of them
    filesystem.remove_abandoned(entry.parent)
    filesystem.replace_text(entry, text)


def is_on_list(table: Path) -> bool:
    """Return whether a table was committed, by the list alone."""
    entry = entry_of(table)
    return entry is not None and filesystem.size_bytes(entry) is not None


def listed_creation_time(table: Path) -> datetime | None:
    """Return the creation time that the list has for a table; None if it has none, or a damaged file."""
    entry = entry_of(table)
    try:
        return None if entry is None else datetime.fromisoformat(filesystem.read_sealed(entry)["created"])
    except (FileNotFoundError, IntegrityError, KeyError, TypeError, ValueError):
        return None


def problem_on_list(table: Path, manifest: str) -> str | None:
    """Return what is wrong with the file of a table whose manifest has this sha256; None if it is right."""
    entry = entry_of(table)
    if entry is None:
        return None
    try:
        noted = filesystem.read_sealed(entry).get("manifest")
    except FileNotFoundError:
        return f"{entry}: missing; {filesystem.REPAIR}"
    except IntegrityError as error:
        return str(error)
    return None if noted == manifest else f"{entry}: of another {MANIFEST} than that of {table}; {filesystem.REPAIR}"


def unlisted_tables(layout: Layout) -> list[Path]:
    """Return the tables that make runs complete, have a manifest and are not on the list."""
    listed = committed_tables(layout.root)
    found = []
    for kind in KINDS:
        folder = layout.kind_dir(kind)
        for run in folder.iterdir() if folder.is_dir() else ():
            for name in needed_tables(kind):
                table = run / name if name else run
                if (kind, run.name, *filter(None, name.split("/"))) not in listed and (table / MANIFEST).is_file():
                    found.append(table)
    return found


def forget(layout: Layout, info: RunInfo) -> list[str]:
    """Take those tables of a run off the list whose manifest is gone, and return their names.

    NotFoundError if every table on the list is there: such a run is deleted first, by removing its folder.
    """
    entries = [entry for entry in committed_tables(layout.root) if entry[:2] == (info.kind, info.run)]
    gone = [entry for entry in sorted(entries) if not layout.root.joinpath(*entry, MANIFEST).is_file()]
    if not gone:
        raise NotFoundError(
            f"nothing of {info.kind}/{info.run} is gone; to be rid of it, delete {info.path} first, then type "
            f"`scsae forget {info.kind}/{info.run} {layout.store_option}`"
        )
    with filesystem.clear_write_errors(layout.root):
        for entry in gone:
            path = entry_of(layout.root.joinpath(*entry))
            assert path is not None
            path.unlink()
    return ["/".join(entry) for entry in gone]
