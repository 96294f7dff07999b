"""Codes of 8,192 features, three quarters full, written and associated without a model.

The cells are those of `scale.data` with their panel. Each has N_TOKENS tokens in which a share of the features fires;
`reduce_shard` and `CodesRun` make of them what an encoder would have made. By number, a feature follows a type (0
modulo 4), the gene of the token (1), a batch (2) or nothing (3): it fires in all tokens of its target that it is drawn
for, with larger codes, and in a share of the others. Cells outside the panel, of which only the largest codes are kept,
have fewer features in a token. Actors write the codes, by cell and by feature, and then `scsae associate` runs, each as
a process of its own; what drawing the codes takes, which is no part of the work, is told apart.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch

from feature_store.cells import open_source, read_panel, read_split_numbers, save_source_location, write_cells
from feature_store.codes import CodesRun, cells_of_shard, span_of_shard
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from feature_store.storage.plans import CodesCut, CodesPlan, FusedForward
from pipelines.config import ActorOptions
from pipelines.encode import TokenBlock, merge_statistics, reduce_shard
from pipelines.inputs import GENES_TABLE
from pipelines.runtime.actor_pool import do_shards
from sae_core.sae import SparseCodes

sys.path.insert(0, str(Path(__file__).parents[1]))
from scale.data import Planted, write_data
from scale.measure import bytes_by_folder, run, scsae

if TYPE_CHECKING:
    from collections.abc import Iterator

N_TOKENS = 8
MEAN_GAP, MEAN_GAP_OTHER = 5.0, 120.0
"""Mean distance of two features that fire in one token, in the panel and outside."""
BLOCK_CELLS = 500
OTHER_CELLS, PANEL_ENTRIES = 25_000, 16_000_000
KEEP, TOP_CELLS, TOP_TOKENS = 256, 100, 20
KINDS = ("type", "gene", "batch", "nothing")


class Tokens:
    """Codes of the tokens of any cells; a cell's depend on (seed, block of cells) alone."""

    def __init__(self, n_cells: int, n_features: int, seed: int = 0) -> None:
        planted = Planted(seed)
        labels = planted.labels(n_cells)
        self.labels = {"type": labels["cell_type"], "batch": labels["batch"]}
        self.n_features, self.n_genes, self.seed = n_features, planted.n_genes, seed
        feature = np.arange(n_features)
        self.kind = feature % len(KINDS)
        sizes = np.array([labels["cell_type"].max() + 1, planted.n_genes, labels["batch"].max() + 1, 1])
        self.target = (feature // len(KINDS)) % sizes[self.kind]

    def blocks(self, cells: np.ndarray, *, of_panel: bool) -> Iterator[dict[str, Any]]:
        """The tokens of some cells, BLOCK_CELLS cells at a time, as the fields of a `TokenBlock` but its splits."""
        for low in range(0, len(cells), BLOCK_CELLS):
            yield self._block(cells[low : low + BLOCK_CELLS], of_panel)

    def _block(self, cells: np.ndarray, of_panel: bool) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, 30, int(cells[0])))
        n_tokens, gap = len(cells) * N_TOKENS, MEAN_GAP if of_panel else MEAN_GAP_OTHER
        cell = np.repeat(cells, N_TOKENS)
        gene = rng.integers(0, self.n_genes, n_tokens).astype(np.int32)
        # ascending features of each token: sums of random distances, uniform from 1 to twice the mean
        most = int(1.3 * self.n_features / gap) + 8
        feature = np.cumsum(rng.integers(1, int(2 * gap), (n_tokens, most), dtype=np.int32), axis=1, dtype=np.int32) - 1
        token, column = np.nonzero(feature < self.n_features)
        feature = feature[token, column]
        kind, target = self.kind[feature], self.target[feature]
        own = (kind == 3) | (
            target
            == np.choose(kind, [self.labels["type"][cell][token], gene[token], self.labels["batch"][cell][token], 0])
        )
        planted = own & (kind != 3)
        # of the cells without the target, one in five does not fire
        keep = own | (rng.integers(0, 5, len(feature), dtype=np.uint8) > 0)
        value = rng.standard_exponential(len(feature), dtype=np.float32) + np.where(planted, 1.5, 0.05).astype(
            np.float32
        )
        token, feature, value = token[keep], feature[keep], value[keep]
        crow = np.concatenate([[0], np.cumsum(np.bincount(token, minlength=n_tokens))])
        return {
            "codes": SparseCodes(
                crow=torch.from_numpy(crow),
                col=torch.from_numpy(feature.astype(np.int32)),
                value=torch.from_numpy(value),
                n_features=self.n_features,
            ),
            "cell_idx": cell,
            "token_pos": np.tile(np.arange(N_TOKENS, dtype=np.int32), len(cells)),
            "gene_id": gene,
        }


@dataclass(frozen=True, kw_only=True)
class WideJob:
    """The codes folder to fill, the folder of its cells, and the size of both."""

    codes: str
    cells: str
    n_cells: int
    n_features: int


class WideWriter:
    """Writes shards of a `WideJob`; it is the body of an actor."""

    def __init__(self, job: WideJob) -> None:
        self.codes = CodesRun.open(job.codes)
        self.tokens = Tokens(job.n_cells, job.n_features)
        self.panel, self.cells = read_panel(job.cells), job.cells
        self.drawing = 0.0

    def shard(self, number: int) -> dict[str, int]:
        """Reduce the tokens of a shard, block by block, and commit its tables; return the CPU ms of drawing them."""
        cells = cells_of_shard(self.codes.cut, number, self.panel)
        start, stop = span_of_shard(self.codes.cut, number, self.panel)
        split = read_split_numbers(self.cells, start, stop)
        before = self.drawing

        def encode(write: Any) -> Any:
            blocks = self._drawn(cells, of_panel=number < self.codes.cut.n_panel_shards)
            given = (TokenBlock(**block, split=split[block["cell_idx"] - start]) for block in blocks)
            return reduce_shard(self.codes, number, given, write)

        self.codes.commit_shard(number, encode, start=start, stop=stop)
        return {"cells": len(cells), "ms": round(1000 * (self.drawing - before))}

    def _drawn(self, cells: np.ndarray, *, of_panel: bool) -> Iterator[dict[str, Any]]:
        blocks = self.tokens.blocks(cells, of_panel=of_panel)
        while True:
            began = time.process_time()
            block = next(blocks, None)
            self.drawing += time.process_time() - began
            if block is None:
                return
            yield block


def write_codes(options: argparse.Namespace) -> None:
    """Cells and codes as the stages would have written them, resumed like any run; prints the CPU s of drawing."""
    layout, source = Layout(options.store), open_source(options.data)
    dataset = write_cells(
        layout, source, donor="donor", batch="batch", cell_type="cell_type", labels=["condition"], panel=options.panel
    )
    save_source_location(layout, dataset, source)
    cut = CodesCut(
        n_cells=source.n_cells,
        n_panel=len(read_panel(layout.cells_dir(dataset))),
        panel_cells=max(1, PANEL_ENTRIES // options.features),
        other_cells=OTHER_CELLS,
    )
    plan = _plan(dataset, options.features, cut)
    codes = CodesRun.create(layout.codes_dir(plan.id), plan)
    genes = pl.DataFrame(
        {
            "gene_idx": np.arange(source.n_genes, dtype=np.int32),
            "symbol": source.gene_symbols,
            "gene_id": range(source.n_genes),
        },
        schema_overrides={"gene_id": pl.Int32},
    )
    commit.write_table(codes.folder / GENES_TABLE, genes, {"table": "token_of_gene"})
    job = WideJob(
        codes=str(codes.folder),
        cells=str(layout.cells_dir(dataset)),
        n_cells=source.n_cells,
        n_features=options.features,
    )
    actors = ActorOptions(num_actors=options.actors)
    total = do_shards(WideWriter, job, codes.pending(), actors, title="codes", note=lambda *_: "", address=None)
    codes.finalize_shards()
    merge_statistics(codes.folder, actors)
    print(f"drawing the codes took {total.get('ms', 0) / 1000:.0f} CPU s")


def _plan(dataset: str, n_features: int, cut: CodesCut) -> CodesPlan:
    """The plan of codes of no SAE."""
    forward = FusedForward(
        model_digest="none",
        site="none",
        dtype="f16",
        precision="f32",
        readout=None,
        tokens_per_cell=None,
        seed=0,
        matrix="X",
    )
    return CodesPlan(
        control_of=None, sae="wide", sae_manifest="none", activations="none", dataset=dataset, n_features=n_features,
        pooling="max", level="cell", keep=KEEP, top_cells=TOP_CELLS, top_tokens=TOP_TOKENS, cut=cut, fused=forward,
    )  # fmt: skip


def check(store: Path) -> str:
    """The classes of the features, by what they follow."""
    (folder,) = (Layout(store).root / "associations").iterdir()
    features = commit.read_table(folder / "features", ["feature_id", "class"])
    kinds = [KINDS[i % len(KINDS)] for i in features["feature_id"]]
    found = features.with_columns(kind=pl.Series(kinds)).group_by("kind", "class").len().sort("kind", "class")
    return ", ".join(f"{kind} {of_class} {n}" for kind, of_class, n in found.iter_rows())


def main(options: Any) -> None:
    """Write the codes of the largest number of cells, associate them, and print what that took."""
    n_cells = max(options.cells)
    folder = options.work / f"wide-{n_cells}-{options.features}"
    store, data = folder / "store", options.work / f"cells-{n_cells}.h5ad"
    folder.mkdir(parents=True, exist_ok=True)
    if not data.exists():
        write_data(data, n_cells)
    command = [sys.executable, str(Path(__file__)), "--scale-driver", "--store", str(store), "--data", str(data)]
    sizes = {"--features": options.features, "--panel": options.panel, "--actors": options.actors}
    command += [str(part) for pair in sizes.items() for part in pair]
    # the actors import this folder's modules, too
    path = f"{options.checkout}:{Path(__file__).parents[1]}"
    written = run(command, checkout=options.checkout, home=folder, PYTHONPATH=path)
    print(
        f"{n_cells:,} cells, panel {options.panel:,}, F {options.features:,}\ncodes: " + json.dumps(written.as_dict())
    )
    print(written.output.strip().splitlines()[-1])
    (codes,) = (Layout(store).root / "codes").iterdir()
    rows = CodesRun.open(codes).by_cell.manifest().rows
    full = rows / min(options.panel, n_cells) / options.features
    print(f"codes of the panel: {rows / 1e6:.0f} M nonzeros, {full:.2f} full", flush=True)
    before = bytes_by_folder(store)
    command = scsae("associate", "--num-actors", options.actors, "--store", store)
    found = run(command, checkout=options.checkout, home=folder)
    print("associate: " + json.dumps(found.as_dict()))
    print(f"  {found.cpu_s / options.features:.2f} CPU s a feature, {1e6 * found.cpu_s / rows:.2f} a million nonzeros")
    print("classes: " + check(store))
    for name, size in bytes_by_folder(store).items():
        print(f"  {name:32} {size / 1e9:8.3f} GB" + ("" if name in before else "  (associate)"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale-driver", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    for name in ("features", "panel", "actors"):
        parser.add_argument(f"--{name}", type=int, required=True)
    write_codes(parser.parse_args())
