"""The Ray session of a stage: an existing cluster if an address is given, else a private session on this machine.

A local session starts in about 4 s on 2 cores. Its object store is small, because activations never pass through it.

A session is lost when its head or the raylet of this machine is killed. Ray notices the first after 16 s, and the
second after 60 s, when it ends the process. Code that waits for Ray therefore calls `Session.raise_if_lost`, which
tries to connect to both ports and takes less than a millisecond.
"""

import contextlib
import contextvars
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.errors import RunFailedError, UsageError
from pipelines.runtime import idle_actors
from pipelines.runtime.progress import activity
from pipelines.runtime.stage import Clock

OBJECT_STORE_BYTES = 100_000_000
HEAD_SILENCE_S = 40.0
"""Seconds for which the head of a cluster may not answer: a fault-tolerant head comes back. Ray ends the process after
60 s."""
CONNECT_TIMEOUT_S = 2.0
_SESSION_IS_SHARED: contextvars.ContextVar[bool] = contextvars.ContextVar("kept", default=False)
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class Session:
    """The health of the Ray session that this process is connected to."""

    def __init__(self) -> None:
        import ray

        self._ports: dict[str, tuple[str, int]] = {}
        self._silent: dict[str, Clock] = {}
        # careful: a Ray client (ray://) sees neither port; there a lost connection raises by itself
        if not ray.util.client.ray.is_connected():
            context = ray.get_runtime_context()
            own = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
            host, _, port = context.gcs_address.rpartition(":")
            self._ports["raylet"] = own["NodeManagerAddress"], own["NodeManagerPort"]
            self._ports["head"] = host.strip("[]"), int(port)

    def raise_if_lost(self) -> None:
        """Raise RunFailedError if the raylet or the head does not answer.

        A refused connection on this machine raises at once, any other silence after HEAD_SILENCE_S.
        """
        for name, address in self._ports.items():
            trouble = _connection_error(address)
            if trouble is None:
                self._silent.pop(name, None)
                continue
            silent = self._silent.setdefault(name, Clock())
            is_here = address[0] == self._ports["raylet"][0]
            if silent.seconds > HEAD_SILENCE_S or (is_here and isinstance(trouble, ConnectionRefusedError)):
                raise RunFailedError(
                    f"the Ray session was lost: its {name} at {address[0]}:{address[1]} does not answer ({trouble}); "
                    "what is committed stays, run the same command again to resume"
                )


def _connection_error(address: tuple[str, int]) -> Exception | None:
    """Return why a connection fails, None if it succeeds. The kernel accepts it even if the process is busy."""
    try:
        with socket.create_connection(address, timeout=CONNECT_TIMEOUT_S):
            return None
    except (OSError, OverflowError, UnicodeError) as error:
        # a port above 65,535, or a host that is no name
        return error


@contextlib.contextmanager
def ray_session(*, address: str | None = None, num_cpus: int | None = None) -> Iterator[Session]:
    """Connect to `address` (or $RAY_ADDRESS), else start Ray on this machine with `num_cpus` cores (default: all).

    A session that is already open is used and stays open. A session opened here is shut down at the end of the block,
    or at the end of an enclosing `one_ray_session`.

    Raises:
        UsageError: no cluster answers at the address.
        RunFailedError: Ray did not start on this machine.
    """
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    import ray

    if ray.is_initialized():
        with _sigterm_interrupts():
            yield Session()
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    known = address or os.environ.get("RAY_ADDRESS")
    with activity("ray", f"connects to the cluster at {known}" if known else "starts on this machine"):
        _connect(known, num_cpus)
    try:
        with _sigterm_interrupts():
            yield Session()
    finally:
        if not session_is_shared():
            ray.shutdown(wait_for_processes=True)


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Make SIGTERM (of Slurm, Kubernetes, or a stopped Ray job) act like Ctrl-C. Ray's own handler aborts instead."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def check_address(address: str | None) -> None:
    """Raise UsageError if nothing listens at `address` (or $RAY_ADDRESS), within CONNECT_TIMEOUT_S.

    Ray itself waits for minutes for an address that does not answer.
    """
    known = address or os.environ.get("RAY_ADDRESS")
    is_open = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    if is_open or not known or known in ("local", "auto"):
        return
    scheme, _, place = known.rpartition("://")
    if scheme not in ("", "ray"):
        if scheme in ("http", "https"):
            raise UsageError(
                f"--address (or RAY_ADDRESS) was {known!r}, the address of a dashboard, which `scsae submit` takes; "
                "give HOST:6379 or ray://HOST:10001"
            )
        return
    host, _, port = place.partition("/")[0].rpartition(":")
    if not host or not port.isdecimal():
        raise UsageError(f"--address (or RAY_ADDRESS) was {known!r}; give HOST:6379 or ray://HOST:10001")
    if trouble := _connection_error((host.strip("[]"), int(port))):
        raise UsageError(_no_cluster(known, trouble))


def _no_cluster(known: str, error: Exception) -> str:
    why = next(iter(str(error).splitlines()), "") or type(error).__name__
    return (
        f"no Ray cluster answers at {known} ({why}); give --address of one that runs, e.g. ray://HEAD:10001, or leave "
        "it out (and unset RAY_ADDRESS) to use this machine"
    )


def _connect(known: str | None, num_cpus: int | None) -> None:
    """Connect to the cluster at `known`, or start a session on this machine."""
    import ray

    check_address(known)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    # careful: without "local", Ray joins any head that was started on this machine with `ray start`
    local = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES, "num_cpus": num_cpus}
    try:
        ray.init(address=known or "local", **({} if known else local), **quiet)
    except Exception as error:  # a raylet that does not come up is a bare Exception
        if known:
            raise UsageError(_no_cluster(known, error)) from error
        raise RunFailedError(f"Ray did not start on this machine ({error}); run the same command again") from error


def session_is_shared() -> bool:
    """Whether an `one_ray_session` encloses the caller, so that the session outlives this stage."""
    return _SESSION_IS_SHARED.get()


@contextlib.contextmanager
def one_ray_session() -> Iterator[None]:
    """Share one Ray session among all stages inside the block: the first starts Ray, the end of the block stops it.

    Ray is not started if no stage has anything to compute. The actors of a stage serve the next one.
    """
    before = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    token = _SESSION_IS_SHARED.set(True)
    try:
        yield
    finally:
        _SESSION_IS_SHARED.reset(token)
        is_ours = "ray" in sys.modules and not before
        if is_ours or not session_is_shared():
            idle_actors.forget()
        if is_ours:
            sys.modules["ray"].shutdown(wait_for_processes=True)


def actors_that_fit(wanted: int | None, *, num_cpus: int, num_gpus: float, n_tasks: int) -> int:
    """Return the number of actors to start: `wanted`, else as many as fit on the nodes; never more than tasks.

    Actors are counted node by node, because an actor cannot span two nodes. If more are wanted than fit, the others
    start when there is room, and the work does not wait for them.

    Raises:
        UsageError: no node has room for one actor; the message gives the resources of the nodes.
    """
    import ray

    if num_gpus > 1 and num_gpus % 1:
        raise UsageError(f"--num-gpus was {num_gpus:g}; give a whole number, or a share of one GPU such as 0.5")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(min(_times(node, "CPU", num_cpus), _times(node, "GPU", num_gpus)) for node in nodes)
    if room < 1:
        have = "; ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise UsageError(
            f"no node of the Ray cluster has {num_cpus} CPUs and {num_gpus:g} GPUs for an actor (--num-cpus, "
            f"--num-gpus); its nodes have: {have}"
        )
    return min(wanted or room, n_tasks)


def _times(node: Mapping[str, float], resource: str, share: float) -> int:
    """Return how many times `share` of a resource fits on a node; a share of a GPU never spans two GPUs."""
    if share == 0:
        return sys.maxsize
    slack = 1e-9  # for rounding: 1 // .1 is 9
    have = node.get(resource, 0.0)
    return int(have) * int(1 / share + slack) if share < 1 else int(have / share + slack)
