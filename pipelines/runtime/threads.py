"""How many threads a process computes with."""

import contextlib
import os
import sys
from collections.abc import Iterator


def limit_threads(n_threads: int) -> None:
    """Set every thread pool of this process to `n_threads`, whatever $OMP_NUM_THREADS was where Ray was started."""
    # careful: Polars and OpenMP read these when they make their pools, which is before the first computation
    os.environ.update(OMP_NUM_THREADS=str(n_threads), POLARS_MAX_THREADS=str(n_threads))
    import pyarrow as pa

    pa.set_cpu_count(n_threads)
    # not imported here: it takes 1.7 s, most workers need no torch, and a later import reads OMP_NUM_THREADS
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(n_threads)


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
