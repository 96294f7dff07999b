"""Codes of 8,192 features, three quarters full, written and associated without a model.

The cells are those of `scale.data` with their panel. Each has N_TOKENS tokens in which a share of the features fires;
`reduce_shard` and `CodesRun` make of them what an encoder would have made. By number, a feature follows a type (0
modulo 4), the gene of the token (1), a batch (2) or nothing (3): it fires in all tokens of its target that it is drawn
for, with larger codes, and in a share of the others. Cells outside the panel, of which only the largest codes are kept,
have fewer features in a token. Then `scsae associate` runs on the store as its own process.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch

from feature_store.cells import open_source, read_panel, read_split_numbers, write_cells
from feature_store.codes import CodesRun, build_merged, cells_of_shard, span_of_shard
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from feature_store.storage.plans import CodesCut, CodesPlan, FusedForward
from pipelines.inputs import GENES_TABLE, save_source_location
from sae_core.sae import SparseCodes
from scale.data import Planted, write_data
from scale.measure import bytes_by_folder, run, scsae

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

N_TOKENS = 8
MEAN_GAP, MEAN_GAP_OTHER = 5.0, 120.0
"""Mean distance of two features that fire in one token, in the panel and outside."""
BLOCK_CELLS = 500
OTHER_CELLS, PANEL_ENTRIES = 25_000, 24_000_000
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


def write_store(root: Path, data: Path, *, n_features: int, panel: int) -> str:
    """Cells and codes as the stages would have written them, resumed like any run; returns the codes run."""
    layout, source = Layout(root), open_source(data)
    dataset = write_cells(
        layout, source, donor="donor", batch="batch", cell_type="cell_type", labels=["condition"], panel=panel
    )
    save_source_location(layout, dataset, source)
    in_panel = read_panel(layout.cells_dir(dataset))
    cut = CodesCut(
        n_cells=source.n_cells,
        n_panel=len(in_panel),
        panel_cells=max(1, PANEL_ENTRIES // n_features),
        other_cells=OTHER_CELLS,
    )
    plan = _plan(dataset, n_features, cut)
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
    tokens = Tokens(source.n_cells, n_features)
    split = read_split_numbers(layout.cells_dir(dataset))
    for shard in codes.pending():
        commit_shard(codes, shard, tokens, in_panel, split)
    codes.finalize_shards()
    build_merged(codes.folder)
    return codes.folder.name


def commit_shard(codes: CodesRun, shard: int, tokens: Tokens, panel: np.ndarray, split: np.ndarray) -> None:
    """Reduce the tokens of a shard, block by block, and commit its tables."""
    cells = cells_of_shard(codes.cut, shard, panel)
    of_panel = shard < codes.cut.n_panel_shards

    def encode(write: Any) -> Any:
        blocks = tokens.blocks(cells, of_panel=of_panel)
        given = (TokenBlock(**block, split=split[block["cell_idx"]]) for block in blocks)
        return reduce_shard(codes, shard, given, write)

    start, stop = span_of_shard(codes.cut, shard, panel)
    codes.commit_shard(shard, encode, start=start, stop=stop)


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
    began = time.process_time()
    written = write_store(store, data, n_features=options.features, panel=options.panel)
    seconds = time.process_time() - began
    rows = CodesRun.open(Layout(store).codes_dir(written)).by_cell.manifest().rows
    n_panel = min(options.panel, n_cells)
    print(f"{n_cells:,} cells, panel {n_panel:,}, F {options.features:,}: codes written in {seconds:.0f} CPU s")
    print(f"codes of the panel: {rows / 1e6:.0f} M nonzeros, {rows / n_panel / options.features:.2f} full", flush=True)
    before = bytes_by_folder(store)
    command = scsae("associate", "--num-actors", options.actors, "--store", store)
    found = run(command, checkout=options.checkout, home=folder)
    print("associate: " + json.dumps(found.as_dict()))
    print(f"  {found.cpu_s / options.features:.2f} CPU s a feature, {1e6 * found.cpu_s / rows:.2f} a million nonzeros")
    print("classes: " + check(store))
    for name, size in bytes_by_folder(store).items():
        print(f"  {name:32} {size / 1e9:8.3f} GB" + ("" if name in before else "  (associate)"))
