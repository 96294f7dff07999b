"""One driver a run, in a folder; on object storage: test_object_storage.py."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from feature_store.errors import BusyError
from feature_store.storage import commit
from feature_store.storage.run_lock import DRIVER

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DRIVE = """
import sys
from feature_store.storage.run_lock import exclusive
with exclusive(sys.argv[1]):
    print("driving", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path: Path) -> commit.Run:
    return commit.Run.create(tmp_path / "run", {"n_shards": 1})


@pytest.fixture
def other(run: commit.Run) -> Iterator[subprocess.Popen[str]]:
    """A process that drives the run until it is killed, or this one ends."""
    command = [sys.executable, "-c", DRIVE, run.path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "driving\n"
        yield process
        process.kill()


def test_the_second_driver_is_told_who_drives_and_what_to_do(run: commit.Run, other: subprocess.Popen[str]) -> None:
    with pytest.raises(BusyError) as error:
        run.exclusive().__enter__()
    message = str(error.value)
    assert str(run.path) in message
    assert f"host {socket.gethostname()}, process {other.pid}, since 20" in message
    assert f"`kill {other.pid}`" in message
    assert "run the same command again: what is committed is kept" in message


def test_a_killed_driver_is_in_nobodys_way(run: commit.Run, other: subprocess.Popen[str]) -> None:
    other.kill()
    other.wait()
    assert (run.path / DRIVER).exists()
    with run.exclusive():
        assert json.loads((run.path / DRIVER).read_text())["pid"] == os.getpid()
    assert [path.name for path in run.path.iterdir()] == ["plan.json"]


def test_readers_writers_and_a_finished_run_need_no_driver(run: commit.Run, other: subprocess.Popen[str]) -> None:
    assert run.pending() == [0]
    run.commit_shard(0, lambda path: path.write_bytes(b"x"), start=0, stop=1)
    run.finalize()
    assert run.verify() == []
    assert other.poll() is None


def test_a_driver_that_fails_leaves_no_folder_that_was_not_there(tmp_path: Path) -> None:
    def fail() -> None:
        with commit.exclusive(tmp_path / "new"):
            raise KeyError("no")

    with pytest.raises(KeyError):
        fail()
    assert not (tmp_path / "new").exists()


def test_threads_drive_one_after_the_other(run: commit.Run) -> None:
    driving, most, done = 0, 0, []

    def drive() -> None:
        nonlocal driving, most
        while True:
            try:
                with run.exclusive():
                    driving += 1
                    most = max(most, driving)
                    time.sleep(0.002)
                    driving -= 1
                    done.append(1)
                    return
            except BusyError:
                time.sleep(0.001)

    threads = [threading.Thread(target=drive) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, len(done)) == (1, 8)
