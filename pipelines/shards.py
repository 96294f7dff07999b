"""Shards over actors: the one loop by which every sharded stage runs.

Actors are held by hand: each has at most two shards in flight (one working, one waiting, so that it never idles on
the driver), and `ray.wait` hands out the next. A shard's content is a function of (plan, shard) and its actor checks
the marker first, so Ray's retries and restarts are harmless: what was committed stays, what was lost is done again.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

IN_FLIGHT = 2


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
