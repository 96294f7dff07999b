"""The loop over actors: every shard once, two in flight, and no harm from a killed actor."""

import os
import signal
import time

import pytest

from pipelines.shards import run_over_actors

pytestmark = pytest.mark.ray


class Worker:
    """Writes a file a shard; dies by SIGKILL on the shard it is told to, once."""

    def __init__(self, folder, deadly=None):
        self.folder, self.deadly = folder, deadly

    def shard(self, number):
        marker = self.folder / f"died-{number}"
        if number == self.deadly and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        (self.folder / f"{number}-{time.monotonic_ns()}").touch()
        return number * 10


def run(folder, n_shards, n_actors, deadly=None):
    import ray

    actor_class = ray.remote(Worker).options(num_cpus=1, max_restarts=-1, max_task_retries=-1)
    actors = [actor_class.remote(folder, deadly) for _ in range(n_actors)]
    seen = []
    run_over_actors(
        actors,
        range(n_shards),
        submit=lambda actor, shard: actor.shard.remote(shard),
        on_done=lambda shard, result: seen.append((shard, result)),
    )
    return seen


def test_every_shard_is_done_once_and_reported_with_its_result(ray_local, tmp_path):
    seen = run(tmp_path, n_shards=7, n_actors=2)
    assert sorted(seen) == [(i, i * 10) for i in range(7)]
    assert len(list(tmp_path.iterdir())) == 7


def test_a_killed_actor_is_restarted_and_its_shards_are_done(ray_local, tmp_path):
    seen = run(tmp_path, n_shards=6, n_actors=2, deadly=3)
    assert sorted(seen) == [(i, i * 10) for i in range(6)]
    assert (tmp_path / "died-3").exists()


def test_an_error_of_a_shard_reaches_the_driver(ray_local, tmp_path):
    import ray

    with pytest.raises(ray.exceptions.RayTaskError):
        run(tmp_path / "missing", n_shards=1, n_actors=1)


def test_no_shard_is_no_work(ray_local, tmp_path):
    assert run(tmp_path, n_shards=0, n_actors=1) == []
