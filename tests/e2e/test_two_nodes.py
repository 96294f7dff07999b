"""A cluster of two nodes loses one amid an extraction: the other one finishes, and only what was lost is done again."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from feature_store.storage import commit
from feature_store.storage.layout import Layout
from pipelines.runtime.actor_pool import SHARDS_PER_ACTOR

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# The first node has room for one actor, the second for another; `attempts` gets a line for every shard that is begun.
DRIVER = """
import os, signal, sys, threading, time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

import pipelines.extract
from pipelines.config import ExtractOptions

options, store, attempts = ExtractOptions.model_validate_json(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
Extractor = pipelines.extract.Extractor


class Logged(Extractor):
    def shard(self, number):
        node = ray.get_runtime_context().get_node_id()
        with attempts.open("a") as file:
            file.write(f"{number} {node} {time.time_ns()}\\n")
        return super().shard(number)


def children(of):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, parent = int(stat.parent.name), int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == of:
            found += [pid, *children(pid)]
    return found


def lose(node):
    while len({line.split()[1] for line in attempts.read_text().splitlines()} if attempts.exists() else ()) < 2:
        time.sleep(0.02)
    begun = len(list(store.glob("activations/*/part-*.json")))
    while len(list(store.glob("activations/*/part-*.json"))) < begun + 20:
        time.sleep(0.02)
    raylet = node.all_processes["raylet"][0].process.pid
    for pid in [raylet, *children(raylet)]:
        os.kill(pid, signal.SIGKILL)
    attempts.with_name("lost").write_text(f"{node.node_id} {time.time_ns()}")


# a lost node is noticed after 2 s instead of 15
health = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
memory = {"object_store_memory": 100_000_000, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": health, **memory})
second = cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
pipelines.extract.Extractor = Logged
thread = threading.Thread(target=lose, args=[second])
thread.start()
pipelines.extract.extract(options, store, address=cluster.address)
thread.join()
"""


class Attempt(NamedTuple):
    """A shard that was begun, on which node and when."""

    shard: int
    node: str
    began: int


class Story(NamedTuple):
    """What the driver said, which node was lost and when, and all attempts in their order."""

    said: str
    attempts: list[Attempt]
    lost: str
    when: int
    store: Path


@pytest.fixture(scope="module")
def story(calm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nodes")
    (folder / "home").mkdir()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SCSAE_"))}
    environment = {**kept, "HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, calm.options.model_dump_json(), folder / "store", folder / "attempts"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in (folder / "attempts").read_text().splitlines()]
    node, when = (folder / "lost").read_text().split()
    return Story(
        said=done.stderr,
        attempts=[Attempt(int(shard), where, int(began)) for shard, where, began in lines],
        lost=node,
        when=int(when),
        store=folder / "store",
    )


def test_the_run_finishes_on_the_node_that_is_left(story):
    assert len({attempt.node for attempt in story.attempts}) == 2
    after = {attempt.node for attempt in story.attempts if attempt.began > story.when}
    assert after
    assert story.lost not in after
    assert "an actor was lost" in story.said


def test_only_shards_in_flight_on_the_lost_node_are_begun_again(story):
    times = Counter(attempt.shard for attempt in story.attempts)
    again = {shard for shard, n in times.items() if n > 1}
    assert len(again) <= SHARDS_PER_ACTOR
    first = {attempt.shard: attempt.node for attempt in reversed(story.attempts)}
    assert {first[shard] for shard in again} <= {story.lost}


def test_the_bytes_are_those_of_an_undisturbed_run(story, calm):
    for info in Layout(calm.store).runs("activations"):
        mine = commit.Run.open(story.store / "activations" / info.run)
        assert mine.manifest() == commit.Run.open(info.path).manifest()
        assert mine.verify() == []
    assert list(story.store.rglob(".tmp-*")) == []
