"""Cyclic garbage while HDF5 reads an object at an address: nothing waits forever, and nothing is kept."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest

from feature_store.storage import collection
from feature_store.storage.range_file import RangeFile

# the thread that fetches bytes makes garbage until a collection is due, and the garbage has h5py objects in cycles
READ = """
import gc, io, sys
from concurrent.futures import ThreadPoolExecutor
import h5py, numpy as np
from feature_store.storage.range_file import RangeFile

content = io.BytesIO()
with h5py.File(content, "w") as file:
    file.create_dataset("x", data=np.arange(200_000.0), chunks=(5_000,))
raw, pool = content.getvalue(), ThreadPoolExecutor(1)

def fetch(start, stop):
    def busy():
        kept = [[] for _ in range(200_000)]
        return raw[start:stop]
    return pool.submit(busy).result()

opened = OPEN
file = h5py.File(opened, "r")
for _ in range(50):
    cycle = [file["x"]]
    cycle.append(cycle)
del cycle
assert file["x"][:].sum() == np.arange(200_000.0).sum()
file.close()
print("read")
"""
AS_IT_WAS = "type('Plain', (RangeFile,), {})(fetch, len(raw)); gc.enable()"


def run(opened: str, timeout: int) -> str:
    code = READ.replace("OPEN", opened)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout).stdout


def test_reading_waits_for_no_collection_in_the_thread_of_requests():
    assert run("RangeFile(fetch, len(raw))", 240) == "read\n"


@pytest.mark.slow
def test_it_would_wait_forever_with_the_automatic_collection():
    with pytest.raises(subprocess.TimeoutExpired):
        run(AS_IT_WAS, 20)


def test_the_collection_is_held_while_a_file_is_open():
    assert gc.isenabled()
    one, other = (RangeFile(lambda start, stop: bytes(stop - start), 100) for _ in range(2))
    assert not gc.isenabled()
    one.close()
    one.close()
    assert not gc.isenabled()
    del other
    assert gc.isenabled()


def test_what_is_due_is_collected_between_reads(monkeypatch):
    class Thing:
        pass

    def garbage():
        thing = Thing()
        thing.itself = thing
        return weakref.ref(thing)

    monkeypatch.setattr(collection, "_last_full", float("-inf"))
    file = RangeFile(lambda start, stop: bytes(stop - start), 100)
    gone = garbage()
    kept = [[] for _ in range(2000)]
    assert gone() is not None
    collection.collect_if_due()
    assert gone() is None
    file.close()
    assert len(kept) == 2000


def test_a_collection_that_was_off_before_stays_off():
    gc.disable()
    try:
        with RangeFile(lambda start, stop: bytes(stop - start), 100):
            collection.collect_if_due()
        assert not gc.isenabled()
    finally:
        gc.enable()
