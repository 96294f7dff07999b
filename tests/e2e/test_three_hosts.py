"""A cluster of three hosts loses a link, a host and, for a while, an actor amid an extraction, and both hosts return.

The hosts are network namespaces of one machine (`tests/helpers/hosts.py`). A silent host is given up after 2 s here
instead of 15. The host whose link is cut goes on computing meanwhile: a writer that is believed dead.
"""

import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from hosts import hosts, why_not

from feature_store.storage import commit
from feature_store.storage.layout import Layout
from pipelines.runtime.actor_pool import SHARDS_PER_ACTOR

pytestmark = [pytest.mark.ray, pytest.mark.slow]

GIVEN_UP_S = 2.0
OUT_S = 4 * GIVEN_UP_S
"""How long the link is cut and the actor is stopped."""
HELD_BACK = 200
"""Shards from this one on are not done before both hosts have returned."""

DRIVER = """
import sys, time
from pathlib import Path

import ray

import pipelines.extract
from pipelines.config import ExtractOptions

options, folder, address = ExtractOptions.model_validate_json(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
Extractor = pipelines.extract.Extractor


class Logged(Extractor):
    def shard(self, number):
        import os

        with (folder / "attempts").open("a") as file:
            file.write(f"{number} {ray.util.get_node_ip_address()} {os.getpid()} {time.time_ns()}\\n")
        time.sleep(0.1)
        while number >= HELD_BACK and not (folder / "returned").exists():
            time.sleep(0.1)
        return super().shard(number)


pipelines.extract.Extractor = Logged
pipelines.extract.extract(options, folder / "store", address=address)
"""


class Attempt(NamedTuple):
    """A shard that was begun: on which host, in which process, and when."""

    shard: int
    host: int
    process: int
    began_ns: int


class Story(NamedTuple):
    """What happened: all attempts in their order, when a host was lost and back by host, and what the driver said."""

    attempts: list[Attempt]
    lost_ns: dict[int, int]
    said: str
    store: Path


@pytest.fixture(scope="module")
def story(calm, tmp_path_factory):
    if reason := why_not():
        pytest.skip(f"three hosts cannot be made here: {reason}")
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "home").mkdir()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SCSAE_"))}
    env = {**kept, "HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    health = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    # careful: Ray's sockets have paths of 107 bytes at most, and a cluster in Ray's own folder would become the one
    # that other programs of this machine find
    with tempfile.TemporaryDirectory(prefix="ray-") as sessions, hosts(3) as net:
        address, env["RAY_TMPDIR"] = f"{net.ip(0)}:6379", sessions

        def join(host):
            """Start Ray on a host and wait until it has started; two at once would take each other's files."""
            how = ("--address", address)
            if host == 0:
                how = ("--head", "--port", 6379, "--system-config", json.dumps(health), "--include-dashboard", "false")
                how += ("--temp-dir", sessions)
            own = ("--node-ip-address", net.ip(host), "--num-cpus", 1, "--object-store-memory", 100_000_000)
            log = folder / f"ray{host}"
            log.unlink(missing_ok=True)
            ray = Path(sys.executable).with_name("ray")
            started = net.start(host, ray, "start", "--block", *own, *how, log=log, env=env)
            deadline = time.monotonic() + 60
            while "Ray runtime started" not in log.read_text():
                assert started.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.1)

        def attempts():
            file = folder / "attempts"
            lines = file.read_text().splitlines() if file.exists() else []
            by_ip = {net.ip(host): host for host in range(net.n)}
            fields = [line.split() for line in lines]
            return [Attempt(int(n), by_ip[where], int(pid), int(at)) for n, where, pid, at in fields]

        def wait_until(is_so, what, seconds=150):
            deadline = time.monotonic() + seconds
            while not is_so():
                assert driver.poll() is None, f"{what}: the driver ended: {(folder / 'driver').read_text()[-3000:]}"
                assert time.monotonic() < deadline, f"{what}: {attempts()[-5:]}"
                time.sleep(0.05)

        for host in range(net.n):
            join(host)
        code = DRIVER.replace("HELD_BACK", str(HELD_BACK))
        options = calm.options.model_copy(update={"num_actors": 3}).model_dump_json()
        driver = net.start(0, sys.executable, "-c", code, options, folder, address, log=folder / "driver", env=env)
        wait_until(lambda: {one.host for one in attempts()} == {0, 1, 2}, "an actor on each host")

        stopped = next(one.process for one in reversed(attempts()) if one.host == 0)
        os.kill(stopped, signal.SIGSTOP)
        lost = {1: time.time_ns()}
        net.cut(1)
        time.sleep(OUT_S)
        net.heal(1)
        os.kill(stopped, signal.SIGCONT)
        time.sleep(GIVEN_UP_S)
        # a raylet that learns that it was given up ends itself; this host then starts anew
        net.kill(1)
        join(1)
        returned = time.time_ns()
        wait_until(lambda: any(one.host == 1 and one.began_ns > returned for one in attempts()), "host 1 works again")

        lost[2] = time.time_ns()
        net.kill(2)
        time.sleep(2 * GIVEN_UP_S)
        join(2)
        returned = time.time_ns()
        wait_until(lambda: any(one.host == 2 and one.began_ns > returned for one in attempts()), "host 2 works again")
        (folder / "returned").touch()
        assert driver.wait(240) == 0, (folder / "driver").read_text()[-3000:]
        return Story(
            attempts=attempts(),
            lost_ns=lost,
            said=(folder / "driver").read_text(),
            store=folder / "store",
        )


def test_the_run_ends_with_every_shard_and_says_which_losses_it_saw(story, calm):
    assert {one.shard for one in story.attempts} == set(range(calm.n_shards))
    assert story.said.count("an actor was lost") >= 2


def test_hosts_that_return_are_given_work_again(story):
    for host, when in story.lost_ns.items():
        before = {one.process for one in story.attempts if one.host == host and one.began_ns < when}
        after = {one.process for one in story.attempts if one.host == host and one.began_ns > when}
        assert before
        assert after - before


def test_only_shards_in_flight_at_a_loss_are_begun_again(story):
    times = Counter(one.shard for one in story.attempts)
    again = {shard for shard, n in times.items() if n > 1}
    n_losses = story.said.count("an actor was lost")
    assert len(again) <= SHARDS_PER_ACTOR * n_losses


def test_the_bytes_are_those_of_an_undisturbed_run(story, calm):
    for info in Layout(calm.store).runs("activations"):
        mine = commit.Run.open(story.store / "activations" / info.run)
        assert mine.manifest() == commit.Run.open(info.path).manifest()
        assert mine.verify() == []
    assert list(story.store.rglob(".tmp-*")) == []
