"""Shards over actors: the one loop by which every sharded stage runs.

The driver holds the actors by hand. Each has at most two shards in flight (one working, one waiting, so that it never
idles on the driver), and `ray.wait` tells which is done. An actor that dies is replaced, and its shards go to whoever
is free first: Ray's own restarts would keep them with an actor that may never come back, because the node that had room
for it is gone. A shard's content is a function of (plan, shard) and its actor looks for the marker first, so doing one
twice is harmless: what was committed stays, what was lost is done again.
"""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pipelines.config import ActorOptions
from pipelines.errors import RunFailedError
from pipelines.runtime.cluster import actors_that_fit, ray_session
from pipelines.runtime.progress import stderr_console, ticking
from pipelines.runtime.stage import Clock

IN_FLIGHT = 2
LOOK_S = 0.5
LOSSES_IN_A_ROW = 5
"""Losses, for each actor, without one shard committed in between, after which the run ends."""
TELL_S, PATIENCE_S = 30.0, 600.0
"""Seconds without an actor that is ready after which this is said, and after which the run ends."""


class ShardActor:
    """A worker in a process of its own, with as many threads as it has cores."""

    def __init__(self, worker: type, work: Any, n_threads: int) -> None:
        self._worker, self._work, self._n_threads = worker, work, n_threads

    def ready(self) -> None:
        """Make the worker. Not in `__init__`, where Ray makes text of an error that was raised on purpose."""
        limit_threads(self._n_threads)
        self._body = self._worker(self._work)

    def shard(self, number: int) -> Any:
        """Do one shard and return its counts."""
        return self._body.shard(number)


def limit_threads(n_threads: int) -> None:
    """Give the thread pools of this process `n_threads` each, whatever $OMP_NUM_THREADS was where Ray was started."""
    # careful: Polars and OpenMP read these when they make their pools, so before the first computation
    os.environ.update(OMP_NUM_THREADS=str(n_threads), POLARS_MAX_THREADS=str(n_threads))
    import pyarrow as pa
    import torch

    torch.set_num_threads(n_threads)
    pa.set_cpu_count(n_threads)


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

    Raises:
        UsageError: no node has what one actor asks for.
        RunFailedError: the session was lost, no actor starts, or they die again and again.
    """
    total = Counter[str]()
    if not shards:
        return total
    import ray

    with ray_session(address=address) as session, ticking(title, len(shards), "shards") as tick:
        n_actors = actors_that_fit(
            options.num_actors, num_cpus=options.num_cpus, num_gpus=options.num_gpus, n_tasks=len(shards)
        )
        actor_class = ray.remote(ShardActor).options(
            num_cpus=options.num_cpus, num_gpus=options.num_gpus, max_restarts=0, max_task_retries=0
        )

        def start() -> Any:
            return actor_class.remote(worker, work, options.num_cpus)

        clock = Clock()
        crew = Crew(start, n_actors, shards, look=session.raise_if_lost)
        for n_done, (_, counts) in enumerate(crew.results(), start=1):
            total.update(counts)
            tick(n_done, note(total, clock.seconds))
    return total


class Crew:
    """Actors and the shards that they share.

    Args:
        start: starts one more actor and returns its handle, whose methods are `ready` and `shard(number)`.
        n_actors: how many are kept at work.
        shards: shard numbers still to be done.
        look: called every LOOK_S; raises if the session is lost.
    """

    def __init__(
        self, start: Callable[[], Any], n_actors: int, shards: Sequence[int], *, look: Callable[[], None]
    ) -> None:
        self._start, self._n_actors, self._look = start, n_actors, look
        self._waiting = deque(shards)
        # by ObjectRef; the shards of one actor in the order in which it does them
        self._starting: dict[Any, Any] = {}
        self._running: dict[Any, tuple[Any, int]] = {}
        self._ready: list[Any] = []
        self._losses = 0

    def results(self) -> Iterator[tuple[int, Any]]:
        """Yield every shard with its result, in the order of completion.

        Raises:
            RunFailedError: no actor starts, they die again and again, or what `look` raises.
            ray.exceptions.RayTaskError: what a shard or the making of a worker raised.
        """
        for _ in range(self._n_actors):
            self._hire()
        looked, idle, told = Clock(), Clock(), False
        while self._waiting or self._running:
            done = self._wait()
            if looked.seconds >= LOOK_S:
                self._look()
                looked = Clock()
            if self._ready or done:
                idle, told = Clock(), False
            elif idle.seconds > TELL_S:
                told = self._nobody_ready(idle.seconds, told=told)
            for ref in done:
                yield from self._take(ref)
            self._hand_out()

    def _wait(self) -> list[Any]:
        """The first ObjectRef that is done, none after LOOK_S."""
        import ray

        try:
            done, _ = ray.wait([*self._starting, *self._running], num_returns=1, timeout=LOOK_S)
        except ConnectionError as error:
            # of a Ray client (ray://)
            raise RunFailedError(f"the Ray session was lost: {error}; run the same command again to resume") from error
        return list(done)

    def _hire(self) -> None:
        actor = self._start()
        self._starting[actor.ready.remote()] = actor

    def _take(self, ref: Any) -> Iterator[tuple[int, Any]]:
        """What came back: an actor that is ready, a shard with its result, or the end of an actor."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            result = ray.get(ref)
        except RayTaskError:
            raise
        except RayError as error:
            self._lose(ref, error)
            return
        if ref in self._starting:
            self._ready.append(self._starting.pop(ref))
            return
        _, shard = self._running.pop(ref)
        self._losses = 0
        # before the caller looks at the result: no actor waits for the driver
        self._hand_out()
        yield shard, result

    def _hand_out(self) -> None:
        """Give waiting shards to the actors with the fewest; a second one only while there is one for each actor."""
        for n_in_flight in range(IN_FLIGHT):
            for actor in self._ready:
                enough = n_in_flight == 0 or len(self._waiting) >= self._n_actors
                if self._waiting and enough and len(self._shards_of(actor)) <= n_in_flight:
                    shard = self._waiting.popleft()
                    self._running[actor.shard.remote(shard)] = actor, shard

    def _shards_of(self, actor: Any) -> dict[Any, int]:
        return {ref: shard for ref, (whose, shard) in self._running.items() if whose is actor}

    def _lose(self, ref: Any, error: Exception) -> None:
        """Put the shards of a dead actor back to the front and start another actor."""
        # a lost session takes all actors with it: that is what to say then
        self._look()
        actor = self._starting.pop(ref) if ref in self._starting else self._running[ref][0]
        lost = self._shards_of(actor)
        for one in lost:
            del self._running[one]
        self._waiting.extendleft(reversed(lost.values()))
        self._ready = [other for other in self._ready if other is not actor]
        self._losses += 1
        where = f"at shard {next(iter(lost.values()))}" if lost else "while it started"
        if self._losses >= LOSSES_IN_A_ROW * self._n_actors:
            raise RunFailedError(
                f"{self._losses} actors died one after the other, the last one {where}, and no shard was committed in "
                f"between: {_in_short(error)}. If memory ran out, start fewer --num-actors on a "
                "node, then run the same command again"
            ) from error
        text = f"an actor was lost {where}; another one is started and its shards are done again"
        stderr_console().print(text, style="yellow", soft_wrap=True)
        self._hire()

    def _nobody_ready(self, seconds: float, *, told: bool) -> bool:
        """Say once that no actor is ready, and give up in the end."""
        import ray

        free = {key: value for key, value in ray.available_resources().items() if key in ("CPU", "GPU")}
        text = f"no actor is ready after {seconds:.0f} s: no room, or its model is still being loaded; free are {free}"
        if seconds > PATIENCE_S:
            raise RunFailedError(f"{text}; run the same command again when there is room")
        if not told:
            stderr_console().print(f"{text}; waiting", style="yellow", markup=False, soft_wrap=True)
        return True


def _in_short(error: Exception) -> str:
    """The last line of a message of Ray, which says why."""
    return str(error).strip().splitlines()[-1].strip()
