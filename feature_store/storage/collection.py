"""Cyclic garbage while HDF5 reads an object at an address: it is collected by the reading thread alone.

h5py holds a global lock while HDF5 reads, and takes it to free one of its objects. The bytes of an object at an address
come from a thread of fsspec. If Python's cyclic collection starts in that thread and meets an h5py object, the thread
waits for the lock, and the reading thread, which has it, for the bytes: both wait forever (h5py's documentation of
file-like objects names it). So the automatic collection is off from before the first request of such a file until it is
closed, and `collect_if_due` does its work between reads. Objects without cycles are freed as always.
"""

import gc
import threading
import time

FULL_EVERY_S = 60.0
"""Least time between two collections of all generations, which take as long as the process has objects."""

_lock = threading.RLock()  # a finalizer may release while its own thread holds
_holders = 0
_was_enabled = False
_last_full = 0.0


def hold_collection() -> None:
    """Turn the automatic collection off until `release_collection` was called as often as this."""
    global _holders, _was_enabled
    with _lock:
        if not _holders:
            _was_enabled = gc.isenabled()
            gc.disable()
        _holders += 1


def release_collection() -> None:
    """Undo one `hold_collection`; the last one turns the automatic collection on again if it was on before."""
    global _holders
    with _lock:
        _holders -= 1
        if not _holders and _was_enabled:
            gc.enable()


def collect_if_due() -> None:
    """Collect what the automatic collection would have while it is held; not to be called while HDF5 reads."""
    global _last_full
    if not _holders or not _was_enabled:
        return
    counts, thresholds = gc.get_count(), gc.get_threshold()
    due = [i for i, (n, most) in enumerate(zip(counts, thresholds, strict=True)) if 0 < most < n]
    if due and due[-1] == 2 and time.monotonic() - _last_full < FULL_EVERY_S:
        due[-1] = 1
    if due:
        gc.collect(due[-1])
        if due[-1] == 2:
            _last_full = time.monotonic()
