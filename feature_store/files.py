"""The few file operations that commits are made of: temporary files with a lock, atomic replacement, fsync, hashes.

A temporary file is locked (flock) by its writer, so that a process that cleans up can tell the file of a living writer
from one that a killed writer left: the lock vanishes with its process. POSIX only.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from feature_store.errors import IntegrityError, StoreWriteError
from feature_store.layout import TEMPORARY

_UNWRITABLE = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.ENOTDIR,
    errno.EEXIST,
}


def sha256(path: Path) -> str:
    """Sha256 of a file's bytes, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of the store. IntegrityError if it holds anything else."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise IntegrityError(f"{path} is not JSON ({error}); delete its folder and run the command again") from error
    if not isinstance(content, dict):
        raise IntegrityError(f"{path} holds {type(content).__name__} where an object was expected")
    return content


@contextlib.contextmanager
def temporary_file(folder: Path, label: str) -> Iterator[Path]:
    """A locked empty temporary file `.tmp-<label>-<uuid>`, removed on leaving unless it was renamed."""
    while True:
        path = folder / f"{TEMPORARY}{label}-{uuid.uuid4().hex}"
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # careful: another driver's `pending` may have removed the file between its creation and the lock
        if path.exists():
            break
        os.close(descriptor)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def remove_abandoned(folder: Path) -> None:
    """Remove the temporary files of a folder whose writer is gone: those that nobody holds the lock of."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir():
            continue
        try:
            descriptor = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except OSError:
            # a living writer holds the lock, or the file system has none: not ours to remove
            continue
        finally:
            os.close(descriptor)


def fsync(path: Path) -> None:
    """Put a file's bytes, or a folder's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    fsync(path)


def replace_text(path: Path, text: str) -> None:
    """Write a small text file atomically; the file it replaces stays whole until then."""
    with temporary_file(path.parent, path.stem) as temporary:
        _write_text(temporary, text)
        temporary.replace(path)
        fsync(path.parent)


def create_exclusively(path: Path, text: str) -> None:
    """Create `path` whole, or leave the file that another process created first."""
    with temporary_file(path.parent, path.stem) as temporary:
        _write_text(temporary, text)
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(temporary)
        fsync(path.parent)


@contextlib.contextmanager
def clear_write_errors(folder: Path) -> Iterator[None]:
    """Turn the errors of a folder that cannot be written into StoreWriteError; others pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise StoreWriteError(
            f"cannot write in {folder}: {error.strerror or error} ({error.filename or folder}); free the disk or fix "
            "the permissions, or choose another --store, then run the command again: what is committed stays"
        ) from error
