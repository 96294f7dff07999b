"""The atlas of a large synthetic store: how long pages take to load and to change, in headless Chromium.

    python tests/benchmarks/bench_atlas.py [--features 100000] [--cells 1000000] [--labels 40] [--store FOLDER]
    python tests/benchmarks/bench_atlas.py --export [--features 4096] [--cells 700] [--store FOLDER]

`--export` measures the export instead: CPU seconds of all processes, wall-clock seconds, files and megabytes, of the
store at FOLDER, or of the planted store of the tests with every table, enlarged; a tenth of its features fire in each
token.

The pages need Chromium and Playwright. Their store is written by the real writers, with as many cells on the map as
there are; `--store` keeps it for the next time. Times are the page's own clock. `load`: from asking for the address
until the dots are drawn and the rows listed, in a new browser context (nothing kept from before), by a server that has
answered once (`first`: that has just opened the store). A change is from the event until the next frame is drawn:
median and 95th percentile of 20, each to something that was not shown before. `pan`: a frame while the map is moved.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from scipy import sparse

from feature_store import FeatureStore, Layout
from feature_store.atlas import export, serve
from feature_store.storage import commit, schemas
from feature_store.storage.plans import AssociationsPlan

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from token_codes import TokenCodes, cut_of, toy_codes, write_codes
from toy_plans import toy_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, Page

CELLS_PER_SHARD, CODES_PER_CELL = 50_000, 16
CLASSES = ("gene-identity", "cell-context", "batch", "mixed", "dead")
N_GENES, GENES_PER_FEATURE, REPEATS = 5000, 8, 20


def write_store(root: Path, n_features: int, n_cells: int, n_labels: int) -> None:
    """Every table that the pages of features and cells read."""
    layout, rng = Layout(root), np.random.default_rng(0)
    types = [f"type {i}" for i in range(n_labels)]
    cells = pl.DataFrame({"cell_idx": np.arange(n_cells)}).with_columns(
        cell_id=pl.format("CELL{}-1", "cell_idx"),
        dataset=pl.lit("large"),
        split=pl.Series(rng.choice(["train", "select", "test"], n_cells)),
        panel=pl.lit(True),
        donor=pl.format("donor {}", pl.col("cell_idx") % 20),
        batch=pl.format("batch {}", pl.col("cell_idx") % 7),
        cell_type=pl.Series(rng.choice(types, n_cells)),
    )
    commit.write_table(layout.cells_dir("large"), schemas.conform("cells", cells), {"dataset": "large"})
    plan = toy_codes(cut_of(n_cells, CELLS_PER_SHARD), n_features=n_features, dataset="large", sae="5ae")
    shards = (
        cell_codes(start, min(start + CELLS_PER_SHARD, n_cells), n_features, np.random.default_rng(shard))
        for shard, start in enumerate(range(0, n_cells, CELLS_PER_SHARD))
    )
    write_codes(layout.codes_dir("c0de"), plan, shards, cells["split"].to_numpy())
    points = rng.normal(size=(n_cells, 2)) + 6 * rng.normal(size=(n_labels, 2))[rng.integers(0, n_labels, n_cells)]
    umap = pl.DataFrame({"cell_idx": np.arange(n_cells), "x": points[:, 0], "y": points[:, 1]})
    commit.write_table(layout.umap_dir("c0de"), schemas.conform("umap", umap), {"table": "umap"})
    of = toy_table(AssociationsPlan, codes="c0de", dataset="large", sae="5ae")
    for name, frame in about_features(n_features, types, rng).items():
        folder = (
            layout.feature_map_dir("5ae") / "umap" if name == "feature_umap" else layout.associations_dir("a5") / name
        )
        commit.write_table(folder, schemas.conform(name, frame), of)


def cell_codes(start: int, stop: int, n_features: int, rng: np.random.Generator) -> TokenCodes:
    """One token a cell in which CODES_PER_CELL features fire, low ones more often."""
    n = stop - start
    feature = np.sort((n_features * rng.random((n, CODES_PER_CELL)) ** 2).astype(np.int32), axis=1)
    keep = np.diff(feature, axis=1, prepend=-1) > 0
    indptr = np.concatenate([[0], np.cumsum(keep.sum(axis=1))])
    value = rng.exponential(size=int(keep.sum())).astype(np.float32) + np.float32(1e-3)
    return TokenCodes(
        cell_idx=np.arange(start, stop),
        token_pos=np.zeros(n, np.int32),
        gene_id=rng.integers(0, N_GENES, n).astype(np.int32),
        codes=sparse.csr_array((value, feature[keep], indptr), shape=(n, n_features)),
    )


def about_features(n: int, types: list[str], rng: np.random.Generator) -> dict[str, pl.DataFrame]:
    """Tables of associations: all labels and a few genes of every feature, for select and test cells."""
    f, n_labels = np.arange(n), len(types)
    genes = np.array([f"GENE{i}" for i in range(N_GENES)])
    named = genes[rng.integers(0, N_GENES, (n, 10))]
    auroc = rng.uniform(0.5, 1, n)
    columns: dict[str, Any] = dict.fromkeys(schemas.schema("features").columns)
    features = pl.DataFrame(
        {
            **columns,
            "feature_id": f,
            "density": 10 ** rng.uniform(-5, -0.5, n),
            **{name: rng.uniform(0, 5, n) for name in ("mean", "max", "p99")},
            "class": rng.choice(CLASSES, n),
            "class_confidence": rng.uniform(0.3, 1, n),
            "dead": False,
            "top_genes": [" ".join(row) for row in named],
            "top_label": rng.choice(types, n),
            "top_label_kind": "cell_type",
            "top_label_auroc": auroc,
            "top_label_auroc_select": auroc,
            **{name: rng.uniform(0, 0.5, n) for name in ("context_effect", "batch_effect", "gene_effect")},
        }
    )
    grid = pl.DataFrame({"feature_id": np.repeat(f, 2 * n_labels)}).with_columns(
        split=pl.Series(np.tile(np.repeat(["select", "test"], n_labels), n)),
        label=pl.Series(np.tile(types, 2 * n)),
        label_kind=pl.lit("cell_type"),
        auroc=pl.Series(rng.uniform(0, 1, 2 * n * n_labels)),
        q=pl.Series(rng.uniform(0, 1, 2 * n * n_labels)),
    )
    grid = grid.with_columns(rank_biserial=2 * pl.col("auroc") - 1, p=pl.col("q") / 2)
    per = 2 * GENES_PER_FEATURE
    of_genes = pl.DataFrame({"feature_id": np.repeat(f, per)}).with_columns(
        split=pl.Series(np.tile(np.repeat(["select", "test"], GENES_PER_FEATURE), n)),
        gene=pl.Series(np.tile(named[:, :GENES_PER_FEATURE], (1, 2)).ravel()),
        pearson=pl.Series(rng.uniform(-0.5, 1, n * per)),
    )
    places = rng.normal(size=(n, 2)) + 5 * rng.normal(size=(30, 2))[rng.integers(0, 30, n)]
    return {
        "features": features,
        "feature_label": filled("feature_label", grid),
        "feature_gene": filled("feature_gene", of_genes.unique(["feature_id", "split", "gene"], maintain_order=True)),
        "feature_geneset": schemas.empty("feature_geneset"),
        **{name: schemas.empty(name) for name in ("feature_token", "feature_number", "gene_sets")},
        "feature_umap": pl.DataFrame({"feature_id": f, "x": places[:, 0], "y": places[:, 1]}),
    }


def filled(table: str, frame: pl.DataFrame) -> pl.DataFrame:
    """A frame with the columns that it lacks, null."""
    return frame.with_columns(pl.lit(None).alias(name) for name in schemas.schema(table).columns if name not in frame)


SOON = (
    "const soon = (ready) => new Promise((d) => { const look = () => (ready() ? d() : setTimeout(look, 1)); look(); });"
)
DRAWN = f"""async (selectors) => {{
    {SOON}
    await soon(() => selectors.every((selector) => document.querySelector(selector)));
    return performance.now();
}}"""
CHANGE = f"""async ({{ field, event, value }}) => {{
    {SOON}
    const box = document.querySelector('.scatter'), input = document.querySelector(field);
    const frames = Number(box.dataset.frames), start = performance.now();
    input.value = value;
    input.dispatchEvent(new Event(event, {{ bubbles: true }}));
    await soon(() => Number(box.dataset.frames) > frames);
    return performance.now() - start;
}}"""
PAN = """() => {
    const plot = document.querySelector('.scatter').scatter;
    return Array.from({ length: 20 }, () => {
        const start = performance.now();
        plot.pan(3, 1);
        plot.draw();
        return performance.now() - start;
    });
}"""
DOTS, ROWS = ".scatter[data-frames]", ".vt-row"


def changes(page: Page, field: str, event: str, values: list[str]) -> list[float]:
    """Milliseconds of each change of a field."""
    return [float(page.evaluate(CHANGE, {"field": f"[name={field}]", "event": event, "value": v})) for v in values]


def measure(browser: Browser, store: FeatureStore, n_labels: int) -> Iterator[tuple[str, list[float]]]:
    """What was measured and its milliseconds."""
    address = started(store)

    def loaded(where: str, *selectors: str) -> tuple[Page, float]:
        page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
        page.set_default_timeout(300_000)
        page.goto(f"{address}/{where}")
        return page, float(page.evaluate(DRAWN, selectors))

    page, first = loaded("", DOTS, ROWS)
    yield "load the atlas, first", [first]
    yield "load the atlas", [loaded("", DOTS, ROWS)[1] for _ in range(5)]
    yield "pan the atlas", page.evaluate(PAN)
    by_number = ["density", "batch_effect", "context_effect", "class"]
    yield "colour by a number", changes(page, "color", "change", by_number * (REPEATS // 4))
    types = [i % n_labels for i in range(REPEATS)]
    yield "colour by a label's AUROC", changes(page, "color", "change", [f"auroc:{i}" for i in types])
    yield "filter by label", changes(page, "label", "change", [f"type {i}" for i in types])
    changes(page, "label", "change", [""])
    densities = ["0.001~0.01", "", "0.01~0.1", "0~0.001"]
    yield "filter by density", changes(page, "density", "change", densities * (REPEATS // 4))
    genes = [f"GENE{37 * i}" for i in range(REPEATS)]
    yield "filter by text (30 ms of it wait for the next letter)", changes(page, "q", "input", genes)
    features = (5, 77, 501)
    yield "load a feature", [loaded(f"#/feature/{feature}", DOTS)[1] for feature in features]
    page, _ = loaded("#/feature/9", DOTS)
    yield "pan the cells of a feature", page.evaluate(PAN)


def export_lines(root: Path, n_features: int, n_cells: int, folder: Path) -> Iterator[str]:
    """Export a store, which is planted where there is none; rows of a table of what it took."""
    if not root.exists():
        sys.path.insert(0, str(Path(__file__).parents[1] / "feature_store" / "atlas"))
        planted: Any = importlib.import_module("conftest")
        planted.N_FEATURES, planted.N_CELLS = n_features, n_cells
        planted.write_store(root)
    begun, before = time.perf_counter(), os.times()
    n_bytes = export(FeatureStore.open(root), folder)
    wall, after = time.perf_counter() - begun, os.times()
    cpu = sum(after[:4]) - sum(before[:4])
    yield "| CPU, s | wall, s | MB | files | load | cores |\n|---|---|---|---|---|---|"
    n_files = sum(1 for _ in (folder / "data").iterdir())
    yield f"| {cpu:.1f} | {wall:.1f} | {n_bytes / 1e6:.1f} | {n_files} | {os.getloadavg()[0]:.1f} | {os.cpu_count()} |"


def started(store: FeatureStore) -> str:
    """Serve a store from a thread; its address."""
    said: list[str] = []
    threading.Thread(target=serve, args=(store,), kwargs={"port": 0, "ready": said.append}, daemon=True).start()
    while not said:
        time.sleep(0.01)
    return said[0]


def main() -> None:
    """Print a table of milliseconds, or of what an export takes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=int)
    parser.add_argument("--cells", type=int)
    parser.add_argument("--labels", type=int, default=40)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--export", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = asked.store or Path(scratch) / "store"
        if asked.export:
            for line in export_lines(root, asked.features or 4096, asked.cells or 700, Path(scratch) / "atlas"):
                print(line)
            return
        if not root.exists():
            begun = time.perf_counter()
            write_store(root, asked.features or 100_000, asked.cells or 1_000_000, asked.labels)
            print(f"wrote the store in {time.perf_counter() - begun:.0f} s", file=sys.stderr)
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu", "--disable-quic"]
            )
            print("| what | median, ms | 95 %, ms | n |\n|---|---|---|---|")
            for what, times in measure(browser, FeatureStore.open(root), asked.labels):
                print(
                    f"| {what} | {statistics.median(times):.0f} | {np.quantile(times, 0.95):.0f} | {len(times)} |",
                    flush=True,
                )
            browser.close()


if __name__ == "__main__":
    main()
