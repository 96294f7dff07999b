"""The file operations that commits need, in a folder and on object storage: atomic put, exclusive creation, hash.

In a folder they are a temporary file beside its target, fsync, an atomic rename and an exclusive hard link (POSIX
only). The writer locks (flock) its temporary file, and the lock ends with its process, so that a process that cleans up
can distinguish the file of a living writer from that of a killed one. On object storage (`object_storage`) a temporary
file is on the local disk, and a put is atomic by itself. Only this module distinguishes the two kinds of path.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from feature_store.errors import IntegrityError, StoreWriteError
from feature_store.storage import object_storage
from feature_store.storage.hashing import unsealed
from feature_store.storage.layout import TEMPORARY

Item = TypeVar("Item")
Result = TypeVar("Result")
READ_BYTES = 1 << 24
END_BYTES = 1 << 18
"""Bytes at the end of a part that have a hash of their own; the footer of a part of 256 MB takes 15 kB."""
REPAIR = "run its stage again to repair it (`scsae verify RUN` lists all damage)"
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
_n_writes = 0


def note_write() -> None:
    """Count a write of this process, or that another process may now write for it."""
    global _n_writes
    _n_writes += 1


def n_writes() -> int:
    """Return how often this process has put, created or replaced a file of a store."""
    return _n_writes


def is_local(path: Path) -> bool:
    """Return whether a path is in the file system of this machine."""
    return isinstance(path, Path)


def sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes, 64 hex digits."""
    with path.open("rb") if is_local(path) else _open_object(path, block_size=READ_BYTES) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def end_sha256(path: Path) -> str:
    """Return the sha256 of the last END_BYTES of a file, or of all of it where it is smaller."""
    if not is_local(path):
        return hashlib.sha256(object_storage.read_end(path, END_BYTES)).hexdigest()
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - END_BYTES, 0))
        return hashlib.sha256(file.read()).hexdigest()


def size_bytes(path: Path) -> int | None:
    """Return the size of a file in bytes, None if there is none."""
    if not is_local(path):
        found = object_storage.head(path)
        return None if found is None else found.bytes
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the sizes in bytes of all files of a folder, by name; object storage needs one request for 1,000 files."""
    if not is_local(folder):
        return object_storage.sizes(folder)
    sizes = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            # careful: another process may remove its temporary file at this moment
            with contextlib.suppress(FileNotFoundError):
                if entry.is_file():
                    sizes[entry.name] = entry.stat().st_size
    return sizes


def file_state(path: Path) -> tuple[Any, ...] | None:
    """Return what differs after every change of a file (its size and times, or its version), None if there is none."""
    if not is_local(path):
        head = object_storage.head(path)
        return None if head is None else (head.bytes, head.etag)
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def read_many(
    folder: Path, read: Callable[[Item], Result], items: Sequence[Item], *, local_threads: int = 1
) -> list[Result]:
    """Return `read(item)` of each item, where `read` reads a file of `folder`.

    On object storage REQUEST_THREADS of them wait at a time: a request takes 25 ms there, and a marker on a local disk
    50 µs, which threads do not speed up.
    """
    n_threads = min(local_threads if is_local(folder) else object_storage.REQUEST_THREADS, len(items))
    if n_threads < 2:
        return [read(item) for item in items]
    with ThreadPoolExecutor(max_workers=n_threads) as threads:
        return list(threads.map(read, items))


def read_bytes(path: Path) -> bytes:
    """Return the content of a small file; object storage needs one request."""
    return path.read_bytes() if is_local(path) else object_storage.read(path)


def read_sealed(path: Path) -> dict[str, Any]:
    """Return the content of a file that `sealed` made. FileNotFoundError; IntegrityError if a byte changed."""
    try:
        return unsealed(read_bytes(path))
    except ValueError as error:
        raise IntegrityError(f"{path} was damaged: {error}; {REPAIR}") from error


def read_required(path: Path) -> dict[str, Any]:
    """Return the content of a file that `sealed` made. IntegrityError if it is gone or a byte changed."""
    try:
        return read_sealed(path)
    except (FileNotFoundError, NotADirectoryError):
        raise IntegrityError(f"{path} is missing; {REPAIR}") from None


@contextlib.contextmanager
def temporary_file(folder: Path, label: str) -> Iterator[Path]:
    """Yield an empty local file, removed at the end unless it was put; in a local `folder` it is there and locked."""
    if not is_local(folder):
        descriptor, name = tempfile.mkstemp(prefix=f"{TEMPORARY}{label}-")
        path = Path(name)
    else:
        path, descriptor = _locked_file(folder, label)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def flush(temporary: Path, target: Path) -> None:
    """Flush the bytes of a temporary file to the disk if `target` is local."""
    if is_local(target):
        fsync(temporary)


def put(temporary: Path, target: Path) -> None:
    """Move a flushed temporary file to `target` atomically; an existing file is replaced."""
    note_write()
    if not is_local(target):
        object_storage.put(temporary, target)
        return
    temporary.replace(target)
    fsync(target.parent)


def remove_abandoned(folder: Path) -> None:
    """Remove those temporary files of a folder whose writer is gone, that is, which no process has locked."""
    if not is_local(folder):
        return
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
            # a living writer holds the lock, or the file system has no locks, so the file must stay
            continue
        finally:
            os.close(descriptor)


def fsync(path: Path) -> None:
    """Flush a local file's bytes, or a local folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create a folder and its parents; object storage needs no folders."""
    if is_local(path):
        path.mkdir(parents=True, exist_ok=True)


def remove_folder(path: Path) -> None:
    """Remove a folder and its content."""
    if is_local(path):
        shutil.rmtree(path)
    else:
        object_storage.remove(path)


def remove_file(path: Path) -> None:
    """Remove a file if it is there."""
    if is_local(path):
        path.unlink(missing_ok=True)
    else:
        object_storage.remove_object(path)


def replace_text(path: Path, text: str) -> None:
    """Write a small text file atomically; the file it replaces stays whole until then."""
    note_write()
    if not is_local(path):
        object_storage.put_text(path, text)
        return
    with temporary_file(path.parent, path.stem) as temporary:
        temporary.write_text(text, encoding="utf-8")
        fsync(temporary)
        put(temporary, path)


def create_exclusively(path: Path, text: str) -> None:
    """Create `path` atomically, or keep the file that another process created first."""
    note_write()
    if not is_local(path):
        object_storage.create(path, text)
        return
    with temporary_file(path.parent, path.stem) as temporary:
        temporary.write_text(text, encoding="utf-8")
        fsync(temporary)
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(temporary)
        fsync(path.parent)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file against other processes; without support for locks nothing is held."""
    if not is_local(path):
        yield
        return
    descriptor = os.open(path, os.O_RDWR)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def parquet_source(path: Path) -> Iterator[Any]:
    """Yield a source of a Parquet file for pyarrow; on object storage it requests only the ranges that are read."""
    if is_local(path):
        yield path
        return
    with _open_object(path, cache_type="none") as file:
        yield file


def scan_source(path: Path) -> str:
    """Return the source of a Parquet file for Polars, which reads object storage itself."""
    return str(path)


@contextlib.contextmanager
def local_folder(path: Path) -> Iterator[Path]:
    """Yield a local folder with the files of `path`, for readers of local files: itself, or a temporary copy."""
    if is_local(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as copy:
        object_storage.download(path, Path(copy))
        yield Path(copy)


@contextlib.contextmanager
def written_folder(path: Path, *, last: str) -> Iterator[Path]:
    """Yield a local folder for the files of `path`: itself, or one whose files are put at the end, `last` last."""
    if is_local(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as made:
        yield Path(made)
        for file in sorted(Path(made).iterdir(), key=lambda file: (file.name == last, file.name)):
            object_storage.put(file, path / file.name)


@contextlib.contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """Yield an empty local folder, removed at the end; it is inside the folder `beside` if that is local."""
    with tempfile.TemporaryDirectory(dir=beside if is_local(beside) else None, prefix=TEMPORARY) as made:
        yield Path(made)


@contextlib.contextmanager
def clear_write_errors(folder: Path) -> Iterator[None]:
    """Convert the errors of a folder that cannot be written into StoreWriteError; other errors pass."""
    try:
        yield
    except OSError as error:
        # an object store that denies access gives no errno
        if error.errno not in _UNWRITABLE and not isinstance(error, PermissionError):
            raise
        raise StoreWriteError(
            f"cannot write in {folder}: {error.strerror or error} ({error.filename or folder}); free the disk or fix "
            "the permissions, or choose another --store, then run the command again: what is committed stays"
        ) from error


def check_writable(folder: Path) -> None:
    """Raise StoreWriteError if a file cannot be made in a local folder, or the folder cannot be made; nothing is left.

    Object storage is not checked, because that would take a put and a deletion.
    """
    if not is_local(folder):
        return
    with clear_write_errors(folder):
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(existing))
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"x")


def _locked_file(folder: Path, label: str) -> tuple[Path, int]:
    while True:
        path = folder / f"{TEMPORARY}{label}-{uuid.uuid4().hex}"
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # careful: another driver's `pending` may have removed the file between its creation and the lock
        if path.exists():
            return path, descriptor
        os.close(descriptor)


def _open_object(path: Any, **options: Any) -> Any:
    return path.open("rb", **options)
