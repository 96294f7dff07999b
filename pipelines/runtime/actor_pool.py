"""The pool of actors that compute the shards of a stage.

The driver keeps the actors itself. Each has at most two shards: one that it computes, and one that waits, so that the
actor is never idle until the driver answers. An actor that dies is replaced, and its shards go to the next free actor.
Ray's own restarts would keep the shards with an actor that may never come back, because its node is gone. The content
of a shard depends on (plan, shard) alone, and an actor first looks for the marker of a committed shard. A shard may
therefore be computed twice without harm. The driver's own work for a shard does not grow with the number of actors:
those that can take one more shard are kept by the number of shards that they have.
"""

import gc
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from feature_store.storage.filesystem import note_write
from pipelines.config import ActorOptions
from pipelines.errors import RunFailedError, UsageError
from pipelines.runtime import idle_actors
from pipelines.runtime.cluster import actors_that_fit, ray_session, session_is_shared
from pipelines.runtime.failures import root_cause
from pipelines.runtime.progress import progress_bar, stderr_console
from pipelines.runtime.stage import Clock
from pipelines.runtime.threads import limit_threads, limited_threads

SHARDS_PER_ACTOR = 2
CHECK_INTERVAL_S = 0.5
"""Seconds between two checks of the session."""
LOSSES_IN_A_ROW = 5
"""Number of lost actors, per actor of the pool, after which a run ends if no shard was done in between."""
NOTICE_AFTER_S, GIVE_UP_AFTER_S = 30.0, 600.0
"""Seconds without a ready actor after which a warning is shown, and after which the run ends."""


class ShardActor:
    """A worker in its own process, with as many threads as it has cores; it may serve several stages in turn."""

    def __init__(self, n_threads: int) -> None:
        # before the worker is received, with which the process loads Polars
        limit_threads(n_threads)
        self._n_threads = n_threads
        self._body: Any = None

    def ready(self, worker: type, work: Any) -> None:
        """Make the worker. This is not done in `__init__`, where Ray replaces the class of an error by text."""
        # torch may have been loaded with the worker, or by the one before
        limit_threads(self._n_threads)
        self._body = worker(work)

    def shard(self, number: int) -> Any:
        """Compute one shard and return its counts."""
        return self._body.shard(number)

    def rest(self) -> None:
        """Let go of the worker."""
        self._body = None
        gc.collect()


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
    """Compute the shards on actors of `worker(work)` with a progress bar; return the sums of their counts.

    Without actors (`num_actors` 0) they are computed in this process, in order and to the same bytes.

    Args:
        worker: class whose method `shard(number)` commits one shard and returns counts by name.
        work: argument of the class, which is sent to every actor.
        shards: numbers of the shards that are still to be computed; if there are none, no actor is started.
        options: number of actors and the resources of each.
        title: name of the stage.
        note: returns the text beside the progress bar from the sums so far and the seconds since the start.
        address: Ray cluster; None uses the open session or starts one on this machine.

    Raises:
        UsageError: no node has the resources of one actor, or a cluster is named and no actor wanted.
        RunFailedError: the session was lost, no actor starts, or actors die repeatedly.
        Exception: an actor raised it; it has the class that it had there.
    """
    total = Counter[str]()
    if not shards:
        return total
    if options.num_actors == 0:
        if address is not None:
            raise UsageError(
                f"--num-actors was 0, which computes in this process, and --address was {address!r}, a cluster; give "
                "one of them"
            )
        with limited_threads(options.num_cpus), progress_bar(title, len(shards), "shards") as report:
            body, clock = worker(work), Clock()
            for n_done, shard in enumerate(shards, start=1):
                total.update(body.shard(shard))
                report(n_done, note(total, clock.seconds))
        return total
    import ray

    # actors write in processes of their own
    note_write()
    with ray_session(address=address) as session, progress_bar(title, len(shards), "shards") as report:
        n_actors = actors_that_fit(
            options.num_actors, num_cpus=options.num_cpus, num_gpus=options.num_gpus, n_tasks=len(shards)
        )
        actor_class = ray.remote(ShardActor).options(
            num_cpus=options.num_cpus, num_gpus=options.num_gpus, max_restarts=0, max_task_retries=0
        )
        resources = (options.num_cpus, options.num_gpus)
        waiting = idle_actors.take(resources, n_actors)

        def new_actor() -> Any:
            return waiting.pop() if waiting else actor_class.remote(options.num_cpus)

        clock = Clock()
        pool = ActorPool(new_actor, n_actors, shards, begin=(worker, work), check_session=session.raise_if_lost)
        for n_done, (_, counts) in enumerate(pool.results(), start=1):
            total.update(counts)
            report(n_done, note(total, clock.seconds))
        if session_is_shared():
            idle_actors.keep(resources, pool.idle())
    return total


@dataclass(eq=False)
class _Actor:
    """The handle of an actor, and its shards by ObjectRef, in the order in which it computes them."""

    handle: Any
    shards: dict[Any, int] = field(default_factory=dict)


class ActorPool:
    """Actors and the shards that are divided among them.

    Args:
        new_actor: returns the handle of one more actor, whose methods are `ready(*begin)` and `shard(number)`.
        n_actors: number of actors, which is kept when one of them dies.
        shards: numbers of the shards that are still to be computed.
        begin: what an actor is given before its first shard.
        check_session: called every CHECK_INTERVAL_S; raises if the session is lost.
    """

    def __init__(
        self,
        new_actor: Callable[[], Any],
        n_actors: int,
        shards: Sequence[int],
        *,
        check_session: Callable[[], None],
        begin: tuple[Any, ...] = (),
    ) -> None:
        self._new_actor, self._n_actors, self._check_session = new_actor, n_actors, check_session
        self._begin = begin
        self._waiting = deque(shards)
        # by ObjectRef
        self._starting: dict[Any, _Actor] = {}
        self._running: dict[Any, _Actor] = {}
        # ready actors that have 0, 1, ... shards and can take one more, in the order in which they are served
        self._available: list[OrderedDict[_Actor, None]] = [OrderedDict() for _ in range(SHARDS_PER_ACTOR)]
        self._losses = 0

    def results(self) -> Iterator[tuple[int, Any]]:
        """Yield every shard with its result, in the order of completion.

        Raises:
            RunFailedError: no actor starts, actors die repeatedly, or `check_session` raises it.
            Exception: a shard, or making a worker, raised it in its actor; it has the class that it had there.
        """
        for _ in range(self._n_actors):
            self._start_actor()
        last_check, idle, noticed = Clock(), Clock(), False
        while self._waiting or self._running:
            done = self._wait()
            if last_check.seconds >= CHECK_INTERVAL_S:
                self._check_session()
                last_check = Clock()
            if done or self._running or any(self._available):
                idle, noticed = Clock(), False
            elif idle.seconds > NOTICE_AFTER_S:
                noticed = self._report_no_ready_actor(idle.seconds, noticed=noticed)
            for ref in done:
                yield from self._handle_done(ref)
            self._assign_shards()

    def idle(self) -> list[Any]:
        """Return the handles of the actors that are ready and have no shard."""
        return [actor.handle for actor in self._available[0]]

    def _wait(self) -> list[Any]:
        """Return the first ObjectRef that is done, or none after CHECK_INTERVAL_S."""
        import ray

        try:
            done, _ = ray.wait([*self._starting, *self._running], num_returns=1, timeout=CHECK_INTERVAL_S)
        except ConnectionError as error:
            # raised by a Ray client (ray://)
            raise RunFailedError(f"the Ray session was lost: {error}; run the same command again to resume") from error
        return list(done)

    def _start_actor(self) -> None:
        handle = self._new_actor()
        self._starting[handle.ready.remote(*self._begin)] = _Actor(handle)

    def _handle_done(self, ref: Any) -> Iterator[tuple[int, Any]]:
        """Handle an actor that is ready or has died; yield the shard and its result if a shard is done."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            result = ray.get(ref)
        except RayTaskError as error:
            raise root_cause(error) from None
        except RayError as error:
            self._replace_actor(ref, error)
            return
        if ref in self._starting:
            self._make_available(self._starting.pop(ref))
            return
        actor = self._running.pop(ref)
        self._make_unavailable(actor)
        shard = actor.shards.pop(ref)
        self._make_available(actor)
        self._losses = 0
        # assigned before the caller uses the result, so that no actor waits for the driver
        self._assign_shards()
        yield shard, result

    def _assign_shards(self) -> None:
        """Give waiting shards to the actors with the fewest; a second one only if every actor can have one."""
        for n_in_flight, actors in enumerate(self._available):
            n_needed = 1 if n_in_flight == 0 else self._n_actors
            while actors and len(self._waiting) >= n_needed:
                actor, _ = actors.popitem(last=False)
                shard = self._waiting.popleft()
                ref = actor.handle.shard.remote(shard)
                actor.shards[ref], self._running[ref] = shard, actor
                self._make_available(actor)

    def _make_available(self, actor: _Actor) -> None:
        if len(actor.shards) < SHARDS_PER_ACTOR:
            self._available[len(actor.shards)][actor] = None

    def _make_unavailable(self, actor: _Actor) -> None:
        if len(actor.shards) < SHARDS_PER_ACTOR:
            self._available[len(actor.shards)].pop(actor, None)

    def _replace_actor(self, ref: Any, error: Exception) -> None:
        """Return the shards of a dead actor to the front of the queue and start another actor."""
        # a lost session ends all actors, and is then the error to report
        self._check_session()
        actor = self._starting.pop(ref) if ref in self._starting else self._running[ref]
        lost = actor.shards
        for one in lost:
            del self._running[one]
        self._waiting.extendleft(reversed(lost.values()))
        self._make_unavailable(actor)
        self._losses += 1
        where = f"at shard {next(iter(lost.values()))}" if lost else "while it started"
        if self._losses >= LOSSES_IN_A_ROW * self._n_actors:
            raise RunFailedError(
                f"{self._losses} actors died one after the other, the last one {where}, and no shard was done in "
                f"between: {_last_line(error)}. If memory ran out, start fewer --num-actors on a "
                "node, then run the same command again"
            ) from error
        text = f"an actor was lost {where}; another actor is started, and its shards are computed again"
        stderr_console().print(text, style="yellow", soft_wrap=True)
        self._start_actor()

    def _report_no_ready_actor(self, seconds: float, *, noticed: bool) -> bool:
        """Warn once that no actor is ready; raise RunFailedError after GIVE_UP_AFTER_S."""
        import ray

        free = {key: value for key, value in ray.available_resources().items() if key in ("CPU", "GPU")}
        text = (
            f"no actor is ready after {seconds:.0f} s: the cluster has no room, or the model is still being loaded; "
            f"free: {free}"
        )
        if seconds > GIVE_UP_AFTER_S:
            raise RunFailedError(f"{text}; run the same command again when the cluster has room")
        if not noticed:
            stderr_console().print(f"{text}; waiting", style="yellow", soft_wrap=True)
        return True


def _last_line(error: Exception) -> str:
    """Return the last line of a message of Ray, which gives the reason."""
    return str(error).strip().splitlines()[-1].strip()
