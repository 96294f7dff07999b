"""What the pipeline around the model costs: speed, memory, and the time that a kill loses. Markdown on stdout.

    python tests/benchmarks/bench_extract.py speed --data $SCSAE_DATA/kang18_ifnb_2000x9015_counts.h5ad
        [--cells 1000] [--layer 2] [--shard-cells 50] [--repeats 3] [--cpu-time]
    python tests/benchmarks/bench_extract.py memory [--cells 10000 1000000] [--genes 8] [--shard-cells 10000]
    python tests/benchmarks/bench_extract.py kill --data FILE.h5ad [--repeats 3]
    python tests/benchmarks/bench_extract.py profile --data FILE.h5ad

speed: cells/s of `scsae extract` with one and with two actors of one thread against the same model over the same
batches in one process of one thread, tokens made beforehand: no file, no Ray. The three take turns, a figure is the
median of the repeats, a ratio the median of the ratios of one turn. Steady state: from the first shards committed to
the last, by the time stamps of their markers; what comes before is the start. With --cpu-time, seconds are CPU
seconds, of each actor: for a machine that others use (and blind to waits for the disk).
memory: the largest sum of the proportional set sizes (PSS, /proc/PID/smaps_rollup) of the driver, the actors and Ray's
processes, for generated cells of few genes.
kill: seconds by which a run that loses an actor, or its driver and is run again, takes longer than a calm one.
profile: where the time of an actor goes, by cProfile, without Ray.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import os
import pstats
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MARK = "SCSAE_BENCH_RUN"


class Run(NamedTuple):
    """One `scsae extract`: when it began, and when each shard was committed, in seconds since then."""

    commits: list[float]
    wall: float

    def steady(self, shard_cells: int, n_actors: int) -> float:
        """Cells per second from the first commit of each actor to the last commit."""
        return shard_cells * (len(self.commits) - n_actors) / (self.commits[-1] - self.commits[n_actors - 1])


class Extraction:
    """`scsae extract` with a store and a home of its own, known by an environment variable."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        self.folder, self.mark = folder, uuid.uuid4().hex
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SCSAE_"))}
        self.environment = {**kept, "HOME": str(folder), "OMP_NUM_THREADS": "1", MARK: self.mark}
        self.command = [sys.executable, "-m", "pipelines.cli", "extract", *arguments, "--store", str(folder / "store")]
        self.driver: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.folder / "log").open("a") as log:
            self.driver = subprocess.Popen(self.command, env=self.environment, stdout=log, stderr=log)

    def wait(self) -> None:
        assert self.driver is not None
        if self.driver.wait():
            raise SystemExit(f"{' '.join(self.command)} failed:\n{(self.folder / 'log').read_text()[-3000:]}")

    def markers(self) -> list[Path]:
        return list(self.folder.glob("store/activations/*/part-*.json"))

    def processes(self) -> dict[int, str]:
        """Kind (driver, actor, Ray) of each process of the run, by id."""
        found = {}
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if folder.name.isdigit() and f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes():
                    command = (folder / "cmdline").read_bytes()
                    kind = "actors" if b"ray::ShardActor" in command else "driver" if b"extract" in command else "Ray"
                    found[int(folder.name)] = kind
        return found


@contextlib.contextmanager
def extraction(arguments: list[str]) -> Iterator[Extraction]:
    """An extraction in a temporary folder, whose processes end with the block."""
    folder = Path(tempfile.mkdtemp(prefix="bench"))
    run = Extraction(folder, arguments)
    try:
        yield run
    finally:
        for process in run.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def timed(arguments: list[str], disturb: Callable[[Extraction], None] = lambda _: None) -> Run:
    """Extract, with something done to it meanwhile."""
    with extraction(arguments) as run:
        began = time.time()
        run.start()
        disturb(run)
        run.wait()
        wall = time.time() - began
        return Run(sorted(path.stat().st_mtime - began for path in run.markers()), wall)


def cpu_seconds(process: int) -> float:
    """CPU time of a process so far; 0 if it ended."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def watch_cpu(run: Extraction, seen: list[tuple[int, float]]) -> None:
    """Note the shards committed and the CPU seconds of the actors, over and over until the run ends."""
    while run.driver is not None and run.driver.poll() is None:
        actors = [process for process, kind in run.processes().items() if kind == "actors"]
        n_committed, seconds = len(run.markers()), sum(map(cpu_seconds, actors))
        if actors and n_committed and all(map(cpu_seconds, actors)):
            seen.append((n_committed, seconds))
        time.sleep(0.1)


def some_cells(data: Path, n_cells: int, folder: Path) -> Path:
    """A file of the first cells."""
    import anndata

    file = folder / "cells.h5ad"
    cells = anndata.read_h5ad(data)
    cells[: min(n_cells, cells.n_obs)].copy().write_h5ad(file)
    return file


def extractor(data: Path, options: argparse.Namespace, folder: Path) -> tuple[object, int]:
    """The body of an actor, and its number of shards."""
    from pipelines.config import ExtractOptions
    from pipelines.extract import Extractor, Workload, extract

    given = ExtractOptions(data=(data,), model=options.model, layer=(options.layer,), shard_cells=options.shard_cells)
    caught: list[Workload] = []

    def catch(_worker: type, work: Workload, *_arguments: object, **_options: object) -> None:
        caught.append(work)
        raise KeyboardInterrupt

    import pipelines.extract

    pipelines.extract.do_shards = catch
    with contextlib.suppress(KeyboardInterrupt):
        extract(given, folder / "store")
    return Extractor(caught[0]), -(-caught[0].n_cells // options.shard_cells)


def bare(options: argparse.Namespace) -> None:
    """Print the cells per second of the model alone, over the batches of the extraction's shards, after one shard."""
    import torch

    from pipelines.forward import BLOCK_TOKENS, READ_CELLS, cut_cells
    from sae_core.scfm import Site

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        body, n_shards = extractor(options.data, options, Path(folder))
    forward, n_cells, site = body.forward, body.work.n_cells, (Site.parse(f"layer.{options.layer}"),)
    blocks = []
    for start in range(0, n_cells, options.shard_cells):
        stop = min(start + options.shard_cells, n_cells)
        for low in range(start, stop, READ_CELLS):
            rows = forward.source.read_rows(low, min(low + READ_CELLS, stop))
            tokens = forward.model.tokenize(rows.indptr, rows.indices, rows.data, forward.match, seed=0)
            blocks += [tokens.cells(first, last) for first, last in cut_cells(tokens.lengths, BLOCK_TOKENS)]
    n_warm = -(-len(blocks) // n_shards)
    clock = time.process_time if options.cpu_time else time.perf_counter
    began = n_done = 0.0
    for i, tokens in enumerate(blocks):
        if i == n_warm:
            began = clock()
        forward.model.activations(tokens, site, max_batch_tokens=forward.batch_tokens)
        n_done += tokens.n_cells if i >= n_warm else 0
    print(n_done / (clock() - began))


def speed(options: argparse.Namespace) -> None:
    """Print the table of cells per second."""
    with tempfile.TemporaryDirectory() as folder:
        data = some_cells(options.data, options.cells, Path(folder))
        common = ["--model", options.model, "--layer", options.layer, "--shard-cells", str(options.shard_cells)]
        rows: list[tuple[float, float, float]] = []
        starts: list[float] = []
        for _ in range(options.repeats):
            command = [sys.executable, __file__, "bare", "--data", str(data), *common]
            command += ["--cpu-time"] if options.cpu_time else []
            alone = float(subprocess.check_output(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).split()[-1])
            found = []
            for n_actors in (1, 2):
                cpu: list[tuple[int, float]] = []
                watch = (lambda run, cpu=cpu: watch_cpu(run, cpu)) if options.cpu_time else lambda _: None
                run = timed([str(data), *common, "--num-actors", str(n_actors)], watch)
                steady = run.steady(options.shard_cells, n_actors)
                starts.append(run.commits[n_actors - 1] - options.shard_cells * n_actors / steady)
                if options.cpu_time:
                    (n_first, first), (n_last, last) = cpu[0], cpu[-1]
                    steady = n_actors * options.shard_cells * (n_last - n_first) / (last - first)
                found.append(steady)
            rows.append((alone, *found))
    alone, one, two = (statistics.median(column) for column in zip(*rows, strict=True))
    share = statistics.median(row[1] / row[0] for row in rows)
    gain = statistics.median(row[2] / row[1] for row in rows)
    print(
        f"{options.data.name}, {options.model}, layer {options.layer}, {options.cells} cells, {options.repeats} turns"
    )
    unit = "cells/s, had each a core of its own" if options.cpu_time else "cells/s"
    print(f"\n| | {unit} | ratio | target |\n|---|---|---|---|")
    print(f"| model alone, 1 thread | {alone:.1f} | | |")
    print(f"| 1 actor of 1 thread | {one:.1f} | {share:.3f} of the model alone | .90 |")
    print(f"| 2 actors of 1 thread | {two:.1f} | {gain:.2f} of 1 actor | 1.80 |")
    print(f"\nFrom the command to the first shard, less that shard: {statistics.median(starts):.1f} s (median).")


def generate(file: Path, n_cells: int, n_genes: int, genes: list[str], block: int = 50_000) -> None:
    """Write an .h5ad of cells with `n_genes` counts each, block by block."""
    import h5py

    rng = np.random.default_rng(0)
    text = h5py.string_dtype()

    def frame(parent: h5py.File, name: str, index: Iterator[str], length: int) -> None:
        group = parent.create_group(name)
        group.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"})
        group.attrs.create("column-order", np.array([], dtype=object), dtype=text)
        names = group.create_dataset("_index", (length,), dtype=text, chunks=(min(length, block),))
        names.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
        for low in range(0, length, block):
            names[low : low + block] = [next(index) for _ in range(min(block, length - low))]

    with h5py.File(file, "w") as out:
        out.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        frame(out, "obs", (f"cell{i}" for i in range(n_cells)), n_cells)
        frame(out, "var", iter(genes), len(genes))
        matrix = out.create_group("X")
        matrix.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
        matrix.attrs["shape"] = np.array([n_cells, len(genes)])
        matrix.create_dataset("indptr", data=np.arange(n_cells + 1, dtype=np.int64) * n_genes)
        size, chunks = (n_cells * n_genes,), (min(n_cells, block) * n_genes,)
        values = matrix.create_dataset("data", size, dtype=np.float32, chunks=chunks)
        columns = matrix.create_dataset("indices", size, dtype=np.int32, chunks=chunks)
        stride = len(genes) // n_genes
        for low in range(0, n_cells, block):
            n = min(block, n_cells - low)
            where = slice(low * n_genes, (low + n) * n_genes)
            columns[where] = (rng.integers(0, stride, (n, n_genes)) + stride * np.arange(n_genes)).ravel()
            values[where] = rng.integers(1, 9, n * n_genes)


def pss_bytes(process: int) -> int:
    """Proportional set size of a process; 0 if it ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def memory(options: argparse.Namespace) -> None:
    """Print the table of peaks."""
    from sae_core.scfm import load_model

    genes = [token for token in load_model("mini").vocabulary.tokens if not token.startswith("<")][:2000]
    print(f"{options.genes} genes a cell, mini model, {options.tokens_per_cell} tokens kept, 2 actors of 1 thread\n")
    print(
        "| cells | driver | actors | driver + actors | Ray | all | wall | cells/s |\n|---|---|---|---|---|---|---|---|"
    )
    for n_cells in options.cells:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "cells.h5ad"
            generate(data, n_cells, options.genes, genes)
            arguments = [str(data), "--layer", "1", "--shard-cells", str(options.shard_cells), "--num-actors", "2"]
            peaks: Counter[str] = Counter()
            run = timed(
                [*arguments, "--tokens-per-cell", str(options.tokens_per_cell)],
                lambda run, peaks=peaks: sample(run, peaks),
            )
        figures = " | ".join(f"{peaks[name] / 1e9:.2f} GB" for name in ("driver", "actors", "ours", "Ray", "all"))
        steady = run.steady(options.shard_cells, 2) if len(run.commits) > 2 else float("nan")
        print(f"| {n_cells:,} | {figures} | {run.wall:.0f} s | {steady:,.0f} |", flush=True)


def sample(run: Extraction, peaks: Counter[str]) -> None:
    """Take the PSS of every process of the run twice a second until it ends; keep the largest sums."""
    while run.driver is not None and run.driver.poll() is None:
        now: Counter[str] = Counter()
        for process, kind in run.processes().items():
            now[kind] += pss_bytes(process)
        now["ours"], now["all"] = now["driver"] + now["actors"], sum(now.values())
        for name, size_bytes in now.items():
            peaks[name] = max(peaks[name], size_bytes)
        time.sleep(0.5)


def kill(options: argparse.Namespace) -> None:
    """Print the seconds that a kill costs."""

    def strike(kind: str, run: Extraction) -> None:
        while len(run.markers()) < options.cells / options.shard_cells / 3:
            time.sleep(0.02)
        victim = next(process for process, found in run.processes().items() if found == kind)
        os.kill(victim, signal.SIGKILL)
        if kind == "driver":
            assert run.driver is not None
            run.driver.wait()
            run.start()

    with tempfile.TemporaryDirectory() as folder:
        data = some_cells(options.data, options.cells, Path(folder))
        common = [str(data), "--model", options.model, "--layer", options.layer, "--num-actors", "2"]
        common += ["--shard-cells", str(options.shard_cells)]
        lost: dict[str, list[float]] = {"actors": [], "driver": []}
        walls = []
        for _ in range(options.repeats):
            calm = timed(common).wall
            walls.append(calm)
            for kind, seconds in lost.items():
                seconds.append(timed(common, lambda run, kind=kind: strike(kind, run)).wall - calm)
    print(f"calm: {statistics.median(walls):.1f} s, 2 actors, {options.repeats} turns, medians")
    print("\n| killed | seconds lost |\n|---|---|")
    print(f"| one of two actors | {statistics.median(lost['actors']):.1f} |")
    print(f"| the driver, run again at once | {statistics.median(lost['driver']):.1f} |")


PARTS = {
    "model": ("foundation.py", ("activations", "embeddings")),
    "reading rows": ("", ("read_rows",)),
    "tokenizing": ("", ("tokenize",)),
    "choosing tokens": ("forward.py", ("choose_tokens",)),
    "rounding and Parquet": ("activations.py", ("write", "__exit__", "close")),
    "sha256": ("files.py", ("sha256",)),
    "fsync and rename": ("files.py", ("flush", "put", "replace_text")),
}
"""File and functions whose cumulative time is a part; they do not call each other."""


def profile(options: argparse.Namespace) -> None:
    """Print where the time of an actor goes."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        body, n_shards = extractor(some_cells(options.data, options.cells, Path(folder)), options, Path(folder))
        body.shard(0)
        profiler = cProfile.Profile()
        with profiler:
            for shard in range(1, n_shards):
                body.shard(shard)
    stats = pstats.Stats(profiler)
    whole = stats.total_tt
    print(f"{whole:.1f} s in {n_shards - 1} shards of {options.shard_cells} cells\n\n| part | share |\n|---|---|")
    rest = whole
    for part, (file, functions) in PARTS.items():
        seconds = max_by_file(stats, file, functions)
        rest -= seconds
        print(f"| {part} | {seconds / whole:.2%} |")
    print(f"| the rest | {rest / whole:.2%} |")
    if options.lines:
        stats.sort_stats("cumulative").print_stats(options.lines)


def max_by_file(stats: pstats.Stats, file: str, functions: tuple[str, ...]) -> float:
    """Cumulative seconds of functions in the project's files of that name."""
    ours = ("pipelines", "feature_store", "sae_core")
    return sum(
        cumulative
        for (path, _, name), (_, _, _, cumulative, _) in stats.stats.items()  # type: ignore[attr-defined]
        if name in functions and path.endswith(file) and any(f"/{package}/" in path for package in ours)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    for name in ("speed", "kill", "profile", "bare"):
        mode = modes.add_parser(name)
        mode.add_argument("--data", type=Path, required=True)
        mode.add_argument("--cells", type=int, default=1000)
        mode.add_argument("--model", default="mini")
        mode.add_argument("--layer", default="2")
        mode.add_argument("--shard-cells", type=int, default=50)
        mode.add_argument("--repeats", type=int, default=3)
        mode.add_argument("--cpu-time", action="store_true", help="speed: on a machine that others use")
        mode.add_argument("--lines", type=int, default=0, help="profile: also so many lines of cProfile")
    mode = modes.add_parser("memory")
    mode.add_argument("--cells", type=int, nargs="+", default=[10_000, 1_000_000])
    mode.add_argument("--genes", type=int, default=8)
    mode.add_argument("--tokens-per-cell", type=int, default=2)
    mode.add_argument("--shard-cells", type=int, default=10_000)
    options = parser.parse_args()
    {"speed": speed, "memory": memory, "kill": kill, "profile": profile, "bare": bare}[options.mode](options)


if __name__ == "__main__":
    main()
