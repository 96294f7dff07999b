"""Exactly once: an extraction whose processes are killed again and again ends in the bytes of an undisturbed one.

Killed are processes of the run under test only: they carry an environment variable of their own.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
from stored_bytes import hashes_of

from feature_store.storage import commit
from feature_store.storage.layout import Layout

pytestmark = pytest.mark.slow

KINDS = {"actor": "ray::ShardActor", "raylet": "raylet/raylet", "head": "gcs_server", "driver": "pipelines.cli"}
LOST_WORDS = (
    "the Ray session was lost: .* what is committed stays, run the same command again to resume",
    "Ray did not start on this machine .* run the same command again",
    "Failed to connect to GCS within 60 seconds",  # Ray's own, where its head is gone before the first actor is there
)
LOST = (1, "|".join(LOST_WORDS))
ENDS = {
    "raylet": LOST,
    "head": LOST,
    "driver": (-signal.SIGKILL, None),
    "interrupt": (1, "interrupted; the same command resumes"),
    "terminate": (1, "interrupted; the same command resumes"),
}
"""Exit code and last words of a run by what was done to it; the death of an actor does not end it."""
GRACE_S = 100
MARK = "SCSAE_TEST_RUN"


class Extraction:
    """`scsae extract` as a process, what it committed, and all processes that belong to it."""

    def __init__(self, options, store, home):
        self.store, self.mark, self.committed = store, uuid.uuid4().hex, {}
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SCSAE_"))}
        self.environment = {**kept, "HOME": str(home), "OMP_NUM_THREADS": "1", MARK: self.mark}
        self.command = f"extract {options.data[0]} --model {options.model} --layer 0 --layer 1 --num-actors 2"
        self.command += f" --shard-cells {options.shard_cells}"
        self.driver, self.log = None, None

    def scsae(self, *arguments):
        return [sys.executable, "-m", "pipelines.cli", *arguments, "--store", str(self.store)]

    def start(self):
        self.log = self.store.parent / f"{uuid.uuid4().hex}.log"
        with self.log.open("w") as log:
            # a process group of its own, to which Ctrl-C goes as from a terminal
            self.driver = subprocess.Popen(
                self.scsae(*self.command.split()), env=self.environment, stdout=log, stderr=log, process_group=0
            )

    @property
    def alive(self):
        return self.driver is not None and self.driver.poll() is None

    def look(self):
        """Note the file of every part when it is first seen committed; return how many are."""
        for marker in self.store.glob("activations/*/part-*.json"):
            if marker not in self.committed:
                self.committed[marker] = [identity(marker), identity(marker.with_suffix(".parquet"))]
        return len(self.committed)

    def processes(self, kind=""):
        """Ids of the processes of this run; those whose command holds the words of `kind`."""
        found = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                ours = folder.name.isdigit() and f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes()
                if ours and KINDS.get(kind, "").encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
        return sorted(found)

    def go_on_until(self, n_committed):
        """Let it work, started again if it ended, until so many more parts are committed."""
        if not self.alive:
            self.start()
        goal, deadline = self.look() + n_committed, time.monotonic() + 120
        while self.look() < goal:
            assert self.alive, f"over before the next kill, which would show nothing: {self.log.read_text()[-2000:]}"
            assert time.monotonic() < deadline, "nothing is committed any more"
            time.sleep(0.05)

    def strike(self, kind, rng):
        """Kill a process of the kind; the run goes on, or ends as it should."""
        if kind == "interrupt":
            os.killpg(self.driver.pid, signal.SIGINT)
        elif kind == "terminate":
            self.driver.terminate()
        else:
            deadline = time.monotonic() + GRACE_S
            while not (victims := self.processes(kind)):
                assert time.monotonic() < deadline, f"there is no {kind}"
                time.sleep(0.05)
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(rng.choice(victims)), signal.SIGKILL)
        if kind in ENDS:
            code, words = ENDS[kind]
            assert self.driver.wait(timeout=GRACE_S) == code, self.log.read_text()[-2000:]
            assert "Traceback" not in self.log.read_text()
            if words is not None:
                assert matches(words, self.log.read_text()), self.log.read_text()[-2000:]

    def finish(self):
        """Run to the end; return the log."""
        if not self.alive:
            self.start()
        while self.alive:
            self.look()
            time.sleep(0.05)
        assert self.driver.returncode == 0, self.log.read_text()[-2000:]
        return self.log.read_text()

    def end(self):
        """Kill what is left."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def matches(words, text):
    """Whether the pattern is in the text, wherever its lines were broken."""
    return re.search(words, " ".join(text.split())) is not None


def identity(path):
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def tree(store):
    """Sha256 of what every file below the runs and the cells holds, without the times of manifests."""
    return {f"{kind}/{name}": sha for kind in ("activations", "cells") for name, sha in hashes_of(store / kind).items()}


@pytest.fixture
def disturbed(tmp_path):
    """Make a run that is to equal `calm`."""
    (tmp_path / "home").mkdir()
    made = []

    def make(calm):
        made.append(Extraction(calm.options, tmp_path / "store", tmp_path / "home"))
        return made[-1]

    yield make
    for extraction in made:
        extraction.end()


def assert_done_exactly_once(extraction, calm):
    assert extraction.look() == 2 * calm.n_shards
    now = {marker: [identity(marker), identity(marker.with_suffix(".parquet"))] for marker in extraction.committed}
    assert now == extraction.committed, "a committed shard was written again"
    assert tree(extraction.store) == tree(calm.store)
    assert list(extraction.store.rglob(".tmp-*")) == []
    for info in Layout(extraction.store).runs("activations"):
        assert (
            commit.Run.open(info.path).manifest() == commit.Run.open(calm.store / "activations" / info.run).manifest()
        )
        assert commit.Run.open(info.path).verify() == []
    verify = subprocess.run(extraction.scsae("verify", info.run), capture_output=True, text=True, check=False)
    assert verify.returncode == 0, verify.stderr
    assert "intact" in verify.stderr
    deadline = time.monotonic() + GRACE_S
    while (left := extraction.processes()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []


def test_a_run_that_is_killed_and_resumed_writes_the_bytes_of_an_undisturbed_one_once(disturbed, calm):
    extraction, rng = disturbed(calm), np.random.default_rng(0)
    for kind in ("actor", "interrupt", "driver", "raylet"):
        extraction.go_on_until(int(rng.integers(5, 40)))
        time.sleep(rng.uniform(0, 0.1))
        extraction.strike(kind, rng)
    extraction.finish()
    assert_done_exactly_once(extraction, calm)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_random_kills_change_nothing(disturbed, extracted_calmly):
    calm, rng = extracted_calmly(1500), np.random.default_rng(1)
    extraction = disturbed(calm)
    for kind in rng.permutation(["actor"] * 9 + ["raylet"] * 3 + ["head"] * 3 + ["driver"] * 5):
        # often while it starts, when nothing more is committed yet
        extraction.go_on_until(int(rng.integers(0, 20)))
        time.sleep(rng.uniform(0, 0.3))
        extraction.strike(kind, rng)
    extraction.finish()
    assert_done_exactly_once(extraction, calm)
