"""How many threads a process computes with."""

import contextlib
import os
import sys
from collections.abc import Iterator


def limit_threads(n_threads: int) -> None:
    """Set every thread pool of this process to `n_threads`, whatever $OMP_NUM_THREADS was where Ray was started."""
    # careful: Polars reads this when it is loaded, and never again
    os.environ["POLARS_MAX_THREADS"] = str(n_threads)
    _limit_others(n_threads)


def _limit_others(n_threads: int) -> None:
    """Set the thread pools that can be changed later, too: all but that of Polars."""
    os.environ["OMP_NUM_THREADS"] = str(n_threads)
    import pyarrow as pa

    pa.set_cpu_count(n_threads)
    # not imported here: it takes 1.7 s, most workers need no torch, and a later import reads OMP_NUM_THREADS
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(n_threads)


@contextlib.contextmanager
def limited_threads(n_threads: int) -> Iterator[None]:
    """Compute with `n_threads` inside the block, as an actor with as many cores does, and as before after it.

    Polars keeps its threads: they can be chosen once in a process, which goes on after the block.
    """
    import pyarrow as pa

    before, n_arrow = os.environ.get("OMP_NUM_THREADS"), pa.cpu_count()
    n_torch = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    _limit_others(n_threads)
    try:
        yield
    finally:
        pa.set_cpu_count(n_arrow)
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
        if "torch" in sys.modules:
            # what a torch that the block has loaded would have begun with
            sys.modules["torch"].set_num_threads(n_torch or int(before or len(os.sched_getaffinity(0))))


@contextlib.contextmanager
def torch_threads(n_threads: int) -> Iterator[None]:
    """Let torch compute with `n_threads` inside the block; the last bits of its results depend on their number."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
