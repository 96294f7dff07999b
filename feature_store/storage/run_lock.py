"""The run lock: a run has one driver, and a second one stops at once with an error that names the first.

Two drivers on one run do no harm (whichever commits a shard second discards its work) but do all work twice. In a
folder the driver holds a lock (flock) on `driver.json`, which ends with its process; without flock no driver is
refused. On object storage `driver.json` is a lease: it is created by a conditional put, renewed every 20 s, and taken
over, by a put conditional on its version, after 60 s without renewal by the store's own clock. A driver that was
suspended for longer and lost its lease continues, and so do two drivers that a store without atomic conditions accepts
at one moment; both cases are harmless.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from feature_store.errors import BusyError
from feature_store.storage import filesystem, object_storage
from feature_store.storage.layout import as_path

DRIVER = "driver.json"
RENEW_S = 20.0
LAPSE_S = 60.0


@contextlib.contextmanager
def exclusive(folder: str | Path) -> Iterator[None]:
    """Make this process the only driver of the run in `folder`, which is created if needed, until the block ends.

    BusyError, naming host, process and time, if another process (or another thread of this one) drives it;
    StoreWriteError if the folder cannot be written.
    """
    path = as_path(folder)
    with _locked(path) if filesystem.is_local(path) else _leased(path):
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    made = not folder.exists()
    with filesystem.clear_write_errors(folder):
        filesystem.make_folder(folder)
        descriptor = _take_lock(folder / DRIVER)
    try:
        yield
    finally:
        (folder / DRIVER).unlink(missing_ok=True)
        os.close(descriptor)
        if made:
            # a folder without content is removed, so that a refused run leaves nothing
            with contextlib.suppress(OSError):
                folder.rmdir()


def _take_lock(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.read(descriptor, 4096)
            os.close(descriptor)
            raise BusyError(_busy(path, who, "it is free once that process ends")) from None
        except OSError:
            # this file system has no flock, so no lock can be held
            pass
        with contextlib.suppress(FileNotFoundError):
            # careful: the previous driver removes the file when it ends, perhaps between this open and this lock
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps(_me()).encode())
                return descriptor
        os.close(descriptor)


@contextlib.contextmanager
def _leased(folder: Path) -> Iterator[None]:
    lease = _Lease(folder / DRIVER)
    with filesystem.clear_write_errors(folder):
        lease.take()
    stopped = threading.Event()
    renewing = threading.Thread(target=lease.renew_until, args=(stopped,), name="lease", daemon=True)
    renewing.start()
    try:
        yield
    finally:
        stopped.set()
        renewing.join()
        lease.leave()


class _Lease:
    """A lease on object storage; the counter `beat` gives every renewal a new version of the object."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.me = {**_me(), "token": uuid.uuid4().hex}
        self.beat = 0

    def take(self) -> None:
        """Create the lease, or take over a lapsed one; BusyError while another driver holds it."""
        while not object_storage.create(self.path, self._text()):
            found = object_storage.head(self.path)
            try:
                holder = filesystem.read_bytes(self.path)
            except FileNotFoundError:
                continue
            if found is None:
                continue
            if self._is_mine(holder):
                # the response of the put was lost and the put was repeated
                return
            if found.age_s < LAPSE_S:
                left = f"if that process was killed, it is free in {LAPSE_S - found.age_s:.0f} s"
                raise BusyError(_busy(self.path, holder, left))
            if object_storage.replace(self.path, self._text(), etag=found.etag):
                return

    def renew_until(self, stopped: threading.Event) -> None:
        """Renew the lease every RENEW_S seconds; stop if another driver has taken it over."""
        while not stopped.wait(RENEW_S):
            with contextlib.suppress(Exception):
                # a store that does not answer now may answer the next time; a lapsed lease does no harm
                found = object_storage.head(self.path)
                if found is None or not self._is_mine(filesystem.read_bytes(self.path)):
                    return
                self.beat += 1
                object_storage.replace(self.path, self._text(), etag=found.etag)

    def leave(self) -> None:
        """Delete the lease if this driver still holds it."""
        with contextlib.suppress(Exception):
            # a lease that cannot be deleted lapses
            if self._is_mine(filesystem.read_bytes(self.path)):
                self.path.unlink()

    def _text(self) -> str:
        return json.dumps({**self.me, "beat": self.beat})

    def _is_mine(self, holder: bytes) -> bool:
        return bool(_read(holder).get("token") == self.me["token"])


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": datetime.now(tz=UTC).isoformat(" ", "seconds")}


def _read(holder: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        content = json.loads(holder)
        if isinstance(content, dict):
            return content
    return {}


def _busy(path: Path, holder: bytes, when: str) -> str:
    found = _read(holder)
    host, pid, since = (found.get(key, "unknown") for key in ("host", "pid", "since"))
    return (
        f"another driver is at work on {path.parent}: host {host}, process {pid}, since {since}; wait for it, or stop "
        f"it (`kill {pid}` on {host}), then run the same command again: what is committed is kept ({when})"
    )
