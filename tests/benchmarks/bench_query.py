"""Look-ups and SQL on a large synthetic store: how long they take, warm and cold, and what a nonzero takes on disk.

    python tests/benchmarks/bench_query.py [--cells 1000000] [--nonzeros 50000000] [--features 4096] [--store FOLDER]

The store is written by the real writers (every cell one token); its densities fall from features in 40 % of the cells
to features in 10 cells. With --store it is kept and used again. Every question is asked with another feature or cell
each time. `warm`: one FeatureStore in one process, after five questions of the same kind. `cold`: a fresh process each
time, its imports done and the store's files dropped from the page cache (posix_fadvise, no root needed; the disk's and
a hypervisor's own caches stay), opening the store included. Beside the milliseconds of the clock are those of the CPU,
all threads together: on a machine that others use, they are the ones to compare.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from scipy import sparse

from feature_store import FeatureStore, Layout
from feature_store.codes import CodesRun, cells_of_shard, span_of_shard
from feature_store.storage import commit, schemas
from feature_store.storage.plans import AssociationsPlan, CodesCut

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from token_codes import TokenCodes, commit_tokens, finish, toy_codes
from toy_plans import toy_table

if TYPE_CHECKING:
    from collections.abc import Callable

HIGHEST, LOWEST_CELLS = 0.4, 10
N_LABELS, N_GENES = 40, 50
WARMUP = 5
PANEL_CELLS = 200_000


def densities(n_cells: int, n_features: int, n_nonzeros: int) -> np.ndarray:
    """Density of each feature [n_features], falling as a power of its rank that gives the nonzeros asked for."""
    rank = np.arange(1, n_features + 1)
    low, high = 0.0, 4.0
    for _ in range(60):
        power = (low + high) / 2
        found = np.maximum(HIGHEST * rank**-power, LOWEST_CELLS / n_cells)
        low, high = (power, high) if found.sum() * n_cells > n_nonzeros else (low, power)
    return np.random.default_rng(0).permutation(found)


def tokens_of(cells: np.ndarray, density: np.ndarray, seed: int) -> TokenCodes:
    """Codes of some cells, one token each."""
    rng = np.random.default_rng((seed, int(cells[0])))
    n, keys = len(cells), []
    for feature, share in enumerate(density):
        firing = rng.choice(n, rng.binomial(n, share), replace=False, shuffle=False)
        keys.append(firing * len(density) + feature)
    key = np.sort(np.concatenate(keys))
    indptr = np.concatenate([[0], np.cumsum(np.bincount(key // len(density), minlength=n))])
    value = rng.exponential(size=len(key)).astype(np.float32) + np.float32(1e-3)
    codes = sparse.csr_array((value, (key % len(density)).astype(np.int32), indptr), shape=(n, len(density)))
    return TokenCodes(
        cell_idx=cells,
        token_pos=np.zeros(n, np.int32),
        gene_id=rng.integers(0, 100, n).astype(np.int32),
        codes=codes,
    )


def panel_of(n_cells: int) -> np.ndarray:
    """The cells of a panel of at most PANEL_CELLS."""
    n = min(n_cells, PANEL_CELLS)
    return np.sort(np.random.default_rng(6).choice(n_cells, n, replace=False))


def cell_table(n_cells: int) -> pl.DataFrame:
    """A cell table with a name for each cell and ten columns of obs."""
    rng = np.random.default_rng(1)
    barcode = np.frombuffer(b"ACGT", "S1")[rng.integers(0, 4, (n_cells, 16))].view("S16").ravel().astype(str)
    names = pl.Series(barcode) + "-" + pl.Series(np.arange(n_cells) // 10_000).cast(pl.String)
    coarse = {f"obs_{i}": pl.Series(rng.integers(0, 30, n_cells)).cast(pl.String) for i in range(4)}
    fine = {f"score_{i}": rng.normal(size=n_cells) for i in range(3)}
    return schemas.conform(
        "cells",
        pl.DataFrame(
            {
                "cell_idx": np.arange(n_cells),
                "cell_id": names,
                "dataset": "synthetic",
                "split": np.array(["train", "select", "test"])[rng.integers(0, 3, n_cells)],
                "panel": np.isin(np.arange(n_cells), panel_of(n_cells)),
                "donor": pl.Series(rng.integers(0, 100, n_cells)).cast(pl.String),
                "batch": pl.Series(rng.integers(0, 20, n_cells)).cast(pl.String),
                "cell_type": pl.Series(rng.integers(0, N_LABELS, n_cells)).cast(pl.String),
                **coarse,
                **fine,
            }
        ),
    )


def association_tables(n_features: int) -> dict[str, pl.DataFrame]:
    """features, and a row for each feature and label, and for each feature and some genes; random numbers."""
    rng = np.random.default_rng(2)

    def crossed(names: dict[str, list[str]], numbers: list[str]) -> pl.DataFrame:
        frame = pl.DataFrame({"feature_id": np.arange(n_features)})
        for name, values in names.items():
            frame = frame.join(pl.DataFrame({name: values}), how="cross")
        return frame.with_columns(pl.Series(name, rng.random(frame.height)) for name in numbers)

    label = {"label_kind": ["cell_type"], "label": [str(i) for i in range(N_LABELS)], "split": ["select", "test"]}
    frames = {
        "features": pl.DataFrame(
            {
                "feature_id": np.arange(n_features),
                "density": rng.random(n_features),
                "class": "cell-context",
                "dead": False,
                "top_genes": "MS4A1, CD79A, CD79B",
                "top_label": "B",
            }
        ),
        "feature_label": crossed(label, ["auroc", "p", "q"]),
        "feature_gene": crossed({"gene": [f"GENE{i}" for i in range(N_GENES)]}, ["pearson", "p", "q"]),
        "feature_geneset": crossed({"collection": ["c"], "gene_set": [f"set {i}" for i in range(20)]}, ["p", "q"]),
        **{name: schemas.empty(name) for name in ("feature_token", "feature_number", "gene_sets")},
    }
    return {name: _complete(name, frame) for name, frame in frames.items()}


def _complete(table: str, frame: pl.DataFrame) -> pl.DataFrame:
    missing = [name for name in schemas.TABLES[table].columns if name not in frame.columns]
    return schemas.conform(table, frame.with_columns(pl.lit(None).alias(name) for name in missing))


def write_store(root: Path, *, n_cells: int, n_features: int, n_nonzeros: int, shard_cells: int) -> None:
    """The store, resumed like any other."""
    layout = Layout(root)
    panel = panel_of(n_cells)
    cut = CodesCut(n_cells=n_cells, n_panel=len(panel), panel_cells=shard_cells, other_cells=shard_cells)
    about = {"dataset": "synthetic", "sae": "none", "sae_manifest": str(n_nonzeros)}
    plan = toy_codes(cut, n_features=n_features, keep=256, **about)
    commit.write_table(layout.cells_dir("synthetic"), lambda: cell_table(n_cells), {"n_cells": n_cells})
    codes = CodesRun.create(layout.codes_dir("codes"), plan)
    density, split = densities(n_cells, n_features, n_nonzeros), np.full(n_cells, "train")
    for shard in codes.pending():
        start, stop = span_of_shard(cut, shard, panel)
        tokens = tokens_of(cells_of_shard(cut, shard, panel), density, 3)
        commit_tokens(codes, shard, tokens, start=start, stop=stop, split_of_cell=split)
    began = time.perf_counter()
    finish(codes)
    print(f"finalize and merge: {time.perf_counter() - began:.1f} s", file=sys.stderr)
    for name, frame in association_tables(n_features).items():
        commit.write_table(
            layout.associations_dir("assoc") / name,
            frame,
            toy_table(AssociationsPlan, codes="codes", dataset="synthetic", sae="none"),
        )


def questions(n_cells: int, n_features: int) -> dict[str, Callable[[FeatureStore, int], pl.DataFrame]]:
    """Each question by its name, asked with the i-th feature or cell."""
    features = np.random.default_rng(4).permutation(n_features).tolist()
    cells = np.random.default_rng(5).permutation(n_cells).tolist()
    densest = np.argsort(-densities(n_cells, n_features, ARGS.nonzeros)).tolist()
    return {
        "top_cells, n=100": lambda store, i: store.top_cells(features[i % n_features], 100),
        "top_cells, n=100, dense features": lambda store, i: store.top_cells(densest[i % n_features], 100),
        "features_of a cell, all": lambda store, i: store.features_of(cells[i], n_features),
        "SQL: features join labels": lambda store, i: store.sql(
            "SELECT f.feature_id, f.density, l.label, l.auroc FROM features f JOIN feature_label l "
            f"ON f.feature_id = l.feature_id WHERE l.split = 'test' AND l.label = '{i % N_LABELS}' "
            "ORDER BY l.auroc DESC LIMIT 50"
        ),
        "SQL: codes by feature_id": lambda store, i: store.sql(
            f"SELECT cell_idx, value FROM codes WHERE feature_id = {features[i % n_features]}"
        ),
        "SQL: codes by cell_idx": lambda store, i: store.sql(
            f"SELECT feature_id, value FROM codes WHERE cell_idx = {cells[i]}"
        ),
        "SQL: mean code by cell type": lambda store, i: store.sql(
            "SELECT c.cell_type, AVG(k.value) AS mean FROM codes k JOIN cells c ON k.cell_idx = c.cell_idx "
            f"WHERE k.feature_id = {features[i % n_features]} GROUP BY c.cell_type"
        ),
        "SQL: sum over all codes": lambda store, i: store.sql("SELECT SUM(value) AS total FROM codes"),
    }


def drop_cache(root: Path) -> None:
    """Let the kernel forget the pages of every file below a folder."""
    for path in root.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def clocks() -> np.ndarray:
    """Milliseconds of the clock and of the CPU."""
    return 1000 * np.array([time.perf_counter(), time.process_time()])


def ask_cold(root: Path, name: str, i: int) -> list[float]:
    """Milliseconds of one question in this fresh process, opening included."""
    question = questions(ARGS.cells, ARGS.features)[name]
    # what imports and starts on first use
    pl.SQLContext({"t": pl.DataFrame({"a": [1]})}, eager=True).execute("SELECT a FROM t")
    drop_cache(root)
    began = clocks()
    question(FeatureStore.open(root), i)
    return (clocks() - began).tolist()


def warm(root: Path, question: Callable[[FeatureStore, int], pl.DataFrame], repeats: int) -> list[np.ndarray]:
    """Milliseconds of each question after the first ones."""
    store, found = FeatureStore.open(root), []
    for i in range(WARMUP + repeats):
        began = clocks()
        question(store, i)
        found.append(clocks() - began)
    return found[WARMUP:]


def cold(root: Path, name: str, repeats: int) -> list[list[float]]:
    """Milliseconds of each question in a process of its own."""
    os.sync()
    command = [sys.executable, __file__, *sys.argv[1:], "--store", str(root), "--ask", name]
    asked = (subprocess.run([*command, str(i)], capture_output=True, check=True) for i in range(repeats))
    return [json.loads(done.stdout) for done in asked]


def bytes_a_nonzero(root: Path) -> dict[str, float]:
    """Bytes on disk a nonzero, in each sort order."""
    runs = {order: commit.Run.open(root / "codes" / "codes" / order).manifest() for order in ("by_cell", "by_feature")}
    return {order: manifest.bytes / manifest.rows for order, manifest in runs.items()}


def percentiles(found: list[Any]) -> str:
    """p50 and p95 of the clock, then of the CPU."""
    return "".join(f"{value:8.1f}" for value in np.percentile(found, [50, 95], axis=0).T.ravel()) if found else " " * 32


def main() -> None:
    """Write, ask, print."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(ARGS.store or scratch)
        if ARGS.ask:
            print(ask_cold(root, ARGS.ask[0], int(ARGS.ask[1])))
            return
        sizes: dict[str, Any] = {"n_cells": ARGS.cells, "n_features": ARGS.features, "n_nonzeros": ARGS.nonzeros}
        write_store(root, **sizes, shard_cells=ARGS.shard_cells)
        store = FeatureStore.open(root)
        n = store.sql("SELECT COUNT(*) AS n FROM codes")["n"].item()
        print(f"{n:,} nonzeros, {ARGS.features} features, {ARGS.cells:,} cells")
        for order, size in bytes_a_nonzero(root).items():
            print(f"{order}: {size:.2f} bytes a nonzero")
        four = f"{'p50':>8}{'p95':>8}{'CPU p50':>8}{'p95':>8}"
        print(f"{'ms':34}{'warm':<32}cold\n{'':34}{four}{four}")
        for name, question in questions(ARGS.cells, ARGS.features).items():
            if ARGS.only in name:
                print(f"{name:34}{percentiles(warm(root, question, ARGS.repeats))}", end="", flush=True)
                print(percentiles(cold(root, name, ARGS.cold_repeats)), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--nonzeros", type=int, default=50_000_000)
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--shard-cells", type=int, default=10_000, help="cells of a shard of the codes")
    parser.add_argument("--repeats", type=int, default=40, help="warm questions of each kind")
    parser.add_argument("--cold-repeats", type=int, default=20, help="processes for each kind")
    parser.add_argument("--only", default="", help="only the questions whose name holds this")
    parser.add_argument("--store", help="folder to keep the store in, and to use again")
    parser.add_argument("--ask", nargs=2, help=argparse.SUPPRESS)
    ARGS = parser.parse_args()
    main()
