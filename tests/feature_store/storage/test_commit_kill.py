"""Runs killed with SIGKILL: at every single file operation, and at random moments, alone and in a race."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# For n = 1, 2, ... a fork writes 2 shards into a folder of its own and kills itself at its n-th file operation there;
# another fork then resumes it. The last folder is the one that nobody killed.
CRASH = """
import os, signal, sys
from pathlib import Path
from feature_store.storage import commit

def write_all(folder):
    run = commit.Run.create(folder, {"n_shards": 2, "seed": 1})
    for shard in run.pending():
        run.commit_shard(shard, lambda path: path.write_bytes(bytes([65 + shard]) * 70000), start=shard, stop=shard + 1)
    run.finalize()

def forked(work):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        work()
    finally:
        os._exit(0 if sys.exc_info()[0] is None else 1)

def crashing(folder, n):
    seen = 0
    def hook(event, args):
        nonlocal seen
        if event in ("open", "os.rename", "os.link", "os.remove", "os.mkdir") and str(args[0]).startswith(str(folder)):
            seen += 1
            if seen == n:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    write_all(folder)

root = Path(sys.argv[1])
for n in range(1, 500):
    folder = root / f"{n:03d}"
    status = forked(lambda: crashing(folder, n))
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    assert forked(lambda: write_all(folder)) == 0
print(n)
"""

WRITER = """
import sys, time
import numpy as np
import polars as pl
from feature_store.storage import commit

run = commit.Run.create(sys.argv[1], {"n_shards": 12, "seed": 1})
print("ready", flush=True)
order = np.random.default_rng(int(sys.argv[2])).permutation(run.pending())
for shard in order.tolist():
    frame = pl.DataFrame({"x": np.random.default_rng(shard).normal(size=20_000)})
    run.commit_shard(shard, lambda path: commit.write_frame(path, frame), start=shard, stop=shard + 1)
    time.sleep(float(sys.argv[3]))
run.finalize()
"""


def start(folder: Path, *, seed: int = 0, pause_s: float = 0.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(folder), str(seed), str(pause_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def finish(process: subprocess.Popen[str]) -> int:
    process.communicate()
    return process.returncode


def test_a_kill_at_any_file_operation_resumes_to_the_same_bytes(
    tmp_path: Path, folder_hashes: Callable[[Path], dict[str, str]]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CRASH, str(tmp_path)], check=True, capture_output=True, text=True, timeout=120
    )
    n_points = int(done.stdout)
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == n_points > 20
    undisturbed = folder_hashes(folders[-1])
    assert len(undisturbed) == 6
    for folder in folders:
        assert folder_hashes(folder) == undisturbed, f"killed at operation {folder.name}"


def kill_and_resume(folder: Path, n_kills: int) -> int:
    rng = np.random.default_rng(0)
    kills = 0
    for _ in range(n_kills):
        process = start(folder, pause_s=0.01)
        time.sleep(rng.uniform(0, 0.08))
        process.kill()
        kills += finish(process) == -9
    assert finish(start(folder)) == 0
    return kills


def check_kills(tmp_path: Path, folder_hashes: Callable[[Path], dict[str, str]], n_kills: int) -> None:
    assert finish(start(tmp_path / "undisturbed")) == 0
    assert kill_and_resume(tmp_path / "killed", n_kills) > 0
    undisturbed = folder_hashes(tmp_path / "undisturbed")
    assert len(undisturbed) == 2 * 12 + 2
    assert folder_hashes(tmp_path / "killed") == undisturbed


def test_a_run_killed_at_random_and_resumed_equals_an_undisturbed_one(
    tmp_path: Path, folder_hashes: Callable[[Path], dict[str, str]]
) -> None:
    check_kills(tmp_path, folder_hashes, n_kills=3)


@pytest.mark.slow
def test_a_run_killed_forty_times_and_resumed_equals_an_undisturbed_one(
    tmp_path: Path, folder_hashes: Callable[[Path], dict[str, str]]
) -> None:
    check_kills(tmp_path, folder_hashes, n_kills=40)


def test_processes_racing_for_the_same_shards_equal_an_undisturbed_one(
    tmp_path: Path, folder_hashes: Callable[[Path], dict[str, str]]
) -> None:
    assert finish(start(tmp_path / "undisturbed")) == 0
    racers = [start(tmp_path / "raced", seed=seed) for seed in (1, 2)]
    assert [finish(process) for process in racers] == [0, 0]
    assert folder_hashes(tmp_path / "raced") == folder_hashes(tmp_path / "undisturbed")
