"""A Ray session: an existing cluster where one is named, else a quiet, private one on this machine.

A local session starts in about 4 s on 2 cores. Its object store is small on purpose: activations never pass through it.
"""

import contextlib
import contextvars
import logging
import os
import sys
from collections.abc import Iterator

OBJECT_STORE_BYTES = 100_000_000
_KEPT: contextvars.ContextVar[bool] = contextvars.ContextVar("kept", default=False)
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


@contextlib.contextmanager
def ray_session(*, address: str | None = None, num_cpus: int | None = None) -> Iterator[None]:
    """Connect to `address` (or $RAY_ADDRESS), else start Ray here with `num_cpus` cores (default: all).

    A session that is already open is used and left open; one opened here is shut down on the way out, unless it is
    opened inside `one_ray_session`.
    """
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    import ray

    if ray.is_initialized():
        yield
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    known = address or os.environ.get("RAY_ADDRESS")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    if known:
        ray.init(address=known, **quiet)
    else:
        # careful: without "local", Ray joins any head that was started on this machine with `ray start`
        local = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        ray.init(address="local", num_cpus=num_cpus, **local, **quiet)
    try:
        yield
    finally:
        if not _KEPT.get():
            ray.shutdown()


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
            sys.modules["ray"].shutdown()


def actors_that_fit(wanted: int | None, *, num_cpus: int, num_gpus: float, n_tasks: int) -> int:
    """Return how many actors to start: `wanted`, else all that fit; never more than tasks, at least 1."""
    import ray

    resources = ray.cluster_resources()
    room = int(resources.get("CPU", 1) // num_cpus)
    if num_gpus > 0:
        room = min(room, int(resources.get("GPU", 0) // num_gpus))
    return max(1, min(wanted or room, n_tasks))
