"""A million cells from .h5ad to SQL, the codes of a wide SAE, and what a panel of cells says about all of them.

    python tests/benchmarks/bench_scale.py chain [--cells 100000 300000 1000000] [--work FOLDER]
    python tests/benchmarks/bench_scale.py cells|table|panel|wide|driver|queries|all

cells: writing the synthetic cells. table: the cell table with its panel, also of 10 and 100 million cells. chain: every
stage at three sizes. panel: statistics of planted features from the panel beside those of all cells. wide: codes of
8,192 features, three quarters full, without the model. driver: what grows in the driver with the number of shards.
queries: look-ups in the largest store of the chain. Tables are printed; figures that were measured are in
docs/measured.md with the machine.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

# a part without a module is a script of its own
PARTS = {
    "cells": "scale.data",
    "table": "scale.cell_table",
    "chain": "scale.chain",
    "panel": "scale.panel_truth",
    "wide": "scale.wide",
    "driver": None,
    "queries": "scale.queries",
}


def main() -> None:
    """Run one part, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--cells", type=int, nargs="+", default=[100_000, 300_000, 1_000_000])
    parser.add_argument("--work", type=Path, default=Path("scale-work"), help="folder for data, stores and figures")
    parser.add_argument("--keep", action="store_true", help="keep the stores of the chain")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--sample", type=int, default=50_000, help="cells of the training sample; 0: all cells")
    parser.add_argument("--tokens-per-cell", type=int, default=0, help="tokens a cell to train on; 0: all")
    parser.add_argument("--encode", nargs="*", default=[], help="further options of encode, e.g. --encode=--keep=256")
    parser.add_argument("--features", type=int, default=8192, help="features of the wide codes")
    parser.add_argument("--panel", type=int, default=200_000, help="cells of the panel of the wide codes")
    parser.add_argument(
        "--checkout", type=Path, default=Path(__file__).parents[2], help="folder of the code to measure"
    )
    parser.add_argument("--name", default="chain", help="name of the figures and stores of the chain")
    parser.add_argument("--verbose", action="store_true", help="print what the stages print")
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    for name in PARTS if options.part == "all" else [options.part]:
        module = PARTS[name]
        if module is None:
            script = Path(__file__).parent / "scale" / f"{name}.py"
            subprocess.run([sys.executable, script, "--folder", options.work], check=True)
        else:
            importlib.import_module(module).main(options)


if __name__ == "__main__":
    main()
