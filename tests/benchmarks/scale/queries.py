"""Look-ups in the largest store of the chain, which `chain --keep` leaves: warm, and cold after its files were dropped.

The questions are asked as in bench_query.py, each with another feature or cell, and the pages are loaded as in
bench_atlas.py where Chromium is installed. Columns: median and 95th percentile of the clock, then of the CPU, in
milliseconds; first of one store in one process, then of a fresh process each time, which opens the store.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from bench_query import clocks, drop_cache, percentiles, warm

from feature_store import FeatureStore
from feature_store.storage.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Callable

REPEATS, COLD_REPEATS = 20, 8
FIRST_PAGES = 3
"""Of the measurements of bench_atlas.py those that need no labels of its own: two loads, and moving the map."""
ONE = "import sys; sys.path.insert(0, sys.argv[1]); from scale import queries; queries.ask_cold(*sys.argv[2:])"


def questions(n_cells: int, n_features: int) -> dict[str, Callable[[FeatureStore, int], pl.DataFrame]]:
    """Each question by its name, asked with the i-th feature or cell."""
    features = np.random.default_rng(4).permutation(n_features).tolist()
    cells = np.random.default_rng(5).permutation(n_cells).tolist()
    return {
        "top_cells, n=100": lambda store, i: store.top_cells(features[i], 100),
        "features_of a cell, n=20": lambda store, i: store.features_of(cells[i], 20),
        "features_for a label": lambda store, i: store.features_for(label=f"type {i % 30:02d}"),
        "SQL: labels of a feature": lambda store, i: store.sql(
            f"SELECT label, auroc, q FROM feature_label WHERE feature_id = {features[i]} ORDER BY auroc DESC LIMIT 20"
        ),
        "SQL: genes of a feature": lambda store, i: store.sql(
            f"SELECT gene, pearson FROM feature_gene WHERE feature_id = {features[i]} ORDER BY pearson DESC LIMIT 20"
        ),
        "SQL: codes of a feature": lambda store, i: store.sql(
            f"SELECT cell_idx, value FROM codes WHERE feature_id = {features[i]}"
        ),
        "SQL: mean code by cell type": lambda store, i: store.sql(
            "SELECT c.cell_type, AVG(k.value) AS mean FROM codes k JOIN cells c ON k.cell_idx = c.cell_idx "
            f"WHERE k.feature_id = {features[i]} GROUP BY c.cell_type"
        ),
        "SQL: cells by type": lambda store, i: store.sql(
            "SELECT cell_type, COUNT(*) AS n FROM cells GROUP BY cell_type"
        ),
    }


def ask_cold(root: str, name: str, i: str, n_cells: str, n_features: str) -> None:
    """Print the milliseconds of one question in this fresh process, opening included."""
    question = questions(int(n_cells), int(n_features))[name]
    # what imports and starts on first use
    pl.SQLContext({"t": pl.DataFrame({"a": [1]})}, eager=True).execute("SELECT a FROM t")
    drop_cache(Path(root))
    began = clocks()
    question(FeatureStore.open(root), int(i))
    print(json.dumps((clocks() - began).tolist()))


def cold(root: Path, name: str, n_cells: int, n_features: int) -> list[list[float]]:
    """Milliseconds of each question in a process of its own."""
    here, found = str(Path(__file__).parents[1]), []
    for i in range(COLD_REPEATS):
        command = [sys.executable, "-c", ONE, here, root, name, i, n_cells, n_features]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    return found


def pages(root: Path) -> None:
    """Print how long the atlas takes to load."""
    if not any(info.complete for info in Layout(root).runs("saes")):
        print("no pages were loaded: this store has no SAE, whose features they are of")
        return
    executable = shutil.which("chromium")
    if executable is None:
        print("no pages were loaded: install Chromium to measure them")
        return
    from bench_atlas import measure
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        for what, times in islice(measure(browser, FeatureStore.open(root), 1), FIRST_PAGES):
            print(f"{what:34}{statistics.median(times):8.0f}{np.quantile(times, 0.95):8.0f} ms")
        browser.close()


def main(options: Any) -> None:
    """Ask, load, print."""
    root = options.work / f"{options.name}-{max(options.cells)}" / "store"
    if not root.exists():
        raise SystemExit(f"{root} does not exist; run: python tests/benchmarks/bench_scale.py chain --keep")
    store = FeatureStore.open(root)
    n_cells = store.sql("SELECT COUNT(*) AS n FROM cells")["n"].item()
    n_features = store.sql("SELECT COUNT(*) AS n FROM features")["n"].item()
    four = f"{'p50':>8}{'p95':>8}{'CPU p50':>8}{'p95':>8}"
    print(f"{n_cells:,} cells, {n_features:,} features\n{'ms':34}{'warm':<32}cold\n{'':34}{four}{four}")
    for name, question in questions(n_cells, n_features).items():
        print(f"{name:34}{percentiles(warm(root, question, REPEATS))}", end="", flush=True)
        print(percentiles(cold(root, name, n_cells, n_features)), flush=True)
    pages(root)
