"""A Ray session: an existing cluster where one is named, else a quiet, private one on this machine.

A local session starts in about 4 s on 2 cores. Its object store is small on purpose: activations never pass through it.

A session can be lost: its head or this machine's raylet was killed. Ray notices after 16 s and 60 s, and in the second
case ends the process. So whoever waits asks `Session.raise_if_lost`, which knocks at both ports (under a millisecond).
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
from pipelines.runtime.stage import Clock

OBJECT_STORE_BYTES = 100_000_000
PATIENCE_S = 40.0
"""How long the head of a cluster may be silent (a fault-tolerant one comes back); Ray ends the process after 60."""
KNOCK_S = 2.0
_KEPT: contextvars.ContextVar[bool] = contextvars.ContextVar("kept", default=False)
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class Session:
    """The Ray session that this process is connected to, as far as its health goes."""

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
        """Raise RunFailedError if the raylet or the head is gone: at once if nobody listens on this machine."""
        for name, address in self._ports.items():
            trouble = _knock(address)
            if trouble is None:
                self._silent.pop(name, None)
                continue
            silent = self._silent.setdefault(name, Clock())
            is_here = address[0] == self._ports["raylet"][0]
            if silent.seconds > PATIENCE_S or (is_here and isinstance(trouble, ConnectionRefusedError)):
                raise RunFailedError(
                    f"the Ray session was lost: its {name} at {address[0]}:{address[1]} does not answer ({trouble}); "
                    "what is committed stays, run the same command again to resume"
                )


def _knock(address: tuple[str, int]) -> OSError | None:
    """Why nobody took a connection there; the kernel takes it, so however busy the process is."""
    try:
        with socket.create_connection(address, timeout=KNOCK_S):
            return None
    except OSError as error:
        return error


@contextlib.contextmanager
def ray_session(*, address: str | None = None, num_cpus: int | None = None) -> Iterator[Session]:
    """Connect to `address` (or $RAY_ADDRESS), else start Ray here with `num_cpus` cores (default: all).

    A session that is already open is used and left open; one opened here is shut down on the way out, unless it is
    opened inside `one_ray_session`.

    Raises:
        UsageError: no cluster answers at the address.
        RunFailedError: Ray did not start here.
    """
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    import ray

    if ray.is_initialized():
        with _sigterm_interrupts():
            yield Session()
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    _connect(address or os.environ.get("RAY_ADDRESS"), num_cpus)
    try:
        with _sigterm_interrupts():
            yield Session()
    finally:
        if not _KEPT.get():
            ray.shutdown(wait_for_processes=True)


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM (Slurm, Kubernetes, a Ray job that is stopped) do what Ctrl-C does; Ray's own handler aborts."""
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


def _connect(known: str | None, num_cpus: int | None) -> None:
    """Join the cluster at `known`, else start one here."""
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    # careful: without "local", Ray joins any head that was started on this machine with `ray start`
    local = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES, "num_cpus": num_cpus}
    try:
        ray.init(address=known or "local", **({} if known else local), **quiet)
    except Exception as error:  # a raylet that does not come up is a bare Exception
        if known:
            raise UsageError(
                f"no Ray cluster answers at {known} ({error}); give --address of one that runs, e.g. "
                "ray://HEAD:10001, or leave it out to use this machine"
            ) from error
        raise RunFailedError(f"Ray did not start on this machine ({error}); run the same command again") from error


@contextlib.contextmanager
def one_ray_session() -> Iterator[None]:
    """Make all sessions opened inside the block one: the first starts Ray, the end of the block stops it.

    Ray is not started at all if no stage has anything to do.
    """
    before = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    token = _KEPT.set(True)
    try:
        yield
    finally:
        _KEPT.reset(token)
        if "ray" in sys.modules and not before:
            sys.modules["ray"].shutdown(wait_for_processes=True)


def actors_that_fit(wanted: int | None, *, num_cpus: int, num_gpus: float, n_tasks: int) -> int:
    """Return how many actors to start: `wanted`, else all that the nodes have room for; never more than tasks.

    Counted node by node, since an actor cannot lie across two. More than fit may be wanted: those start when there is
    room, and the work does not wait for them.

    Raises:
        UsageError: not one fits on any node; the message says what the nodes have.
    """
    import ray

    if num_gpus > 1 and num_gpus % 1:
        raise UsageError(f"--num-gpus was {num_gpus:g}; give a whole number, or a share of one GPU such as 0.5")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(min(_times(node, "CPU", num_cpus), _times(node, "GPU", num_gpus)) for node in nodes)
    if room < 1:
        have = "; ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise UsageError(
            f"an actor was to get {num_cpus} CPUs and {num_gpus:g} GPUs (--num-cpus, --num-gpus), which no node of "
            f"the Ray cluster has; its nodes have: {have}"
        )
    return min(wanted or room, n_tasks)


def _times(node: Mapping[str, float], resource: str, share: float) -> int:
    """How often `share` of a resource fits on a node; a share of one GPU never spans two."""
    if share == 0:
        return sys.maxsize
    slack = 1e-9  # of floats: 1 // .1 is 9
    have = node.get(resource, 0.0)
    return int(have) * int(1 / share + slack) if share < 1 else int(have / share + slack)
