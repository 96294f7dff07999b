"""Exactly once: an extraction whose processes are killed again and again ends in the bytes of an undisturbed one."""

import subprocess
import sys
import time

import numpy as np
import pytest
from killed_commands import KilledCommand
from stored_bytes import hashes_of

from feature_store.storage import commit
from feature_store.storage.layout import Layout

pytestmark = pytest.mark.slow


def tree(store):
    """Sha256 of what every file below the runs and the cells holds, without the times of manifests."""
    return {f"{kind}/{name}": sha for kind in ("activations", "cells") for name, sha in hashes_of(store / kind).items()}


@pytest.fixture
def disturbed(tmp_path):
    """Make a run that is to equal `calm`."""
    (tmp_path / "home").mkdir()
    made = []

    def make(calm):
        options = calm.options
        words = f"extract {options.data[0]} --model {options.model} --layer 0 --layer 1 --num-actors 2"
        words += f" --shard-cells {options.shard_cells}"
        made.append(KilledCommand(words.split(), tmp_path / "store", tmp_path / "home", tables=["activations/*"]))
        return made[-1]

    yield make
    for extraction in made:
        extraction.end()


def assert_done_exactly_once(extraction, calm):
    assert extraction.look() == 2 * calm.n_shards
    extraction.assert_written_once()
    assert tree(extraction.store) == tree(calm.store)
    for info in Layout(extraction.store).runs("activations"):
        assert (
            commit.Run.open(info.path).manifest() == commit.Run.open(calm.store / "activations" / info.run).manifest()
        )
        assert commit.Run.open(info.path).verify() == []
    verify = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "verify", info.run, "--store", str(extraction.store)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert verify.returncode == 0, verify.stderr
    assert "intact" in verify.stderr


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
