"""One driver per run: the second one leaves at once, and says who is at work.

Two drivers on one run do no harm (whoever commits a shard second throws its work away) but do all work twice. In a
folder the driver holds a lock (flock) on `driver.json`, which vanishes with its process; where there is no flock nobody
is sent away. On object storage `driver.json` is a lease: made by a conditional put, renewed every 20 s, and taken over,
by a put conditional on its version, once it was not renewed for 60 s by the store's own clock. A driver that slept for
longer and lost its lease goes on, and so do two that a store without atomic conditions let in at one moment: that is
again the harmless case.
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
    """Be the one driver of the run in `folder` until the block ends; the folder is made if it is not there.

    BusyError, naming host, process and time, where another process (or another thread of this one) drives it;
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
            # a run that was refused leaves nothing
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
            # no flock on this file system: nothing can be held
            pass
        with contextlib.suppress(FileNotFoundError):
            # careful: the one before removes the file as it leaves, perhaps between our open and our lock
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
    """A lease on object storage; `beat` makes every renewal another version of the object."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.me = {**_me(), "token": uuid.uuid4().hex}
        self.beat = 0

    def take(self) -> None:
        """Make the lease, or take over one that lapsed; BusyError while another holds it."""
        while not object_storage.create(self.path, self._text()):
            found = object_storage.head(self.path)
            try:
                holder = filesystem.read_bytes(self.path)
            except FileNotFoundError:
                continue
            if found is None:
                continue
            if self._is_mine(holder):
                # the put was repeated because its answer was lost
                return
            if found.age_s < LAPSE_S:
                left = f"if that process was killed, it is free in {LAPSE_S - found.age_s:.0f} s"
                raise BusyError(_busy(self.path, holder, left))
            if object_storage.replace(self.path, self._text(), etag=found.etag):
                return

    def renew_until(self, stopped: threading.Event) -> None:
        """Renew every RENEW_S; end where another took the lease over."""
        while not stopped.wait(RENEW_S):
            with contextlib.suppress(Exception):
                # a store that does not answer now may do so the next time; a lapsed lease does no harm
                found = object_storage.head(self.path)
                if found is None or not self._is_mine(filesystem.read_bytes(self.path)):
                    return
                self.beat += 1
                object_storage.replace(self.path, self._text(), etag=found.etag)

    def leave(self) -> None:
        """Give the lease back, if it still is this one's."""
        with contextlib.suppress(Exception):
            # it lapses anyway
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
