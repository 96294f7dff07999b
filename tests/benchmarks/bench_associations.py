"""All associations of a synthetic codes run with their tests: wall time, CPU seconds, memory; and the field's loop.

    python tests/benchmarks/bench_associations.py [--shape 50000 4096 2000] [--k 32] [--per-cell 200] [--actors 1 2]
        [--linear 25000 50000 100000] [--linear-genes 500] [--loop-features 3]
    python tests/benchmarks/bench_associations.py --wide 32 64 [--wide-shape 200000 2000 60] [--profile 30]

A store is made of random cells (40 cell types, 8 donors, 4 batches and 2 conditions; of one donor the cells are train,
of four select, of three test: 7 of 8 cells are tested) and of codes that prefer cell types. The stage `associate` runs
over it in a process: Ray, turning the expression, measuring, assembling and every commit are in the time. memory: the
largest sum of the proportional set sizes (PSS) of the driver and its actors, and apart with Ray's own processes and its
object store. Then the same over more and more cells, with fewer genes, to see that cost is linear.

The loop is what the field uses: for each feature and label the codes as a dense column over its maximum, cut at .0, .2,
.4, .6, .8, and sklearn's AMI of each cut. It is timed on a few features, scaled by pairs, and its AMI compared with
that of `ami_by_threshold` on the same cells.

With --wide, `measure` is called on ranges of so many features, of which each is above zero in three quarters of the
cells, as max-pooled codes are: CPU seconds a feature and the largest memory of one process with one thread, for the
first range of an actor and for a later one, which finds the expression ranked. 9 of 10 cells are tested.
"""

import argparse
import cProfile
import os
import pstats
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import polars as pl
from scipy import sparse
from sklearn.metrics import adjusted_mutual_info_score

from feature_store.associations import (
    CellInputs,
    FeatureRange,
    GeneTiles,
    Labels,
    TokenStatistics,
    ami_by_threshold,
    measure,
)
from feature_store.associations.gene_sets import canonical_immune
from feature_store.associations.mutual_information import THRESHOLDS
from feature_store.cells import open_source, read_cells, save_source_location, split_by_size, write_cells
from feature_store.cells.expression import RANGE_GENES, RANGE_NONZEROS
from feature_store.codes import CodesRun, load_cell_codes
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from feature_store.storage.plans import FusedForward
from pipelines.inputs import GENES_TABLE

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from token_codes import TokenCodes, commit_tokens, cut_of, finish, toy_codes
from toy_plans import toy_plan

N_TYPES, N_DONORS, N_BATCHES = 40, 8, 4
MARK = "SCSAE_BENCH_RUN"
LOOK_S = 0.2
DRIVER = """
import sys
from pathlib import Path
from pipelines.associate import associate
from pipelines.config import AssociateOptions
associate(AssociateOptions(codes=sys.argv[1], num_actors=int(sys.argv[2])), Path(sys.argv[3]))
"""


def write_data(path: Path, n_cells: int, n_genes: int, per_cell: int, rng: np.random.Generator) -> np.ndarray:
    """Counts whose genes prefer cell types; returns the type of each cell."""
    kind = rng.integers(0, N_TYPES, n_cells)
    rate = rng.gamma(1.0, 1.0, (N_TYPES, n_genes))
    rate *= per_cell / n_genes / rate.mean()
    blocks = []
    for start in range(0, n_cells, 10_000):
        share = np.minimum(rate[kind[start : start + 10_000]], 0.95)
        row, gene = np.nonzero(rng.random(share.shape, dtype=np.float32) < share)
        values = 1.0 + rng.poisson(1.0, row.size)
        blocks.append(sparse.csr_matrix((values.astype(np.float32), (row, gene)), shape=share.shape))
    donor = rng.integers(0, N_DONORS, n_cells)
    obs = pd.DataFrame(
        {
            "type": [f"type {i}" for i in kind],
            "donor": [f"donor {i}" for i in donor],
            "batch": [f"batch {i}" for i in rng.integers(0, N_BATCHES, n_cells)],
            "condition": np.where(rng.random(n_cells) < 0.5, "ctrl", "stim"),
            "part": np.array(["train", "select", "test"])[np.digitize(donor, [1, 1 + N_DONORS // 2])],
        },
        index=[f"c{i}" for i in range(n_cells)],
    )
    var = pd.DataFrame(index=[f"G{i}" for i in range(n_genes)])
    anndata.AnnData(X=sparse.vstack(blocks, format="csr"), obs=obs, var=var).write_h5ad(path)
    return kind


def make_store(root: Path, n_cells: int, n_features: int, n_genes: int, k: int, per_cell: int) -> str:
    """Cells and codes as the stages would have written them; returns the codes run."""
    rng = np.random.default_rng(0)
    kind = write_data(root / "data.h5ad", n_cells, n_genes, per_cell, rng)
    layout = Layout(root / "store")
    source = open_source(root / "data.h5ad")
    dataset = write_cells(
        layout, source, donor="donor", batch="batch", cell_type="type", labels=["condition"], split_column="part"
    )
    split = read_cells(layout.cells_dir(dataset))["split"]
    save_source_location(layout, dataset, source)
    about = {"sae": "bench", "dataset": dataset, "fused": toy_plan(FusedForward), "activations": "none"}
    codes = CodesRun.create(
        layout.codes_dir("bench"), toy_codes(cut_of(n_cells, 10_000), n_features=n_features, **about)
    )
    genes = pl.DataFrame(
        {"gene_idx": np.arange(n_genes, dtype=np.int32), "symbol": source.gene_symbols, "gene_id": range(n_genes)},
        schema_overrides={"gene_id": pl.Int32},
    )
    commit.write_table(codes.folder / GENES_TABLE, genes, {"table": "token_of_gene"})
    for shard, start in enumerate(range(0, n_cells, 10_000)):
        stop = min(start + 10_000, n_cells)
        n_tokens = (stop - start) * k
        cell = np.repeat(np.arange(start, stop), k)
        # a token fires one feature, every second one a feature of the cell's type: feature % N_TYPES
        feature = rng.integers(0, n_features, n_tokens)
        own = kind[cell[::2]]
        feature[::2] = own + N_TYPES * rng.integers(0, (n_features - 1 - own) // N_TYPES + 1)
        tokens = TokenCodes(
            cell_idx=cell,
            token_pos=np.tile(np.arange(k, dtype=np.int32), stop - start),
            gene_id=rng.integers(0, n_genes, n_tokens).astype(np.int32),
            codes=sparse.csr_array(
                (rng.exponential(1.0, n_tokens).astype(np.float32) + 0.01, (np.arange(n_tokens), feature)),
                shape=(n_tokens, n_features),
            ),
        )
        commit_tokens(codes, shard, tokens, start=start, stop=stop, split_of_cell=split)
    finish(codes)
    return codes.folder.name


def wide_inputs(n_cells: int, n_genes: int, per_cell: int) -> tuple[CellInputs, GeneTiles]:
    """Cells of 30 types, 20 donors and 4 batches, with their expression; of 20 donors 2 are train, 9 select, 9 test."""
    rng = np.random.default_rng(0)
    known = dict.fromkeys(gene for genes in canonical_immune().genes for gene in genes)
    kind, donor = rng.integers(0, 30, n_cells), rng.integers(0, 20, n_cells)
    cells = CellInputs(
        split=np.array(["train", *["select", "test"] * 9, "train"])[donor].tolist(),
        genes=[*known, *(f"G{i}" for i in range(n_genes))][:n_genes],
        labels=[
            Labels.from_values("cell_type", [f"type {i}" for i in kind]),
            Labels.from_values("batch", [f"batch {i // 5}" for i in donor]),
        ],
        units=Labels.from_values("donor", [f"donor {i}" for i in donor]),
        gene_sets=[canonical_immune()],
    )
    gene = rng.integers(0, n_genes, (n_cells, per_cell))
    counts = sparse.csr_array(
        (1.0 + rng.poisson(0.5, gene.size), gene.ravel(), np.arange(0, gene.size + 1, per_cell)), (n_cells, n_genes)
    )
    counts.sum_duplicates()
    counts.data = np.log1p(counts.data * 1e4 / np.repeat(rng.integers(500, 3000, n_cells), np.diff(counts.indptr)))
    by_gene = counts.astype(np.float32).tocsc()
    bounds = split_by_size(np.diff(by_gene.indptr).tolist(), limit=RANGE_NONZEROS, most=RANGE_GENES)
    return cells, GeneTiles(lambda start, stop: by_gene[:, start:stop], bounds, cells.blocks())


def wide_range(cells: CellInputs, first: int, n_features: int) -> FeatureRange:
    """Features that are above zero in three quarters of the cells, some of them more in one type, with token counts."""
    rng = np.random.default_rng([1, first])
    kind, n_genes = cells.labels[0].codes, len(cells.genes)
    columns = []
    for feature in range(first, first + n_features):
        value = rng.gamma(2.0, 1.0, cells.n_cells) * np.where(kind == feature % 40, 2.0, 1.0)
        columns.append(np.where(rng.random(cells.n_cells) < 0.75, value, 0.0).astype(np.float32)[:, None])
    codes = sparse.hstack([sparse.csc_array(column) for column in columns]).tocsr()
    gene_tokens = rng.integers(1_000, 100_000, n_genes)
    fired = sparse.csr_array(rng.binomial(gene_tokens, rng.beta(0.1, 10, (n_features, n_genes))))
    counts = TokenStatistics(fired=fired, gene_tokens=gene_tokens)
    return FeatureRange(first=first, codes=codes, tokens={"select": counts, "test": counts})


def wide(n_cells: int, n_genes: int, per_cell: int, widths: list[int], profiled: int) -> None:
    """Time and memory of `measure` on full features; each width in a process of its own."""
    for width in widths:
        command = [sys.executable, __file__, "--wide-one", *map(str, (n_cells, n_genes, per_cell, width, profiled))]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})


def wide_one(n_cells: int, n_genes: int, per_cell: int, width: int, profiled: int) -> None:
    """Measure two ranges of so many features and print what they took."""
    cells, tiles = wide_inputs(n_cells, n_genes, per_cell)
    for first in (0, width):
        features = wide_range(cells, first, width)
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        profile = cProfile.Profile()
        start = time.process_time()
        if profiled and first:
            profile.runcall(measure, features, cells, tiles)
        else:
            measure(features, cells, tiles)
        seconds, nnz = time.process_time() - start, features.codes.nnz
        peak = memory("VmHWM")
        print(
            f"{width} features, {nnz / 1e6:.1f} M nonzeros, {'later' if first else 'first'} range: "
            f"{seconds / width:.3f} CPU s a feature, {seconds / nnz * 1e6:.2f} s a million nonzeros, "
            f"peak {peak / 1e9:.2f} GB, {(peak - before) / nnz:.0f} bytes a nonzero above the inputs",
            flush=True,
        )
        if profiled and first:
            pstats.Stats(profile).sort_stats("tottime").print_stats(profiled)
            pstats.Stats(profile).sort_stats("cumulative").print_stats("associations", 2 * profiled)


def memory(name: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


class Watch:
    """The processes that carry a mark: largest memory (driver with actors; all with Ray) and CPU seconds."""

    def __init__(self, mark: str) -> None:
        self.mark = f"{MARK}={mark}".encode()
        self.own = self.all = 0
        self._seconds: dict[int, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def seconds(self) -> float:
        """CPU seconds of the driver and the actors, up to the last look at each."""
        return sum(self._seconds.values())

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(LOOK_S):
            own = everything = 0
            for folder in Path("/proc").iterdir():
                try:
                    if not folder.name.isdigit() or self.mark not in (folder / "environ").read_bytes():
                        continue
                    command, stat = (folder / "cmdline").read_bytes(), (folder / "stat").read_text()
                    size = next(
                        int(line.split()[1])
                        for line in (folder / "smaps_rollup").read_text().splitlines()
                        if line.startswith("Pss:")
                    )
                except (OSError, StopIteration):
                    continue
                everything += size
                if b"ShardActor" in command or b"pipelines.associate" in command:
                    own += size
                    user, system = stat.rpartition(")")[2].split()[11:13]
                    self._seconds[int(folder.name)] = (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
            self.own, self.all = max(self.own, own), max(self.all, everything)


def associate(root: Path, run: str, n_actors: int) -> str:
    """The stage as a process, on a store without associations; a line of what it took."""
    mark = uuid.uuid4().hex
    environment = {**os.environ, MARK: mark, "OMP_NUM_THREADS": "1", "HOME": str(root)}
    for folder in [root / "store" / "associations", *(root / "store" / "cells").glob("*/expression")]:
        subprocess.run(["rm", "-rf", str(folder)], check=True)
    start = time.perf_counter()
    with Watch(mark) as watch:
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, run, str(n_actors), str(root / "store")],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    wall = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(done.stderr)
    tables = list((root / "store" / "associations").glob("*/feature_*/part-*.parquet"))
    rows = Counter[str]()
    for path in sorted(tables):
        rows[path.parent.name] += pl.scan_parquet(path).select(pl.len()).collect().item()
    told = ", ".join(f"{name} {n:,}" for name, n in rows.items())
    return (
        f"{n_actors} actors  wall {wall:6.1f} s  CPU {watch.seconds:6.1f} s  memory {watch.own / 1e6:5.2f} GB, "
        f"with Ray {watch.all / 1e6:5.2f} GB  rows: {told}"
    )


def loop(root: Path, run: str, n_sampled: int) -> None:
    """The field's loop on a few features against one call for all of them."""
    layout = Layout(root / "store")
    codes = CodesRun.open(layout.codes_dir(run))
    cells = read_cells(layout.cells_dir(codes.plan.dataset))
    rows = np.flatnonzero((cells["split"] == "test").to_numpy())
    matrix = load_cell_codes(codes, np.arange(cells.height))[rows]
    labels = Labels.from_values("cell_type", cells["cell_type"].to_numpy()[rows])
    maximum = matrix.max(axis=0).toarray().ravel().astype(np.float64)
    start = time.process_time()
    ours = ami_by_threshold(matrix, labels.one_hot(), maximum)
    all_at_once = time.process_time() - start
    chosen = np.argsort(-ours.max(axis=(0, 2)), kind="stable")[:n_sampled]
    worst, start = 0.0, time.process_time()
    for feature in chosen:
        column = matrix[:, [int(feature)]].toarray().ravel()
        scaled = column / column.max()
        for label in range(len(labels.names)):
            truth = labels.codes == label
            for i, threshold in enumerate(THRESHOLDS):
                found = adjusted_mutual_info_score(truth, scaled > threshold)
                worst = max(worst, abs(found - ours[i, feature, label]))
    looped = time.process_time() - start
    n_pairs = matrix.shape[1] * len(labels.names)
    scaled_up = looped / (chosen.size * len(labels.names)) * n_pairs
    print(f"AMI of {matrix.shape[1]} features x {len(labels.names)} labels x {len(THRESHOLDS)} cuts, {rows.size} cells")
    print(f"  one call               {all_at_once:10.2f} CPU s")
    print(f"  the field's loop       {scaled_up:10.0f} CPU s, from {chosen.size} features: {looped:.1f} s")
    print(f"  ratio                  {scaled_up / all_at_once:10.0f} x   largest difference {worst:.1e}")


def main() -> None:
    """Make the stores, associate, loop, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(50_000, 4096, 2000), metavar=("CELLS", "F", "GENES"))
    parser.add_argument("--k", type=int, default=32, help="features of a cell, about")
    parser.add_argument("--per-cell", type=int, default=200, help="genes of a cell, about")
    parser.add_argument("--actors", type=int, nargs="*", default=(1, 2))
    parser.add_argument("--linear", type=int, nargs="*", default=(25_000, 50_000, 100_000))
    parser.add_argument("--linear-genes", type=int, default=500)
    parser.add_argument("--loop-features", type=int, default=3)
    parser.add_argument("--wide", type=int, nargs="+", help="features of a range")
    parser.add_argument(
        "--wide-shape", type=int, nargs=3, default=(200_000, 2000, 60), metavar=("CELLS", "GENES", "PER_CELL")
    )
    parser.add_argument("--wide-one", type=int, nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--profile", type=int, default=0, help="lines of a profile by function")
    args = parser.parse_args()
    n_cells, n_features, n_genes = args.shape
    if args.wide_one:
        wide_one(*args.wide_one)
        return
    if args.wide:
        wide(*args.wide_shape, args.wide, args.profile)
        return
    with tempfile.TemporaryDirectory() as folder:
        run = make_store(Path(folder), n_cells, n_features, n_genes, args.k, args.per_cell)
        print(f"{n_cells} cells x {n_features} features (k {args.k}) x {n_genes} genes ({args.per_cell} a cell)")
        for n_actors in args.actors:
            print(associate(Path(folder), run, n_actors), flush=True)
        if args.loop_features:
            loop(Path(folder), run, args.loop_features)
    for n in args.linear:
        with tempfile.TemporaryDirectory() as folder:
            run = make_store(
                Path(folder), n, n_features, args.linear_genes, args.k, args.per_cell * args.linear_genes // n_genes
            )
            print(
                f"{n} cells x {args.linear_genes} genes: {associate(Path(folder), run, max(args.actors))}", flush=True
            )


if __name__ == "__main__":
    main()
