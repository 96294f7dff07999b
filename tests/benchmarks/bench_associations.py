"""All associations of a synthetic codes run with their tests: wall time, CPU seconds, memory; and the field's loop.

    python tests/benchmarks/bench_associations.py [--shape 50000 4096 2000] [--k 32] [--per-cell 200] [--actors 1 2]
        [--linear 25000 50000 100000] [--linear-genes 500] [--loop-features 3]

A store is made of random cells (40 cell types, 8 donors, 4 batches and 2 conditions; of one donor the cells are train,
of four select, of three test: 7 of 8 cells are tested) and of codes that prefer cell types. The stage `associate` runs
over it in a process: Ray, turning the expression, measuring, assembling and every commit are in the time. memory: the
largest sum of the proportional set sizes (PSS) of the driver and its actors, and apart with Ray's own processes and its
object store. Then the same over more and more cells, with fewer genes, to see that cost is linear.

The loop is what the field uses: for each feature and label the codes as a dense column over its maximum, cut at .0, .2,
.4, .6, .8, and sklearn's AMI of each cut. It is timed on a few features, scaled by pairs, and its AMI compared with
that of `ami_by_threshold` on the same cells.
"""

import argparse
import os
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

from feature_store.associations import Labels, ami_by_threshold
from feature_store.associations.mutual_information import THRESHOLDS
from feature_store.cells import open_source, read_cells, write_cells
from feature_store.codes import CodesRun, TokenCodes, load_cell_codes
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from feature_store.storage.plans import CodesPlan, FusedForward
from pipelines.inputs import GENES_TABLE, save_source_location

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
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
    cells = write_cells(
        layout, source, donor="donor", batch="batch", cell_type="type", labels=["condition"], split_column="part"
    )
    dataset = str(cells["dataset"][0])
    save_source_location(layout, dataset, source)
    plan = toy_plan(
        CodesPlan, sae="bench", dataset=dataset, fused=toy_plan(FusedForward), activations="none", n_features=n_features
    )
    codes = CodesRun.create(layout.codes_dir("bench"), plan, n_shards=-(-n_cells // 10_000))
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
        codes.commit_shard(shard, tokens, start=start, stop=stop, split_of_cell=cells["split"].to_numpy())
    codes.finalize()
    return codes.folder.name


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
    matrix = load_cell_codes(codes.by_cell, cells.height)[rows]
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
    args = parser.parse_args()
    n_cells, n_features, n_genes = args.shape
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
