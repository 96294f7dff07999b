"""The whole chain from an .h5ad to SQL at several numbers of cells: does anything grow faster than the cells?

The mini model, layer 2, F 1024, k 16. Every size is in a store of its own; each stage is a process whose figures are
kept in WORK/chain.jsonl, so that a size that was measured is not measured again.
"""

from __future__ import annotations

import json
import shutil
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from scale.data import write_data
from scale.measure import bytes_by_folder, run, scsae

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

LABELS = ("--donor", "donor", "--batch", "batch", "--cell-type", "cell_type", "--label", "condition")
LAYER, N_FEATURES, K, N_STEPS = 2, 1024, 16, 300
QUESTIONS = (
    "SELECT feature_id, auroc, q FROM feature_label WHERE label = 'type 03' AND split = 'test' ORDER BY auroc LIMIT 5",
    "SELECT feature_id, gene, pearson FROM feature_gene WHERE split = 'test' ORDER BY pearson DESC LIMIT 5",
    "SELECT cell_idx, value FROM codes WHERE feature_id = 7 ORDER BY value DESC LIMIT 5",
    "SELECT c.cell_type, COUNT(*) AS n FROM cells c GROUP BY c.cell_type ORDER BY n",
)
LIMIT_GROWTH, LIMIT_KB = 1.05, 6.0


def stages(data: Path, store: Path, options: Any) -> Iterator[tuple[str, list[str]]]:
    """The commands of the chain, by the name of the stage."""
    one = ("--num-actors", options.actors, "--store", store)
    sample = ("--cells", options.sample) if options.sample else ()
    tokens = ("--tokens-per-cell", options.tokens_per_cell) if options.tokens_per_cell else ()
    yield "extract", scsae("extract", data, "--layer", LAYER, *LABELS, *sample, *tokens, *one)
    yield "train", scsae("train", "--n-features", N_FEATURES, "--k", K, "--n-steps", N_STEPS, "--store", store)
    yield "encode", scsae("encode", "--fused", *options.encode, *one)
    yield "associate", scsae("associate", *one)
    for i, question in enumerate(QUESTIONS):
        yield f"sql {i}", scsae("sql", question, "--store", store)


def measure_size(n_cells: int, options: Any) -> list[dict[str, Any]]:
    """Run the chain on `n_cells` cells and return a record for each stage."""
    folder = options.work / f"{options.name}-{n_cells}"
    store, data = folder / "store", options.work / f"cells-{n_cells}.h5ad"
    folder.mkdir(parents=True, exist_ok=True)
    kept, records = options.work / f"{options.name}-{n_cells}.jsonl", []
    if kept.exists():
        records = [json.loads(line) for line in kept.read_text().splitlines()]
    started = time.process_time()
    if not data.exists():
        write_data(data.with_suffix(".part"), n_cells)
        data.with_suffix(".part").rename(data)
        print(f"{n_cells:,} cells: data written in {time.process_time() - started:.0f} CPU s", flush=True)
    known = {record["stage"] for record in records}
    for name, command in stages(data, store, options):
        if name in known:
            continue
        before = bytes_by_folder(store)
        found = run(command, checkout=options.checkout, home=folder)
        after = bytes_by_folder(store)
        grown = {k: v - before.get(k, 0) for k, v in after.items() if v != before.get(k, 0)}
        record = {"stage": name, "cells": n_cells, **found.as_dict(), "bytes": grown}
        records.append(record)
        with kept.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{n_cells:,} {name}: " + json.dumps(found.as_dict()), flush=True)
        if options.verbose:
            print(found.output, flush=True)
    if not options.keep:
        shutil.rmtree(folder, ignore_errors=True)
    return records


def report(sizes: Sequence[int], of_size: dict[int, list[dict[str, Any]]]) -> None:
    """Print CPU seconds of each stage and size, growth over proportional growth, memory, and disk."""
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for n in sizes:
        for record in of_size[n]:
            by_stage.setdefault(record["stage"], []).append(record)
    heads = [f"{n:,} cells" for n in sizes]

    def rows(text: Callable[[dict[str, Any]], str]) -> dict[str, list[str]]:
        return {name: [text(record) for record in records] for name, records in by_stage.items()}

    _table(
        "CPU s: all, driver, actors, Ray",
        heads,
        rows(lambda r: f"{r['cpu_s']:.0f}, {r['driver_cpu_s']:.0f}, {r['actors_cpu_s']:.0f}, {r['ray_cpu_s']:.0f}"),
    )
    _table("CPU s a 1,000 cells", heads, rows(lambda r: f"{1000 * r['cpu_s'] / r['cells']:.2f}"))
    if len(sizes) > 1:
        _table(
            f"CPU s over proportional growth (limit {LIMIT_GROWTH}), and CPU s of 1,000 further cells",
            [f"{n:,} to {m:,}" for n, m in pairwise(sizes)],
            {name: [_growth(a, b) for a, b in pairwise(records)] for name, records in by_stage.items()},
        )
    for role, who in {"driver": "the driver", "actor": "one actor"}.items():
        text = rows(lambda r, role=role: f"{r[role + '_rss_mb']:.0f} ({r[role + '_pss_mb']:.0f})")
        _table(f"peak MB of {who}: RSS (PSS)", heads, text)
    kb = {
        folder: [sum(r["bytes"].get(folder, 0) for r in of_size[n]) / n / 1000 for n in sizes]
        for folder in sorted({folder for n in sizes for record in of_size[n] for folder in record["bytes"]})
        if not folder.startswith("activations")
    }
    kb["all but activations"] = [sum(column) for column in zip(*kb.values(), strict=True)]
    shown = {folder: [f"{value:.2f}" for value in values] for folder, values in kb.items() if max(values) > 0.005}
    _table(f"kB a cell on disk (limit {LIMIT_KB} for all but activations)", heads, shown)


def _growth(a: dict[str, Any], b: dict[str, Any]) -> str:
    further = (b["cpu_s"] - a["cpu_s"]) / (b["cells"] - a["cells"])
    return f"{b['cpu_s'] / a['cpu_s'] * a['cells'] / b['cells']:.2f}, {1000 * further:.2f}"


def _table(title: str, heads: Sequence[str], rows: dict[str, list[str]]) -> None:
    """Print a table of Markdown."""
    print(f"\n| {title} | " + " | ".join(heads) + " |\n|---" + "|---" * len(heads) + "|")
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(values) + " |")


def main(options: Any) -> None:
    """Measure every size, then print the tables."""
    report(options.cells, {n: measure_size(n, options) for n in options.cells})
