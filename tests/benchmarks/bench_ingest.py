"""Peak memory and CPU time of opening a data set and writing its cells, at several numbers of cells.

    python tests/benchmarks/bench_ingest.py [--cells 10000 1000000] [--folder DIR]

Each size is a synthetic .h5ad of 2,000 genes with 20 values a cell, unique cell names and five obs columns, written in
blocks (1 M cells: 150 MB, some seconds) and deleted afterwards, and is read by a process of its own. A line of JSON for
each size.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from feature_store.cells import open_source, write_cells
from feature_store.storage.layout import Layout

N_GENES, BLOCK_CELLS = 2000, 50_000
CATEGORIES = {"donor": 40, "batch": 8, "cell_type": 30}
STRINGS = h5py.string_dtype()


def write_file(path: Path, n_cells: int, *, per_cell: int = 20, seed: int = 0) -> None:
    """Write a synthetic .h5ad of `n_cells` cells with `per_cell` values each."""
    rng = np.random.default_rng(seed)
    with h5py.File(path, "w") as file:
        _mark(file, "anndata", "0.1.0")
        x = _mark(file.create_group("X"), "csr_matrix", "0.1.0")
        x.attrs["shape"] = np.array([n_cells, N_GENES])
        values = {
            name: x.create_dataset(name, (n_cells * per_cell,), dtype, chunks=True, compression="lzf")
            for name, dtype in (("data", "f4"), ("indices", "i4"))
        }
        x["indptr"] = np.arange(0, n_cells * per_cell + 1, per_cell)
        _frame(file, "var", np.array([f"GENE{i}" for i in range(N_GENES)]))
        obs = _frame(file, "obs", n_cells, columns=[*CATEGORIES, "n_counts", "is_doublet"])
        codes = {name: _categories(obs, name, n, n_cells) for name, n in CATEGORIES.items()}
        plain = {name: _mark(obs.create_dataset(name, (n_cells,), dtype), "array", "0.2.0")
                 for name, dtype in (("n_counts", "f8"), ("is_doublet", "?"))}  # fmt: skip
        for start in range(0, n_cells, BLOCK_CELLS):
            stop = min(start + BLOCK_CELLS, n_cells)
            own, shape = slice(start * per_cell, stop * per_cell), (stop - start, per_cell)
            band = N_GENES // per_cell
            columns = rng.integers(0, band, shape) + band * np.arange(per_cell)
            values["indices"][own], values["data"][own] = columns.ravel(), rng.integers(1, 6, columns.size)
            obs["_index"][start:stop] = [f"cell-{i:08d}-AAACCTGA" for i in range(start, stop)]
            for name, n in CATEGORIES.items():
                codes[name][start:stop] = rng.integers(0, n, stop - start)
            plain["n_counts"][start:stop] = rng.random(stop - start)
            plain["is_doublet"][start:stop] = rng.random(stop - start) < 0.1


def _mark(node: Any, encoding: str, version: str) -> Any:
    node.attrs.update({"encoding-type": encoding, "encoding-version": version})
    return node


def _frame(file: Any, name: str, index: Any, columns: list[str] | None = None) -> Any:
    frame = _mark(file.create_group(name), "dataframe", "0.2.0")
    frame.attrs["_index"] = "_index"
    frame.attrs["column-order"] = np.array(columns or [], dtype=STRINGS)
    shape = (index,) if isinstance(index, int) else index.shape
    names = frame.create_dataset("_index", shape, STRINGS, chunks=True, compression="lzf")
    if not isinstance(index, int):
        names[:] = index
    _mark(names, "string-array", "0.2.0")
    return frame


def _categories(obs: Any, name: str, n: int, n_cells: int) -> Any:
    group = _mark(obs.create_group(name), "categorical", "0.2.0")
    group.attrs["ordered"] = False
    group["categories"] = np.array([f"{name} {i}" for i in range(n)], dtype=STRINGS)
    _mark(group["categories"], "string-array", "0.2.0")
    return _mark(group.create_dataset("codes", (n_cells,), "i1"), "array", "0.2.0")


def measure(path: Path) -> dict[str, float]:
    """Open a file and write its cells; peak memory of this process and CPU seconds."""
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder, open_source(path) as source:
        write_cells(Layout(folder), source, donor="donor", batch="batch", cell_type="cell_type")
        n_cells = source.n_cells
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return {"cells": n_cells, "peak_mb": round(peak_mb), "cpu_s": round(time.process_time() - started, 1)}


def main() -> None:
    """Measure every size in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--folder", type=Path, default=None, help="where the files are written (default: a temporary)")
    parser.add_argument("--measure", type=Path, default=None, help="only measure this file, in this process")
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for n_cells in options.cells:
            path = Path(folder) / "cells.h5ad"
            write_file(path, n_cells)
            subprocess.run([sys.executable, __file__, "--measure", path], check=True)


if __name__ == "__main__":
    main()
