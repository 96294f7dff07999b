"""The whole job from an .h5ad to the answer of a question in SQL, stage by stage, with the cost of starting apart.

    python tests/benchmarks/bench_chain.py FILE.h5ad [--donor C] [--cell-type C] [--label C] [--steer NAME]
    python tests/benchmarks/bench_chain.py --synthetic 100000

Every stage is a process. It is started a second time, when it finds everything committed: that is the cost of Python,
of imports and of the checks of what is there. What Ray and its actors cost is measured by actors that do nothing. The
rest of a stage is its own work. The tables are Markdown.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))

from machine import as_markdown, machine_facts
from scale.chain import LAYER, N_FEATURES, N_STEPS, K
from scale.data import write_data
from scale.measure import bytes_by_folder, run, scsae

if TYPE_CHECKING:
    from collections.abc import Iterator

SYNTHETIC_LABELS = {"donor": "donor", "batch": "batch", "cell_type": "cell_type", "label": "condition"}
QUESTION = "SELECT feature_id, label, auroc, q FROM feature_label WHERE split = 'test' ORDER BY auroc DESC LIMIT 5"
RAY = """\
from pipelines.config import ActorOptions
from pipelines.runtime.actor_pool import do_shards
from pipelines.runtime.cluster import ray_session
class Nothing:
    def __init__(self, work):
        if work:
            import torch
    def shard(self, number):
        return {}
with ray_session():
    if N_ACTORS:
        options = ActorOptions(num_actors=N_ACTORS)
        do_shards(Nothing, True, range(N_ACTORS), options, title="nothing", note=lambda *_: "")
"""
"""Starts Ray, and actors that import torch, ends them and stops Ray."""
ON_RAY = {"extract": 2, "train": 1, "encode": 2, "associate": 2, "steer": 2}
"""Processes that a stage starts through Ray."""


def stages(data: Path, store: Path, options: Any) -> Iterator[tuple[str, list[str]]]:
    """The commands of the job, by the name of the stage."""
    labels = []
    for name in SYNTHETIC_LABELS:
        if column := getattr(options, name):
            labels += [f"--{name.replace('_', '-')}", column]
    place = ("--store", store)
    actors = ("--num-actors", ON_RAY["extract"], *place)
    yield "extract", scsae("extract", data, "--layer", LAYER, *labels, *actors)
    yield "train", scsae("train", "--n-features", N_FEATURES, "--k", K, "--n-steps", options.steps, *place)
    yield "encode", scsae("encode", *actors)
    yield "associate", scsae("associate", *actors)
    if options.steer:
        yield "steer", scsae("steer", "--target", options.steer, *actors)
    yield "sql", scsae("sql", QUESTION, *place)


def started(work: Path) -> dict[str, float]:
    """Wall seconds of what is started before any work: the medians of three."""
    commands = {
        "Python": [sys.executable, "-c", "pass"],
        "scsae --version": scsae("--version"),
        "scsae --help": scsae("--help"),
        "Ray alone": [sys.executable, "-c", RAY.replace("N_ACTORS", "0")],
        "Ray and 1 actor": [sys.executable, "-c", RAY.replace("N_ACTORS", "1")],
        "Ray and 2 actors": [sys.executable, "-c", RAY.replace("N_ACTORS", "2")],
    }
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "HOME": str(work)}
    found = {}
    for name, command in commands.items():
        seconds = []
        for _ in range(3):
            begun = time.perf_counter()
            subprocess.run(command, check=True, env=environment, cwd=root, capture_output=True)
            seconds.append(time.perf_counter() - begun)
        found[name] = sorted(seconds)[1]
        print(f"{name}: {found[name]:.2f} s", flush=True)
    return found


def measured(data: Path, work: Path, options: Any) -> list[dict[str, Any]]:
    """A record for each stage: what it took, what its start takes, and the bytes that it added."""
    root, records = Path(__file__).parents[2], []
    store = work / "store"
    for name, command in stages(data, store, options):
        before = bytes_by_folder(store)
        first = run(command, checkout=root, home=work, OMP_NUM_THREADS=str(options.threads))
        after = bytes_by_folder(store)
        again = run(command, checkout=root, home=work, OMP_NUM_THREADS=str(options.threads))
        grown = sum(after.values()) - sum(before.values())
        records.append({"stage": name, "first": first, "again": again, "bytes": grown})
        print(f"{name}: {first.as_dict()}", flush=True)
        if options.verbose:
            print(first.output, flush=True)
    return records


def report(records: list[dict[str, Any]], start: dict[str, float]) -> None:
    """Print the tables: the costs of starting, and each stage with the part of it that is its own work."""
    print("\n| start | s |\n|---|---|")
    for name, seconds in start.items():
        print(f"| {name} | {seconds:.2f} |")
    heads = ("wall s", "CPU s: all (driver, processes of Ray)", "start, s", "Ray, s", "own work, s", "own share", "MB")
    print("\n| stage | " + " | ".join(heads) + " |\n|---" + "|---" * len(heads) + "|")
    total = total_own = total_bytes = 0.0
    for record in records:
        first, name = record["first"], record["stage"]
        again = min(record["again"].wall_s, first.wall_s)
        # the start of Python and of the command line is in both figures
        n = ON_RAY.get(name, 0)
        ray = start[f"Ray and {n} actor" + "s" * (n > 1)] - start["scsae --version"] if n else 0.0
        own = max(first.wall_s - again - ray, 0.0) if n else first.wall_s - start["scsae --version"]
        cpu = f"{first.cpu_s:.1f} ({first.driver_cpu_s:.1f}, {first.actors_cpu_s + first.ray_cpu_s:.1f})"
        row = (f"{first.wall_s:.1f}", cpu, f"{again:.1f}", f"{ray:.1f}", f"{own:.1f}", f"{own / first.wall_s:.0%}")
        print(f"| {name} | " + " | ".join(row) + f" | {record['bytes'] / 1e6:.1f} |")
        total, total_own, total_bytes = total + first.wall_s, total_own + own, total_bytes + record["bytes"]
    print(f"| all | {total:.1f} | | | | {total_own:.1f} | {total_own / total:.0%} | {total_bytes / 1e6:.1f} |")


def main() -> None:
    """Measure the job on a file or on synthetic cells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="an .h5ad file of counts")
    parser.add_argument("--synthetic", type=int, default=0, help="number of synthetic cells, in place of a file")
    for name in SYNTHETIC_LABELS:
        parser.add_argument(f"--{name.replace('_', '-')}", default=None, help="column of obs")
    parser.add_argument("--steer", default=None, help="cell type to steer; default: no steering")
    parser.add_argument("--steps", type=int, default=N_STEPS, help="steps of training")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=None, help="folder for data and store (default: a temporary one)")
    parser.add_argument("--verbose", action="store_true", help="print what the stages print")
    options = parser.parse_args()
    if (options.data is None) == (options.synthetic == 0):
        parser.error("give a file, or --synthetic N")
    work = (options.work or Path(tempfile.mkdtemp(prefix="chain-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    try:
        if options.synthetic:
            for name, column in SYNTHETIC_LABELS.items():
                setattr(options, name, column)
            write_data(work / "cells.h5ad", options.synthetic)
        data = work / "cells.h5ad" if options.synthetic else options.data.resolve()
        start = started(work)
        report(measured(data, work, options), start)
        print("\n" + as_markdown(machine_facts("ray", "polars", "pyarrow")))
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
