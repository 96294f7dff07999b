"""Share of a training step that is compute, with activations streamed from Parquet: does the reader keep up?

    python tests/benchmarks/bench_stream.py [--threads 2] [--shape 4096 512 4096 32] [--groups 64] [--cold]

Random activations are written once (f16, row groups of 8192, shards of 8 groups) and streamed as `scsae train` does it,
half of the cells left out. A step is waiting for the batch, then the trainer's step; the first buffer, which nothing
can hide, is shown apart. `cold` drops the files from the page cache before the clock starts. CPU seconds of the reading
alone tell what it takes from the step where there is no core to spare.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from feature_store.activations import ROW_GROUP_ROWS, ActivationReader, ActivationWriter, TokenStream
from feature_store.storage import commit
from sae_core.sae import Normaliser, SAEConfig, TrainConfig, Trainer

if TYPE_CHECKING:
    from collections.abc import Iterator

TOKENS_PER_CELL = 64
GROUPS_PER_SHARD = 8


def write_run(folder: Path, d_model: int, n_groups: int) -> commit.Run:
    """A run of random activations that vary in a few directions more than in others."""
    n_shards = -(-n_groups // GROUPS_PER_SHARD)
    run = commit.Run.create(folder, {"n_shards": n_shards})
    metadata = {"dtype": "f16", "site": "layer.0", "plan_sha": run.plan_sha}
    n, spread = GROUPS_PER_SHARD * ROW_GROUP_ROWS, 1 / np.sqrt(np.arange(1, d_model + 1, dtype=np.float32))
    for shard in range(n_shards):
        act = np.random.default_rng(shard).standard_normal((n, d_model), dtype=np.float32) * spread
        token = np.arange(n)
        keys = (token // TOKENS_PER_CELL + shard * n // TOKENS_PER_CELL, token % TOKENS_PER_CELL, token % 1000)

        def write(path: Path, keys: tuple[np.ndarray, ...] = keys, act: np.ndarray = act) -> int:
            with ActivationWriter(path, d_model, metadata) as writer:
                writer.write(*keys, act)
            return writer.n_tokens

        run.commit_shard(shard, write, start=shard, stop=shard + 1)
    run.finalize()
    return run


def drop_cache(run: commit.Run) -> None:
    """Let the kernel forget the files' pages."""
    os.sync()
    for part in run.parts():
        with part.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def open_stream(run: commit.Run, batch_tokens: int) -> TokenStream:
    """The stream of a training on every other cell."""
    n_cells = run.n_shards * GROUPS_PER_SHARD * ROW_GROUP_ROWS // TOKENS_PER_CELL
    return TokenStream(ActivationReader(run), keep_cells=np.arange(n_cells) % 2 == 0, batch_tokens=batch_tokens)


def timed(batches: Iterator[np.ndarray], trainer: Trainer, n_steps: int) -> tuple[float, float]:
    """Seconds waited for batches and seconds computed, over `n_steps` steps."""
    waited = computed = 0.0
    for _ in range(n_steps):
        start = time.perf_counter()
        x = torch.from_numpy(next(batches))
        ready = time.perf_counter()
        trainer.step(x)
        waited += ready - start
        computed += time.perf_counter() - ready
    return waited, computed


def main() -> None:
    """Write, stream, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", type=int, nargs=4, default=(4096, 512, 4096, 32), metavar=("B", "d", "F", "k"))
    parser.add_argument("--groups", type=int, default=64, help="row groups of 8192 tokens; 16 fill a buffer")
    parser.add_argument("--cold", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    n_tokens, d_model, n_features, k = args.shape
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder) / "run", d_model, args.groups)
        stream = open_stream(run, n_tokens)
        n_steps = stream.n_tokens // n_tokens - 1
        first = torch.from_numpy(next(iter(open_stream(run, n_tokens))))
        config = SAEConfig(d_model=d_model, n_features=n_features, k=k)
        trainer = Trainer(config, TrainConfig(n_steps=10**6, batch_size=n_tokens), Normaliser.fit([first]))
        if args.cold:
            drop_cache(run)
        batches = iter(stream)
        start = time.perf_counter()
        trainer.step(torch.from_numpy(next(batches)))
        print(f"B {n_tokens} d {d_model} F {n_features} k {k}, {args.threads} threads, {n_steps} steps")
        print(f"first batch and step  {time.perf_counter() - start:8.2f} s")
        waited, computed = timed(batches, trainer, n_steps)
        batches.close()  # type: ignore[attr-defined]
        print(f"waiting a step        {1000 * waited / n_steps:8.2f} ms")
        print(f"computing a step      {1000 * computed / n_steps:8.2f} ms")
        print(f"share of compute      {100 * computed / (waited + computed):8.1f} %")
        alone, cpu = iter(open_stream(run, n_tokens)), time.process_time()
        for _ in range(n_steps):
            next(alone)
        print(f"reading alone, CPU    {1000 * (time.process_time() - cpu) / n_steps:8.2f} ms a step")


if __name__ == "__main__":
    main()
