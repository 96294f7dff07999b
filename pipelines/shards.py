"""Shards over actors: the one loop by which every sharded stage runs.

Actors are held by hand: each has at most two shards in flight (one working, one waiting, so that it never idles on
the driver), and `ray.wait` hands out the next. A shard's content is a function of (plan, shard) and its actor checks
the marker first, so Ray's retries and restarts are harmless: what was committed stays, what was lost is done again.
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipelines.cluster import actors_that_fit, ray_session
from pipelines.config import ActorOptions
from pipelines.progress import ticking
from pipelines.stage import Clock

IN_FLIGHT = 2


def do_shards(
    worker: type,
    work: Any,
    shards: Sequence[int],
    options: ActorOptions,
    *,
    title: str,
    note: Callable[[Mapping[str, int], float], str],
    address: str | None = None,
) -> Counter[str]:
    """Start actors of `worker(work)`, give them the shards and show progress; return the summed counts.

    Args:
        worker: class whose method `shard(number)` commits one shard and returns counts by name.
        work: what the class is made from; travels to the actors.
        shards: shard numbers still to be done; none starts nothing.
        options: number of actors and what each of them gets.
        title: name of the stage.
        note: makes the text beside the progress from the summed counts and the seconds gone by.
        address: Ray cluster; None uses an open session or starts one here.
    """
    if not shards:
        return Counter()
    import ray

    with ray_session(address=address), ticking(title, len(shards), "shards") as tick:
        n_actors = actors_that_fit(
            options.num_actors, num_cpus=options.num_cpus, num_gpus=options.num_gpus, n_tasks=len(shards)
        )
        actor_class = ray.remote(worker).options(
            num_cpus=options.num_cpus, num_gpus=options.num_gpus, max_restarts=-1, max_task_retries=-1
        )
        actors = [actor_class.remote(work) for _ in range(n_actors)]
        clock, total, n_done = Clock(), Counter[str](), 0

        def on_done(_shard: int, counts: Mapping[str, int]) -> None:
            nonlocal n_done
            n_done += 1
            total.update(counts)
            tick(n_done, note(total, clock.seconds))

        run_over_actors(actors, shards, submit=lambda actor, shard: actor.shard.remote(shard), on_done=on_done)
    return total


def run_over_actors(
    actors: Sequence[Any],
    shards: Sequence[int],
    *,
    submit: Callable[[Any, int], Any],
    on_done: Callable[[int, Any], None],
) -> None:
    """Give every shard to an actor and call `on_done(shard, result)` as each is committed.

    Args:
        actors: Ray actor handles.
        shards: shard numbers still to be done.
        submit: starts one shard on one actor and returns the ObjectRef of a small result.
        on_done: called in the driver, in the order of completion.

    Raises:
        ray.exceptions.RayError: a task failed for good; shards already committed stay committed.
    """
    import ray

    waiting = deque(shards)
    running: dict[Any, tuple[int, Any]] = {}
    for actor in [actor for _ in range(IN_FLIGHT) for actor in actors]:
        if waiting:
            shard = waiting.popleft()
            running[submit(actor, shard)] = (shard, actor)
    while running:
        done, _ = ray.wait(list(running), num_returns=1)
        shard, actor = running.pop(done[0])
        result = ray.get(done[0])
        if waiting:
            following = waiting.popleft()
            running[submit(actor, following)] = (following, actor)
        on_done(shard, result)
