"""The cell table of many cells: splits, panel, genes and digests, in the driver and two actors.

The cells are those of `scale.data` with three counts each, because the pass over the matrix, which is linear in its
values and done by the actors, is measured by bench_matrix_tables.py; names and four columns of categories are as ever.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from feature_store.cells import PANEL_CELLS, open_source, read_panel, write_cells
from feature_store.storage.layout import Layout
from pipelines.config import ActorOptions
from pipelines.matrix_tables import tables_by_actors

sys.path.insert(0, str(Path(__file__).parents[1]))
from scale.data import write_data
from scale.measure import bytes_by_folder, run

MEAN_COUNTS = 3.0


def write_table(data: Path, store: Path, n_actors: int) -> None:
    """Write the tables of a data set as `scsae extract` does, and print the cells of the panel."""
    layout = Layout(store)
    with open_source(data) as source, tables_by_actors(layout, source, ActorOptions(num_actors=n_actors)) as tables:
        dataset = write_cells(
            layout,
            source,
            donor="donor",
            batch="batch",
            cell_type="cell_type",
            labels=["condition"],
            panel=PANEL_CELLS,
            make_tables=tables,
        )
    print(len(read_panel(layout.cells_dir(dataset))))


def main(options: Any) -> None:
    """Write and measure the table of each number of cells."""
    for n_cells in options.cells:
        folder = options.work / f"table-{n_cells}"
        folder.mkdir(parents=True, exist_ok=True)
        data, store = folder / "cells.h5ad", folder / "store"
        began = time.process_time()
        if not data.exists():
            write_data(data, n_cells, mean_counts=MEAN_COUNTS)
        size = data.stat().st_size / 1e9
        print(f"{n_cells:,} cells: a file of {size:.1f} GB, {time.process_time() - began:.0f} CPU s", flush=True)
        command = [sys.executable, str(Path(__file__)), "--scale-driver", str(data), str(store), str(options.actors)]
        found = run(command, checkout=options.checkout, home=folder)
        print("  " + json.dumps(found.as_dict()))
        for name, stored in bytes_by_folder(store).items():
            print(f"  {name:20}{stored / n_cells:8.1f} bytes a cell")
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale-driver", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("data", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument("actors", type=int)
    given = parser.parse_args()
    write_table(given.data, given.store, given.actors)
