"""A data set with a panel: a kill or a full disk in a table costs only what was not committed."""

import re
import signal
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from stored_bytes import hashes_of

from feature_store.errors import StoreWriteError
from pipelines.associate import associate
from pipelines.config import AssociateOptions, EncodeOptions, ExtractOptions, TrainOptions
from pipelines.encode import encode
from pipelines.errors import exit_code
from pipelines.extract import extract
from pipelines.train import train

KEEP = 5
STAGES = """
import os, signal, sys, time
from pathlib import Path
import feature_store.codes.codes_run
import pipelines.associate, pipelines.encode
from pipelines.config import AssociateOptions, EncodeOptions

def in_process(worker, work, shards, *args, **options):
    body, total = worker(work), {}
    for shard in shards:
        for name, count in body.shard(shard).items():
            total[name] = total.get(name, 0) + count
    return total

feature_store.codes.codes_run.MERGE_ROWS = 1000
pipelines.encode.OTHER_CELLS = 16
pipelines.encode.do_shards = pipelines.associate.do_shards = in_process
store, words, how = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def dies(event, args):
    if event in ("os.rename", "os.link") and words and str(args[1]).endswith(words):
        if how == "half":
            os.truncate(args[0], os.path.getsize(args[0]) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(dies)
pipelines.encode.encode(EncodeOptions(keep=5), store)
pipelines.associate.associate(AssociateOptions(range_size="1KB"), store)
"""
"""Encode and associate a store, and die when a file gets its name: before, or with half of it written."""
POINTS = {
    "compact/part-00001.parquet": "half",
    "merged/feature_cell/part-00003.parquet": "half",
    "expression/part-00000.parquet": "half",
}


@pytest.fixture(scope="module")
def trained(tiny_data, tiny_model, tmp_path_factory, module_without_actors):
    """A store with a panel of 40 of 72 cells and an SAE; read it, do not write to it."""
    store = tmp_path_factory.mktemp("trained") / "store"
    options = ExtractOptions(
        data=tiny_data,
        model=str(tiny_model),
        layer=("1",),
        donor="donor",
        cell_type="type",
        panel=40,
        shard_cells=16,
        dtype="f32",
    )
    extract(options, store)
    train(TrainOptions(n_features=48, k=4, n_steps=30, batch_size=64, num_workers=0), store)
    return store


@pytest.fixture
def own(trained, tmp_path):
    """A copy of the store, to write to."""
    return copied(trained, tmp_path / "own")


def copied(store, to):
    subprocess.run(["cp", "-r", str(store), str(to)], check=True)
    return to


@pytest.fixture
def small_ranges(monkeypatch):
    """Shards of 16 cells outside the panel; statistics are merged in 16 ranges of features."""
    monkeypatch.setattr("pipelines.encode.OTHER_CELLS", 16)
    monkeypatch.setattr("feature_store.codes.codes_run.MERGE_ROWS", 1000)


def both(store):
    encode(EncodeOptions(keep=KEEP), store)
    associate(AssociateOptions(range_size="1KB"), store)


@pytest.fixture(scope="module")
def calm(trained, tmp_path_factory, module_without_actors):
    """The store of stages that nothing disturbed."""
    store = copied(trained, tmp_path_factory.mktemp("calm") / "store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.encode.OTHER_CELLS", 16)
        patch.setattr("feature_store.codes.codes_run.MERGE_ROWS", 1000)
        both(store)
    return store


def results(store):
    """The bytes of what the stages write."""
    kinds = {kind: store / kind for kind in ("cells", "codes", "associations")}
    return {f"{kind}/{name}": sha for kind, path in kinds.items() for name, sha in hashes_of(path).items()}


def committed(store):
    """Every part with a marker, and when it was written."""
    return {
        path: path.stat().st_mtime_ns
        for kind in ("codes", "associations", "cells")
        for path in (store / kind).rglob("part-*.parquet")
        if path.with_suffix(".json").exists()
    }


def run_to(store, words="", how=""):
    return subprocess.run(
        [sys.executable, "-c", STAGES, str(store), words, how], check=False, capture_output=True, text=True
    )


@pytest.mark.slow
def test_stages_that_are_killed_while_they_write_a_table_resume_to_the_same_bytes(own, calm):
    seen = {}
    for words, how in POINTS.items():
        killed = run_to(own, words, how)
        assert killed.returncode == -signal.SIGKILL, f"{words}: {killed.stderr[-2000:]}"
        assert list(own.rglob(".tmp-*")), f"the kill at {words} left nothing half written: the test shows nothing"
        now = committed(own)
        assert {path: now.get(path) for path in seen} == seen, "written again"
        assert len(now) > len(seen)
        seen = now
    done = run_to(own)
    assert done.returncode == 0, done.stderr[-2000:]
    assert results(own) == results(calm)
    assert not list(own.rglob(".tmp-*"))
    assert {path: when for path, when in committed(own).items() if path in seen} == seen, "written again"


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "by_cell/.tmp-00001",
        "by_feature/.tmp-00001",
        "compact/.tmp-00001",
        "stats/feature_gene/.tmp-00001",
        "stats/cell/.tmp-00005",
        "merged/feature_token/.tmp-00003",
        "expression/.tmp-00000",
        "associations/[^/]+/measured/[^/]+/.tmp-00001",
        "associations/[^/]+/feature_gene/.tmp-00001",
        "associations/[^/]+/features/.tmp-00000",
    ],
)
def test_a_disk_that_fills_up_in_a_table_ends_the_stage_with_one_error_and_it_resumes(
    own, calm, small_ranges, module_without_actors, words
):
    class OnFullDisk(pq.ParquetWriter):
        def __init__(self, where, *args, **options):
            # what is written there fails as on a full disk
            super().__init__("/dev/full" if re.search(words, str(where)) else where, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pq, "ParquetWriter", OnFullDisk)
        with pytest.raises(StoreWriteError, match="No space left") as full:
            both(own)
    assert exit_code(full.value, has_written=True) == 1
    assert re.search(words.split("/.tmp")[0], str(full.value))
    assert not list(own.rglob(".tmp-*"))
    seen = committed(own)
    both(own)
    assert {path: when for path, when in committed(own).items() if path in seen} == seen, "written again"
    assert results(own) == results(calm)
