"""Every shard is computed; an actor has two shards at most; a dead actor costs only the shards that it had."""

import os
import signal
import sys
import time
from collections import Counter

import pytest
import ray.cloudpickle

from feature_store.storage import filesystem
from pipelines.config import ActorOptions
from pipelines.errors import RunFailedError, UsageError
from pipelines.runtime import actor_pool, idle_actors
from pipelines.runtime.actor_pool import LOSSES_IN_A_ROW, SHARDS_PER_ACTOR, ActorPool, ShardActor, do_shards
from pipelines.runtime.cluster import one_ray_session

# actors cannot import it by its name: some packages install a `tests` of their own
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Worker:
    """Writes a file an attempt; dies on `deadly` shards, once or always, as soon as the files `seen` are there; waits
    until `n_together` are begun.
    """

    def __init__(self, folder, deadly=(), always=False, n_together=0, seen=()):
        self.folder, self.deadly, self.always, self.n_together = folder, deadly, always, n_together
        self.seen = seen

    def ready(self):
        pass

    def shard(self, number):
        (self.folder / f"{number}-{time.monotonic_ns()}").touch()
        if number in self.deadly and (self.always or len(list(self.folder.glob(f"{number}-*"))) == 1):
            wait_until(lambda: all(file.exists() for file in self.seen), "the results before were not seen")
            os.kill(os.getpid(), signal.SIGKILL)
        wait_until(lambda: len(list(self.folder.iterdir())) >= self.n_together, "the other shards were not begun")
        return number * 10


def wait_until(is_so, what):
    deadline = time.monotonic() + 240
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


class Watched:
    """An actor's handle that notes the most shards it had in flight at once, and which it was given."""

    def __init__(self, actor):
        self.actor, self.ready, self.shard, self.given, self.most = actor, actor.ready, self, [], 0

    def remote(self, number):
        import ray

        self.given.append((number, self.actor.shard.remote(number)))
        open_refs = [ref for _, ref in self.given]
        self.most = max(self.most, len(ray.wait(open_refs, num_returns=len(open_refs), timeout=0)[1]))
        return self.given[-1][1]


def starter(*arguments, num_cpus=1):
    import ray

    return lambda: ray.remote(Worker).options(num_cpus=num_cpus, max_restarts=0).remote(*arguments)


def run(start, n_shards, n_actors):
    return sorted(ActorPool(start, n_actors, range(n_shards), check_session=lambda: None).results())


def attempts(folder):
    """How often each shard was begun."""
    return Counter(int(path.name.partition("-")[0]) for path in folder.iterdir())


def test_every_shard_is_done_once_and_reported_with_its_result(ray_local, tmp_path):
    assert run(starter(tmp_path), n_shards=7, n_actors=2) == [(i, i * 10) for i in range(7)]
    assert attempts(tmp_path) == Counter(range(7))


def test_no_shard_is_no_work(ray_local, tmp_path):
    assert run(starter(tmp_path), n_shards=0, n_actors=1) == []


def test_an_actor_has_two_shards_in_flight_and_never_more(ray_local, tmp_path):
    start, watched = starter(tmp_path), []
    run(lambda: watched.append(Watched(start())) or watched[-1], n_shards=30, n_actors=2)
    assert max(actor.most for actor in watched) == SHARDS_PER_ACTOR
    assert sum(len(actor.given) for actor in watched) == 30


@pytest.mark.slow
def test_few_shards_are_spread_over_the_actors(ray_local, tmp_path):
    # one actor that held both would wait for the second in vain
    assert run(starter(tmp_path, (), False, 2), n_shards=2, n_actors=2) == [(0, 0), (1, 10)]


def test_a_killed_actor_is_replaced_and_only_what_it_had_is_done_again(ray_local, tmp_path):
    assert run(starter(tmp_path, {3}), n_shards=12, n_actors=2) == [(i, i * 10) for i in range(12)]
    again = {shard: n for shard, n in attempts(tmp_path).items() if n > 1}
    # the result of the shard before may not have reached the driver yet
    assert 3 in again
    assert sum(n - 1 for n in again.values()) <= SHARDS_PER_ACTOR


@pytest.mark.slow
def test_shards_of_a_lost_actor_go_to_who_is_free_when_there_is_no_room_for_another(ray_local, tmp_path):
    starts = iter([starter(tmp_path, {0}), starter(tmp_path), starter(tmp_path, num_cpus=64)])
    assert run(lambda: next(starts)(), n_shards=6, n_actors=2) == [(i, i * 10) for i in range(6)]


@pytest.mark.slow
def test_a_shard_that_kills_every_actor_ends_the_run_by_name(ray_local, tmp_path):
    # the driver has seen the results before: one that a death took with it would end a row when it comes
    folder, files = tmp_path / "attempts", [tmp_path / "0", tmp_path / "1"]
    folder.mkdir()
    pool, seen = ActorPool(starter(folder, {2}, True, 0, files), 1, range(5), check_session=lambda: None), []

    def see_all():
        for number, result in pool.results():
            seen.append((number, result))
            (tmp_path / str(number)).touch()

    with pytest.raises(RunFailedError, match=f"^{LOSSES_IN_A_ROW} .*shard 2.*run the same command"):
        see_all()
    assert sorted(seen) == [(i, i * 10) for i in (0, 1)]
    assert attempts(folder)[2] == LOSSES_IN_A_ROW


def test_a_run_for_which_no_actor_starts_says_so_and_ends(ray_local, tmp_path, monkeypatch, capsys):
    for name, seconds in (("CHECK_INTERVAL_S", 0.1), ("NOTICE_AFTER_S", 0.3), ("GIVE_UP_AFTER_S", 1.0)):
        monkeypatch.setattr(actor_pool, name, seconds)
    # careful: nothing is free while the actors of the test before are ending
    with pytest.raises(RunFailedError, match=r"free: \{.*run the same command again"):
        run(starter(tmp_path, num_cpus=64), n_shards=1, n_actors=1)
    assert capsys.readouterr().err.count("waiting") == 1


def test_a_lost_session_is_noticed_while_actors_are_silent(ray_local, tmp_path, monkeypatch):
    monkeypatch.setattr(actor_pool, "CHECK_INTERVAL_S", 0.1)

    def check_session():
        raise RunFailedError("the session was lost")

    with pytest.raises(RunFailedError, match="lost"):
        list(ActorPool(starter(tmp_path, num_cpus=64), 1, [0], check_session=check_session).results())


class Instant:
    """A handle of an actor without Ray, whose calls return what they would compute."""

    def __init__(self):
        self.ready = self.shard = self

    def remote(self, *arguments):
        return (self, arguments)


def bytecodes_of(n_actors, n_shards, monkeypatch):
    """How many bytecodes of the pool are executed for a run in which the actors are ready and done at once."""
    import ray

    count, turn = 0, 0

    def one_done(refs, **_):
        nonlocal turn
        # another actor's shard each time, so that the actors take turns as they do in a run
        turn += 1
        return [refs[turn * 7 % len(refs)]], []

    def trace(frame, event, _):
        nonlocal count
        if frame.f_code.co_filename != actor_pool.__file__:
            return None
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    monkeypatch.setattr(ray, "wait", one_done)
    monkeypatch.setattr(ray, "get", lambda ref: ref[1])
    pool, before = ActorPool(Instant, n_actors, range(n_shards), check_session=lambda: None), sys.gettrace()
    sys.settrace(trace)
    try:
        done = sorted(number for number, _ in pool.results())
    finally:
        sys.settrace(before)
    assert done == list(range(n_shards))
    return count


def test_the_work_of_the_driver_for_a_shard_does_not_grow_with_the_actors(monkeypatch):
    def a_shard(n_actors):
        more, less = (bytecodes_of(n_actors, n_shards, monkeypatch) for n_shards in (1200, 600))
        return (more - less) / 600

    assert a_shard(100) < 1.1 * a_shard(10)


def test_an_error_of_a_shard_reaches_the_driver(ray_local, tmp_path):
    with pytest.raises(FileNotFoundError, match="missing") as caught:
        run(starter(tmp_path / "missing"), n_shards=1, n_actors=1)
    assert type(caught.value) is FileNotFoundError
    (note,) = caught.value.__notes__
    assert "in shard" in note, "the traceback of the actor is kept"
    assert "\x1b" not in note


class Refusing:
    """A worker that cannot be made."""

    def __init__(self, work):
        raise UsageError(f"no {work}")


class Threads:
    """A worker that counts its threads."""

    def __init__(self, work):
        self.work = work

    def shard(self, number):
        import polars as pl
        import pyarrow as pa
        import torch

        return {"torch": torch.get_num_threads(), "polars": pl.thread_pool_size(), "pyarrow": pa.cpu_count()}


def test_an_error_raised_on_purpose_in_making_a_worker_keeps_its_class(ray_local):
    before = filesystem.n_writes()
    with pytest.raises(UsageError) as caught:
        do_shards(Refusing, "checkpoint", [0], ActorOptions(), title="test", note=lambda *_: "")
    assert type(caught.value) is UsageError
    assert str(caught.value) == "no checkpoint"
    assert filesystem.n_writes() > before, "its exit code is not that of a command that wrote nothing"


class Process:
    """A worker that tells its process; a shard below zero fails."""

    def __init__(self, folder):
        self.folder = folder

    def shard(self, number):
        if number < 0:
            raise UsageError("a shard failed")
        (self.folder / str(os.getpid())).touch()
        return {"shards": 1}


def processes_of(folder, *, num_cpus=1, num_actors=1):
    """The processes in which three shards are computed."""
    folder.mkdir()
    options = ActorOptions(num_actors=num_actors, num_cpus=num_cpus)
    assert do_shards(Process, folder, range(3), options, title="test", note=lambda *_: "") == {"shards": 3}
    return {int(path.name) for path in folder.iterdir()}


def test_inside_one_session_actors_serve_the_stages_one_after_the_other(ray_local, tmp_path):
    with one_ray_session():
        (first,), (second,) = (processes_of(tmp_path / name) for name in "ab")
        assert first == second
        wider = processes_of(tmp_path / "c", num_cpus=2)
        assert first not in wider, "an actor of other resources waits for none"
        again = processes_of(tmp_path / "d")
        assert first not in again, "it was ended, because it held the cores"
        os.kill(next(iter(again)), signal.SIGKILL)
        assert not again & processes_of(tmp_path / "e"), "one that died while it waited is replaced"
        with pytest.raises(UsageError, match="a shard failed"):
            do_shards(Process, tmp_path, [-1], ActorOptions(num_actors=1), title="test", note=lambda *_: "")
        assert not idle_actors._waiting, "those of a stage that failed are not kept"
    assert not idle_actors._waiting
    apart = [processes_of(tmp_path / name) for name in "fg"]
    assert not apart[0] & apart[1], "outside, each stage has its own"


def test_without_actors_shards_are_computed_in_this_process_with_the_threads_of_an_actor(tmp_path):
    import pyarrow as pa
    import torch

    before = torch.get_num_threads(), pa.cpu_count(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(2)
    try:
        assert processes_of(tmp_path / "a", num_actors=0) == {os.getpid()}
        options = ActorOptions(num_actors=0, num_cpus=3)
        total = do_shards(Threads, None, [0], options, title="test", note=lambda *_: "")
        assert (total["torch"], total["pyarrow"]) == (3, 3)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before[0])
    assert (pa.cpu_count(), os.environ.get("OMP_NUM_THREADS")) == before[1:]
    with pytest.raises(UsageError, match=r"--num-actors was 0.*one of them"):
        do_shards(Threads, None, [0], options, title="test", note=lambda *_: "", address="ray://head:10001")


def test_an_actor_that_waits_holds_nothing_of_its_last_work(monkeypatch):
    # the threads here are those of all tests
    monkeypatch.setattr(actor_pool, "limit_threads", lambda _: None)
    actor = ShardActor(1)
    actor.ready(Process, None)
    actor.rest()
    assert actor._body is None


# a machine of two cores has two threads anyway
@pytest.mark.parametrize("n_cpus", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_actor_computes_with_as_many_threads_as_it_has_cores(ray_local, n_cpus):
    import polars as pl

    # the process has loaded Polars with the work before it can limit its threads, as that of every stage
    total = do_shards(Threads, pl.Int64, [0], ActorOptions(num_cpus=n_cpus), title="test", note=lambda *_: "")
    assert total == {"torch": n_cpus, "polars": n_cpus, "pyarrow": n_cpus}


def test_an_actor_that_fits_nowhere_is_refused(ray_local):
    with pytest.raises(UsageError, match=r"1 GPUs.*--num-gpus"):
        do_shards(ShardActor, None, [0], ActorOptions(num_gpus=1), title="test", note=lambda *_: "")
