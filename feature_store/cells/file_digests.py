"""The content of data files: its sha256, and the state of a file, by which it is known not to have changed.

Hashing reads every byte (about 1.5 GB/s), so the digest of a file is recorded with the state that the file had: its
size, its inode, and the times of the last change of its content and of its inode. A file that still has this state has
the recorded digest, and is not read. A change that leaves all four is not noticed; it takes a file system that does not
keep these times, as some network file systems, or a clock that was set back. `scsae verify` hashes whatever the state.

What is at an address is not hashed, which would fetch all of it: its digest is that of its version
(`remote_objects.RemoteContent`), which is asked for each time it is opened.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from feature_store.cells.files.cell_file import Content
from feature_store.storage import remote_objects
from feature_store.storage.addresses import DataPath

HASH_BLOCK_BYTES = 1 << 22


class FileState(NamedTuple):
    """The state of a file; of a folder, or of several files, the sums over the files; of what is at an address, the
    size alone.
    """

    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int


class KnownDigest(Protocol):
    """Returns the recorded digest of a file in a state, None if there is none."""

    def __call__(self, path: DataPath, state: FileState, /) -> str | None:
        """Return the sha256 of `path`, or None."""


def no_known_digest(_path: DataPath, _state: FileState) -> None:
    """The `KnownDigest` that knows none."""
    return


def file_state(content: Content) -> FileState:
    """The state of a file, of a folder, by one pass over its entries, or of several files together."""
    if isinstance(content, remote_objects.RemoteContent):
        return FileState(content.size_bytes, 0, 0, 0)
    if isinstance(content, tuple):
        found = [path.stat() for path in content]
    else:
        found = [content.stat()] if content.is_file() else list(_stats_below(content))
    return FileState(
        size_bytes=sum(one.st_size for one in found),
        mtime_ns=sum(one.st_mtime_ns for one in found),
        ctime_ns=sum(one.st_ctime_ns for one in found),
        inode=sum(one.st_ino for one in found),
    )


def file_digest(content: Content, on_bytes: Callable[[int], None]) -> str:
    """Sha256 of a file, of the names and hashes of a folder's files, or of the hashes of several files in their order;
    `on_bytes` gets the size of each block.
    """
    if isinstance(content, remote_objects.RemoteContent):
        return content.digest
    if isinstance(content, tuple):
        parts = [(str(place), path) for place, path in enumerate(content)]
    elif content.is_file():
        return _sha256(content, on_bytes)
    else:
        inside = sorted(file for file in content.rglob("*") if file.is_file())
        parts = [(path.relative_to(content).as_posix(), path) for path in inside]
    total = hashlib.sha256()
    for name, path in parts:
        total.update(f"{name}:{_sha256(path, on_bytes)}\n".encode())
    return total.hexdigest()


def _stats_below(folder: Path) -> Iterator[os.stat_result]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _stats_below(Path(entry.path))
            elif entry.is_file():
                yield entry.stat()


def _sha256(path: Path, on_bytes: Callable[[int], None]) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            total.update(block)
            on_bytes(len(block))
    return total.hexdigest()
