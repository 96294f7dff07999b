"""Cells a second read from each format of files, against .h5ad in CSR, and peak memory at several numbers of cells.

    python tests/benchmarks/bench_formats.py [--cells 10000 300000] [--formats csr mtx ...] [--folder DIR]

The same synthetic cells (2,000 genes, 100 values a cell) are written in every format, in blocks, and each is read by a
process of its own: opened, turned into a store where it does not lie cell by cell (timed apart), and read whole in
blocks of 4,096 cells. A line of JSON for each format and size: cells/s, their ratio to those of the first format,
seconds of turning, and the peak memory above that of the imports.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.cells import open_source, turn_matrices
from feature_store.storage.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Iterator

N_GENES, PER_CELL, BLOCK_CELLS, READ_CELLS = 2000, 100, 10_000, 4096
STRINGS = h5py.string_dtype()
FORMATS = ("csr", "csc", "dense", "zarr", "tenx", "mtx", "parquet", *(["soma"] if find_spec("tiledbsoma") else []))


class Block(NamedTuple):
    """Some cells: their first, and the ascending genes and the counts of each [n_cells PER_CELL]."""

    start: int
    genes: np.ndarray
    counts: np.ndarray


def blocks(n_cells: int) -> Iterator[Block]:
    """The cells, which are the same for every format."""
    band = N_GENES // PER_CELL
    for start in range(0, n_cells, BLOCK_CELLS):
        rng = np.random.default_rng([0, start])
        shape = (min(BLOCK_CELLS, n_cells - start), PER_CELL)
        genes = rng.integers(0, band, shape) + band * np.arange(PER_CELL)
        yield Block(start, genes.astype(np.int32), rng.integers(1, 6, shape).astype(np.float32))


def names(n_cells: int) -> np.ndarray:
    """Names of the cells."""
    return np.array([f"c{i:07d}" for i in range(n_cells)])


GENES = np.array([f"GENE{i}" for i in range(N_GENES)])


def _mark(node: Any, encoding: str, version: str = "0.2.0") -> Any:
    node.attrs.update({"encoding-type": encoding, "encoding-version": version})
    return node


def _frames(file: Any, n_cells: int) -> None:
    _mark(file, "anndata", "0.1.0")
    for name, index in (("obs", names(n_cells)), ("var", GENES)):
        frame = _mark(file.create_group(name), "dataframe")
        frame.attrs["_index"], frame.attrs["column-order"] = "_index", np.array([], dtype=STRINGS)
        frame["_index"] = index.astype(object)
        _mark(frame["_index"], "string-array")


def write_csr(path: Path, n_cells: int) -> None:
    """An .h5ad in CSR."""
    n = n_cells * PER_CELL
    with h5py.File(path, "w") as file:
        _frames(file, n_cells)
        x = _mark(file.create_group("X"), "csr_matrix", "0.1.0")
        x.attrs["shape"] = np.array([n_cells, N_GENES])
        data, indices = (x.create_dataset(k, (n,), t, chunks=True) for k, t in (("data", "f4"), ("indices", "i4")))
        x["indptr"] = np.arange(0, n + 1, PER_CELL)
        for block in blocks(n_cells):
            own = slice(block.start * PER_CELL, block.start * PER_CELL + block.genes.size)
            indices[own], data[own] = block.genes.ravel(), block.counts.ravel()


def write_csc(path: Path, n_cells: int) -> None:
    """An .h5ad in CSC. The writer holds the matrix in memory."""
    found = list(blocks(n_cells))
    genes = np.concatenate([block.genes.ravel() for block in found])
    order = np.argsort(genes, kind="stable")
    with h5py.File(path, "w") as file:
        _frames(file, n_cells)
        x = _mark(file.create_group("X"), "csc_matrix", "0.1.0")
        x.attrs["shape"] = np.array([n_cells, N_GENES])
        x["data"] = np.concatenate([block.counts.ravel() for block in found])[order]
        x["indices"] = (order // PER_CELL).astype(np.int32)
        x["indptr"] = np.concatenate([[0], np.cumsum(np.bincount(genes, minlength=N_GENES))])


def write_dense(path: Path, n_cells: int) -> None:
    """An .h5ad with a dense matrix."""
    with h5py.File(path, "w") as file:
        _frames(file, n_cells)
        x = _mark(
            file.create_dataset("X", (n_cells, N_GENES), "f4", chunks=(min(n_cells, 1000), N_GENES), compression="lzf"),
            "array",
        )
        for block in blocks(n_cells):
            dense = np.zeros((len(block.genes), N_GENES), np.float32)
            np.put_along_axis(dense, block.genes, block.counts, axis=1)
            x[block.start : block.start + len(dense)] = dense


def write_zarr(path: Path, n_cells: int) -> None:
    """An AnnData .zarr, version 3, sharded."""
    import pandas as pd
    import zarr
    from anndata.io import write_elem

    n = n_cells * PER_CELL
    file = zarr.open_group(path, mode="w", zarr_format=3)
    with warnings.catch_warnings():
        # zarr warns about strings while it writes
        warnings.simplefilter("ignore")
        for name, index in (("obs", names(n_cells)), ("var", GENES)):
            write_elem(file, name, pd.DataFrame(index=index))
    _mark(file, "anndata", "0.1.0")
    x = _mark(file.create_group("X"), "csr_matrix", "0.1.0")
    x.attrs["shape"] = [n_cells, N_GENES]
    sizes = {"chunks": (1 << 15,), "shards": (1 << 20,)}
    data, indices = (x.create_array(k, shape=(n,), dtype=t, **sizes) for k, t in (("data", "f4"), ("indices", "i4")))
    x.create_array("indptr", data=np.arange(0, n + 1, PER_CELL))
    for block in blocks(n_cells):
        own = slice(block.start * PER_CELL, block.start * PER_CELL + block.genes.size)
        indices[own], data[own] = block.genes.ravel(), block.counts.ravel()


def write_tenx(path: Path, n_cells: int) -> None:
    """A filtered_feature_bc_matrix.h5."""
    n = n_cells * PER_CELL
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = names(n_cells).astype("S")
        group["shape"], group["indptr"] = np.array([N_GENES, n_cells]), np.arange(0, n + 1, PER_CELL)
        features = group.create_group("features")
        features["id"] = features["name"] = GENES.astype("S")
        features["feature_type"] = np.array(["Gene Expression"] * N_GENES, dtype="S")
        data, indices = (
            group.create_dataset(k, (n,), t, chunks=True, compression="gzip", compression_opts=4)
            for k, t in (("data", "i4"), ("indices", "i8"))
        )
        for block in blocks(n_cells):
            own = slice(block.start * PER_CELL, block.start * PER_CELL + block.genes.size)
            indices[own], data[own] = block.genes.ravel(), block.counts.ravel()


def write_mtx(path: Path, n_cells: int) -> None:
    """A folder of matrix.mtx.gz."""
    path.mkdir()
    with gzip.open(path / "matrix.mtx.gz", "wb", compresslevel=1) as file:
        file.write(b"%%MatrixMarket matrix coordinate integer general\n")
        file.write(f"{N_GENES} {n_cells} {n_cells * PER_CELL}\n".encode())
        for block in blocks(n_cells):
            cell = np.repeat(np.arange(block.start, block.start + len(block.genes)), PER_CELL) + 1
            rows = zip(block.genes.ravel() + 1, cell, block.counts.ravel().astype(int), strict=True)
            file.write("".join(f"{gene} {one} {count}\n" for gene, one, count in rows).encode())
    (path / "barcodes.tsv.gz").write_bytes(gzip.compress("\n".join(names(n_cells)).encode()))
    (path / "features.tsv.gz").write_bytes(
        gzip.compress("".join(f"{name}\t{name}\tGene Expression\n" for name in GENES).encode())
    )


def write_parquet(path: Path, n_cells: int) -> None:
    """A folder of parts with lists of genes, one part for a block of cells."""
    path.mkdir()
    tokens = np.arange(N_GENES) + 3
    pq.write_table(pa.table({"token_id": tokens, "gene_symbol": GENES.tolist()}), path / "gene_metadata.parquet")
    for block in blocks(n_cells):
        n = len(block.genes)
        offsets = pa.array(np.arange(0, n * (PER_CELL + 1) + 1, PER_CELL + 1, dtype=np.int32))
        genes = np.hstack([np.ones((n, 1), np.int64), tokens[block.genes]])
        values = np.hstack([np.full((n, 1), -2, np.float32), block.counts])
        lists = [pa.ListArray.from_arrays(offsets, pa.array(one.ravel())) for one in (genes, values)]
        columns = {"genes": lists[0], "expressions": lists[1]}
        columns["BARCODE"] = pa.array([f"c{i:07d}" for i in range(block.start, block.start + n)])
        pq.write_table(pa.table(columns), path / f"train-{block.start:07d}.parquet", row_group_size=n)


def write_soma(path: Path, n_cells: int) -> None:
    """A SOMA experiment, with a fragment for a block of cells."""
    import tiledbsoma

    frames = {"obs": ("obs_id", names(n_cells)), "ms/RNA/var": ("var_id", GENES)}
    tables = {
        place: pa.table({"soma_joinid": np.arange(len(texts)), name: texts.tolist()})
        for place, (name, texts) in frames.items()
    }
    with tiledbsoma.Experiment.create(str(path)) as made:
        rna = made.add_new_collection("ms").add_new_collection("RNA", tiledbsoma.Measurement)
        x = rna.add_new_collection("X")
        x.add_new_sparse_ndarray("raw", type=pa.float32(), shape=(n_cells, N_GENES))
        for parent, table in zip((made, rna), tables.values(), strict=True):
            name = "obs" if parent is made else "var"
            parent.add_new_dataframe(name, schema=table.schema, domain=[(0, table.num_rows - 1)])
    for place, table in tables.items():
        with tiledbsoma.open(f"{path}/{place}", "w") as frame:
            frame.write(table)
    for block in blocks(n_cells):
        cell = np.repeat(np.arange(block.start, block.start + len(block.genes)), PER_CELL)
        columns = {"soma_dim_0": cell, "soma_dim_1": block.genes.ravel().astype(np.int64)}
        with tiledbsoma.open(f"{path}/ms/RNA/X/raw", "w") as array:
            array.write(pa.table({**columns, "soma_data": block.counts.ravel()}))


WRITERS = {name: globals()[f"write_{name}"] for name in FORMATS}


def peak_mb() -> float:
    """The largest memory that this process has had; not that of the process that started it, which ru_maxrss is."""
    (line,) = [one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM")]
    return int(line.split()[1]) * 1024 / 1e6


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(path: Path) -> dict[str, float]:
    """Open, turn and read a file in this process."""
    before = peak_mb()
    with tempfile.TemporaryDirectory(dir=path.parent) as store, open_source(path) as source:
        started = time.perf_counter()
        turn_matrices(Layout(store), source)
        turned = time.perf_counter()
        total = 0.0
        for start in range(0, source.n_cells, READ_CELLS):
            total += float(source.read_rows(start, min(start + READ_CELLS, source.n_cells)).data.sum())
        seconds = time.perf_counter() - turned
        return {
            "cells": source.n_cells,
            "cells_per_s": round(source.n_cells / seconds),
            "turn_s": round(turned - started, 1),
            "turned_bytes_a_value": round(_size(Path(store)) / source.n_cells / PER_CELL, 1),
            "total": total,
            "peak_mb": round(peak_mb() - before),
        }


def main() -> None:
    """Write and measure every format at every size, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[10_000, 300_000])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--folder", type=Path, default=None, help="where the files are written (default: a temporary)")
    parser.add_argument("--measure", type=Path, default=None, help="only measure this file, in this process")
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure)))
        return
    for n_cells in options.cells:
        first: dict[str, float] = {}
        for name in options.formats:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                path = Path(folder) / f"cells.{name}"
                WRITERS[name](path, n_cells)
                command = [sys.executable, __file__, "--measure", path]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout)
            first = first or found
            if found["total"] != first["total"]:
                raise SystemExit(f"{name} gave other counts than {options.formats[0]}")
            ratio = round(found["cells_per_s"] / first["cells_per_s"], 2)
            print(json.dumps({"format": name, **found, "ratio": ratio}), flush=True)


if __name__ == "__main__":
    main()
