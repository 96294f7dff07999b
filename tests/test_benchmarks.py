"""Every benchmark runs: at its smallest size, so that no change leaves one behind that nobody can run."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from sampled import sampled

FOLDER = Path(__file__).parent / "benchmarks"
DATA = ("--data", "kang18_ifnb_2000x9015_counts.h5ad")
SHAPE = ("--shape", "64", "16", "64", "4")
ONCE = ("--repeats", "1", "--threads", "1")

ALONE = {
    "addresses": "--cells 200 --values 50",
    "aido_cell": (*DATA, "--cells", "1", "--layers", "1", *ONCE),
    "effects": "--tokens 20 --nulls 2 --cells 3",
    "formats": "--cells 300 600",
    "ingest": "--cells 300 600",
    "inputs": "--tokens 20 --genes 5 --cells 2",
    "nicheformer": (*DATA, "--cells", "1", "--layers", "1", *ONCE),
    "peers": (*SHAPE, *ONCE),
    "quality": "planted --features 16 --d-model 8 --tokens 16384 --k 2 --steps 20 --batch 256 --threads 1",
    "query": "--cells 2000 --nonzeros 20000 --features 32 --shard-cells 500 --repeats 2 --cold-repeats 1",
    "reductions": "--blocks 1 --repeats 1",
    "sae_step": (*SHAPE, *ONCE),
    "scfm": (*DATA, "--cells", "1", *ONCE),
    "steering": "--cells 2 --variants 2 --features 4 --repeats 1 --model mini-240",
    "stream": "--threads 1 --shape 64 16 64 4 --groups 2",
    "transcriptformer": (*DATA, "--cells", "1", *ONCE),
    "uce": (*DATA, "--cells", "1", "--width", "16", *ONCE),
    "world": "--features 64 --d-model 16 --l0 4 --k 4 --steps 20 --batch 256 --threads 1",
}
"""Options of the benchmarks that need neither Ray nor a browser."""

WITH_RAY = {
    "associations": "--shape 300 80 20 --k 4 --per-cell 10 --actors 1 --linear 100 --linear-genes 20 --loop-features 1",
    "chain": "--synthetic 200 --steps 10",
    "extract": ("speed", *DATA, "--cells", "40", "--shard-cells", "10", "--repeats", "1"),
    "matrix_tables": "--cells 210000 --per-cell 4 --actors 0 1",
}
"""Options of those that start Ray, each in processes of their own."""

SCALE = {
    "cells": "",
    "panel": "",
    "table": "",
    "chain": "--keep --sample 0",
    "queries": "",
    "wide": "--features 64 --panel 1000 --actors 1",
}
"""Options of the parts of the benchmark of scale; `queries` asks the store that `chain` keeps."""

WITH_A_BROWSER = {"atlas": "--features 64 --cells 500 --labels 4"}

IN_SECONDS = ["effects", "inputs", "peers", "quality", "reductions", "sae_step", "steering", "world"]
"""Benchmarks that take a second or two so, and are in the default run."""


def test_no_benchmark_is_left_out() -> None:
    found = {path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py")}
    assert found == {*ALONE, *WITH_RAY, *WITH_A_BROWSER, "scale"}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], request: pytest.FixtureRequest):
    """Run a benchmark in this process, as `python tests/benchmarks/bench_NAME.py` does; what it printed."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    threads = torch.get_num_threads()

    def run_one(name: str, options: str | tuple[str, ...]) -> str:
        words = options.split() if isinstance(options, str) else list(options)
        if DATA[1] in words:
            words[words.index(DATA[1])] = str(request.getfixturevalue("scsae_data") / DATA[1])
        monkeypatch.setattr(sys, "argv", [f"bench_{name}.py", *words])
        runpy.run_path(str(FOLDER / f"bench_{name}.py"), run_name="__main__")
        return capfd.readouterr().out

    yield run_one
    torch.set_num_threads(threads)


def has_figures(printed: str) -> bool:
    """Whether the last line has a figure with a unit or in a table."""
    return any(character.isdigit() for character in printed.strip().splitlines()[-1])


@pytest.mark.parametrize("name", sampled(ALONE, keep=IN_SECONDS))
def test_a_benchmark_without_ray_runs_and_prints_figures(run, name: str) -> None:
    assert has_figures(run(name, ALONE[name]))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", WITH_RAY)
def test_a_benchmark_with_ray_runs_and_prints_figures(run, name: str) -> None:
    assert has_figures(run(name, WITH_RAY[name]))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1500)
def test_every_part_of_the_benchmark_of_scale_runs_and_prints_figures(run, tmp_path: Path) -> None:
    for part, options in SCALE.items():
        printed = run("scale", f"{part} --cells 20000 --work {tmp_path} {options}")
        assert has_figures(printed), part


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("name", WITH_A_BROWSER)
def test_a_benchmark_with_a_browser_runs_and_prints_figures(run, name: str) -> None:
    assert has_figures(run(name, WITH_A_BROWSER[name]))
