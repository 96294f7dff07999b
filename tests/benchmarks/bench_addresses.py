"""Bytes and requests that reading data at an address takes, against the bytes of the file.

    python tests/benchmarks/bench_addresses.py [--cells 20000] [--values 500] [--data NAME ...] [--latency-ms 0]

Synthetic cells (20,000 genes) are written as .h5ad without and with compression and as zarr in shards, served by a
server on this machine that counts, and read in blocks of 4,096 cells: by one reader, and by four that have a quarter
each, as actors do. A line of JSON for each: the size of the file, the bytes fetched over that size, requests, and
cells/s with each request delayed by the latency.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anndata
import numpy as np
from scipy import sparse

from feature_store.cells import open_source

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from served_files import ServedFolder, served_folder

if TYPE_CHECKING:
    from collections.abc import Callable

N_GENES, READ_CELLS = 20_000, 4096


def cells(n_cells: int, per_cell: int) -> anndata.AnnData:
    """Counts of 1 to 5 in `per_cell` genes of each cell."""
    rng, band = np.random.default_rng(0), N_GENES // per_cell
    genes = rng.integers(0, band, (n_cells, per_cell)) + band * np.arange(per_cell)
    counts = rng.integers(1, 6, genes.size).astype(np.float32)
    indptr = np.arange(0, genes.size + 1, per_cell)
    made = anndata.AnnData(
        sparse.csr_matrix((counts, genes.ravel().astype(np.int32), indptr), shape=(n_cells, N_GENES))
    )
    made.obs["donor"] = [f"D{i % 12}" for i in range(n_cells)]
    made.obs["age"] = rng.random(n_cells)
    return made


def write_zarr(made: anndata.AnnData, path: Path) -> None:
    """Write zarr 3 in shards."""
    with warnings.catch_warnings(), anndata.settings.override(zarr_write_format=3, auto_shard_zarr_v3=True):
        warnings.simplefilter("ignore")
        made.write_zarr(path)


WRITERS: dict[str, Callable[[anndata.AnnData, Path], None]] = {
    "plain.h5ad": lambda made, path: made.write_h5ad(path),
    "gzip.h5ad": lambda made, path: made.write_h5ad(path, compression="gzip"),
    "sharded.zarr": write_zarr,
}


def measure(served: ServedFolder, name: str, n_readers: int) -> dict[str, object]:
    """Read all cells by a number of readers, one after the other, each from its own beginning."""
    path = served.folder / name
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    served.asked.clear()
    opening, started = 0, time.perf_counter()
    for number in range(n_readers):
        before = served.n_bytes
        with open_source(f"{served.address}/{name}") as source:
            opening += served.n_bytes - before
            n_cells = source.n_cells
            first, last = n_cells * number // n_readers, n_cells * (number + 1) // n_readers
            for start in range(first, last, READ_CELLS):
                source.read_rows(start, min(start + READ_CELLS, last))
    seconds = time.perf_counter() - started
    return {
        "data": name,
        "readers": n_readers,
        "size_mb": round(size / 1e6, 1),
        "fetched_over_size": round(served.n_bytes / size, 2),
        "opening_mb": round(opening / 1e6 / n_readers, 1),
        "requests": len(served.asked),
        "cells_per_s": round(n_cells / seconds),
    }


def main() -> None:
    """Print a line of JSON for each format and number of readers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--values", type=int, default=500)
    parser.add_argument("--latency-ms", type=float, default=0.0)
    parser.add_argument("--data", nargs="+", choices=WRITERS, default=list(WRITERS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, served_folder(Path(folder)) as served:
        made = cells(options.cells, options.values)
        for name in options.data:
            WRITERS[name](made, Path(folder) / name)
        del made
        delay = partial(time.sleep, options.latency_ms / 1000)
        served.before = lambda _path: delay()
        for name in options.data:
            for n_readers in (1, 4):
                print(json.dumps(measure(served, name, n_readers)), flush=True)


if __name__ == "__main__":
    main()
