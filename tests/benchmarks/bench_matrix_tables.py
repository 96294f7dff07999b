"""Time, CPU time and peak memory of the pass over a matrix that makes the gene table and the digests.

    python tests/benchmarks/bench_matrix_tables.py [--cells 1000000] [--per-cell 60] [--actors 0 1 2] [--folder DIR]

The file is that of `bench_ingest.py`, a synthetic .h5ad of 2,000 genes. Each number of actors is measured in a process
of its own; 0 is the pass in the process itself. A line of JSON for each.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_ingest import N_GENES, write_file

from feature_store.cells import Source, open_source
from feature_store.cells.gene_table import matrix_tables
from feature_store.storage.layout import Layout
from pipelines import matrix_tables as stage
from pipelines.config import ActorOptions
from pipelines.runtime.actor_pool import do_shards

if TYPE_CHECKING:
    from collections.abc import Mapping


class MeasuredReader(stage.MatrixReader):
    """A reader that counts the CPU microseconds of its process and the bytes of its peak."""

    cpu_us = peak = 0

    def shard(self, number: int) -> dict[str, int]:
        """See MatrixReader. Counts are added up, so each call gives what came since the last."""
        counts = super().shard(number)
        before = self.cpu_us, self.peak
        self.cpu_us, self.peak = time.process_time_ns() // 1000, _peak_bytes()
        return counts | {"cpu_us": self.cpu_us - before[0], f"peak {os.getpid()}": self.peak - before[1]}


def measure_tables(path: Path, n_actors: int) -> dict[str, float]:
    """Make the gene table and the digests of a file; seconds, CPU seconds and peak memory of driver and actors."""
    os.environ.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory() as folder, open_source(path) as source:
        # careful: the digest of the file is no part of the measurement
        assert source.digest
        started, cpu = time.perf_counter(), time.process_time()
        if n_actors == 0:
            height, total = matrix_tables(source).genes.height, {}
        else:
            height, total = _by_actors(source, Layout(folder), n_actors)
        assert height == N_GENES
        seconds, own_cpu = time.perf_counter() - started, time.process_time() - cpu
    peaks = [n / 1e6 for name, n in total.items() if name.startswith("peak")]
    return {
        "actors": n_actors,
        "cells": source.n_cells,
        "seconds": round(seconds, 1),
        "driver_cpu_s": round(own_cpu, 1),
        "driver_peak_mb": round(_peak_bytes() / 1e6),
        "actor_cpu_s": round(total.get("cpu_us", 0) / 1e6, 1),
        "actor_peak_mb": round(max(peaks, default=0)),
    }


def _by_actors(source: Source, layout: Layout, n_actors: int) -> tuple[int, Mapping[str, int]]:
    totals: list[Mapping[str, int]] = []

    def measured(_reader: type, *arguments: Any, **options: Any) -> Mapping[str, int]:
        totals.append(do_shards(MeasuredReader, *arguments, **options))
        return totals[-1]

    stage.do_shards = measured
    with stage.tables_by_actors(layout, source, ActorOptions(num_actors=n_actors)) as make:
        return make(source).genes.height, totals[-1]


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Measure every number of actors in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--per-cell", type=int, default=60, help="values of a cell")
    parser.add_argument("--actors", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=None, help="where the file is written (default: a temporary)")
    parser.add_argument("--measure", type=Path, default=None, help="only measure this file, in this process")
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure_tables(options.measure, options.actors[0])))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "cells.h5ad"
        write_file(path, options.cells, per_cell=options.per_cell)
        for n_actors in options.actors:
            subprocess.run([sys.executable, __file__, "--measure", path, "--actors", str(n_actors)], check=True)


if __name__ == "__main__":
    main()
