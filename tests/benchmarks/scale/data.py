"""A synthetic .h5ad of any number of cells with a planted structure, written in blocks of bounded memory.

A cell is a bag of counts. Each count is drawn from one of four profiles over genes: that of the cell's donor (all
genes, log-normal), of its type (20 markers and 10 genes that it shares with the five types of its lineage), of its
batch (25 genes) and of its condition (30 genes). A cell has about 60 genes of 2,000, which the mini model knows.
Profiles are tables of 65,536 genes, so that a count costs one look-up. A million cells take 12 CPU seconds.

The counts of a cell follow from (seed, block of 10,000 cells), so a file of fewer cells is the beginning of a larger
one, except that exactly N_RARE cells, whatever the number of cells, are of the type RARE. Donors come in stretches of
50 cells, as in joined libraries; five donors make a batch; types are unequal (the largest has 250 times the cells of
the smallest) and their shares differ between donors.
"""

from __future__ import annotations

import json
import resource
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import h5py
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

VOCABULARY = Path(__file__).parents[3] / "sae_core" / "scfm" / "mini" / "vocab.json"
BLOCK_CELLS, STRETCH_CELLS = 10_000, 50
N_TYPES, N_DONORS, N_BATCHES, N_RARE = 30, 20, 4, 60
RARE = "rare"
N_MARKERS, N_LINEAGE, TYPES_PER_LINEAGE = 20, 10, 5
N_BATCH_GENES, N_CONDITION_GENES = 25, 30
SHARES = {"donor": 0.70, "type": 0.20, "batch": 0.05, "condition": 0.05}
"""Share of the counts of a cell that come from each profile."""
LARGEST_TO_NEXT = 0.83
MEAN_COUNTS, SPREAD_COUNTS = 66.0, 0.35
TABLE = 1 << 16
STRINGS = h5py.string_dtype()
CONDITIONS = ("ctrl", "stim")
TYPES = [f"type {i:02d}" for i in range(N_TYPES)] + [RARE]
CATEGORIES = {
    "donor": [f"donor {i:02d}" for i in range(N_DONORS)],
    "batch": [f"batch {i}" for i in range(N_BATCHES)],
    "cell_type": TYPES,
    "condition": list(CONDITIONS),
}


class Block(NamedTuple):
    """Some cells: codes of their labels by name, and their counts as CSR arrays."""

    labels: dict[str, np.ndarray]
    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray


@dataclass(frozen=True)
class Planted:
    """The planted structure of a seed; mean_counts: about the mean number of counts of a cell."""

    seed: int = 0
    n_genes: int = 2000
    mean_counts: float = MEAN_COUNTS

    @cached_property
    def genes(self) -> list[str]:
        """Symbols of the genes, all of them in the vocabulary of the mini model."""
        known = [gene for gene in json.loads(VOCABULARY.read_text()) if not gene.startswith("<")]
        return sorted(np.random.default_rng((self.seed, 1)).choice(sorted(known), self.n_genes, replace=False).tolist())

    @cached_property
    def special(self) -> dict[str, np.ndarray]:
        """Genes of each type [31, 30] (markers first), batch [4, 25] and condition [2, 30]; only lineages share any."""
        order = iter(np.random.default_rng((self.seed, 2)).permutation(self.n_genes).tolist())

        def draw(n: int) -> list[int]:
            return [next(order) for _ in range(n)]

        lineages = [draw(N_LINEAGE) for _ in range(-(-len(TYPES) // TYPES_PER_LINEAGE))]
        return {
            "type": np.array([draw(N_MARKERS) + lineages[i // TYPES_PER_LINEAGE] for i in range(len(TYPES))]),
            "batch": np.array([draw(N_BATCH_GENES) for _ in range(N_BATCHES)]),
            "condition": np.array([draw(N_CONDITION_GENES) for _ in CONDITIONS]),
        }

    def markers(self, cell_type: str) -> list[str]:
        """Symbols of the genes that only this type has more of."""
        return [self.genes[i] for i in self.special["type"][TYPES.index(cell_type), :N_MARKERS]]

    @cached_property
    def tables(self) -> np.ndarray:
        """Genes by profile and 16 random bits: donors, types, batches, conditions, one below the other."""
        rng = np.random.default_rng((self.seed, 3))
        general = rng.normal(size=self.n_genes)
        weights = [np.exp(general + 0.3 * rng.normal(size=self.n_genes)) for _ in range(N_DONORS)]
        for genes in (row for name in ("type", "batch", "condition") for row in self.special[name]):
            weight = np.zeros(self.n_genes)
            weight[genes] = rng.gamma(3.0, size=len(genes))
            weights.append(weight)
        steps = (np.arange(TABLE) + 0.5) / TABLE
        found = [np.searchsorted(np.cumsum(weight) / weight.sum(), steps) for weight in weights]
        return np.array(found, dtype=np.int16)

    @cached_property
    def type_shares(self) -> np.ndarray:
        """Cumulative shares of the types in each donor [20, 30]."""
        rng = np.random.default_rng((self.seed, 4))
        share = LARGEST_TO_NEXT ** np.arange(N_TYPES) * np.exp(0.3 * rng.normal(size=(N_DONORS, N_TYPES)))
        return np.cumsum(share, axis=1) / share.sum(axis=1, keepdims=True)

    def rare_cells(self, n_cells: int) -> np.ndarray:
        """Ascending places of the cells of the rare type among `n_cells`."""
        return np.sort(np.random.default_rng((self.seed, 5, n_cells)).choice(n_cells, N_RARE, replace=False))

    def blocks(self, n_cells: int) -> Iterator[Block]:
        """The cells [0, n_cells), BLOCK_CELLS at a time."""
        rare = self.rare_cells(n_cells)
        for start in range(0, n_cells, BLOCK_CELLS):
            n = min(BLOCK_CELLS, n_cells - start)
            yield self._block(start // BLOCK_CELLS, n, rare[(rare >= start) & (rare < start + n)] - start)

    def labels(self, n_cells: int) -> dict[str, np.ndarray]:
        """Codes of all labels of `n_cells` cells, without their counts."""
        rare, found = self.rare_cells(n_cells), []
        for start in range(0, n_cells, BLOCK_CELLS):
            n = min(BLOCK_CELLS, n_cells - start)
            own = rare[(rare >= start) & (rare < start + n)] - start
            found.append({k: v[:n] for k, v in self._labels(self._generator(start // BLOCK_CELLS), own).items()})
        return {name: np.concatenate([part[name] for part in found]) for name in CATEGORIES}

    def _generator(self, number: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, 6, number))

    def _labels(self, rng: np.random.Generator, rare: np.ndarray) -> dict[str, np.ndarray]:
        """Labels of the BLOCK_CELLS cells of a block."""
        donors = np.tile(np.arange(N_DONORS), (BLOCK_CELLS // STRETCH_CELLS // N_DONORS, 1))
        donor = np.repeat(rng.permuted(donors, axis=1).ravel(), STRETCH_CELLS)
        condition = np.repeat(rng.integers(0, 2, BLOCK_CELLS // STRETCH_CELLS), STRETCH_CELLS)
        cell_type = (rng.random(BLOCK_CELLS)[:, None] > self.type_shares[donor, :-1]).sum(axis=1)
        cell_type[rare] = TYPES.index(RARE)
        labels = {"donor": donor, "batch": donor % N_BATCHES, "cell_type": cell_type, "condition": condition}
        return {name: codes.astype(np.int8) for name, codes in labels.items()}

    def _block(self, number: int, n_cells: int, rare: np.ndarray) -> Block:
        rng = self._generator(number)
        labels = self._labels(rng, rare)
        n_counts = np.exp(rng.normal(np.log(self.mean_counts), SPREAD_COUNTS, BLOCK_CELLS)).astype(np.int64)
        n_counts = n_counts.clip(min(20, int(self.mean_counts)), 400)
        cell = np.repeat(np.arange(BLOCK_CELLS, dtype=np.int32), n_counts)
        # profiles of a cell: rows of `tables`
        first = np.cumsum([0, N_DONORS, len(TYPES), N_BATCHES])
        names = ("donor", "cell_type", "batch", "condition")
        rows = np.stack([labels[name] + offset for name, offset in zip(names, first, strict=True)], axis=1)
        limits = np.cumsum(list(SHARES.values()))[:-1] * 256
        profile = np.searchsorted(limits, np.arange(256), side="right")[rng.integers(0, 256, cell.size, dtype=np.uint8)]
        gene = self.tables[rows[cell, profile], rng.integers(0, TABLE, cell.size, dtype=np.uint16)]
        key, data = np.unique(cell * np.int32(self.n_genes) + gene, return_counts=True)
        key, data = key[: (stop := np.searchsorted(key, n_cells * self.n_genes))], data[:stop]
        indptr = np.searchsorted(key, np.arange(n_cells + 1) * self.n_genes)
        labels = {name: codes[:n_cells] for name, codes in labels.items()}
        return Block(labels, indptr, (key % self.n_genes).astype(np.int32), data)


def barcodes(start: int, stop: int) -> np.ndarray:
    """A name of 16 letters for each of the cells [start, stop); no two cells have the same."""
    mixed = (np.arange(start, stop, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(40503)) % np.uint64(1 << 32)
    letters = (mixed[:, None] >> (2 * np.arange(16, dtype=np.uint64))) & np.uint64(3)
    return np.frombuffer(b"ACGT", "S1")[letters.astype(np.int64)].view("S16").ravel()


def write_data(
    path: Path,
    n_cells: int,
    *,
    seed: int = 0,
    dtype: str = "i4",
    compression: str | None = None,
    mean_counts: float = MEAN_COUNTS,
) -> None:
    """Write `n_cells` cells as an .h5ad; dtype: i4 or f4; compression: None, lzf or gzip."""
    planted = Planted(seed, mean_counts=mean_counts)
    options: dict[str, Any] = {"maxshape": (None,), "chunks": (1 << 17,), "compression": compression}
    with h5py.File(path, "w") as file:
        _mark(file, "anndata", "0.1.0")
        x = _mark(file.create_group("X"), "csr_matrix", "0.1.0")
        x.attrs["shape"] = np.array([n_cells, planted.n_genes])
        values = {
            name: x.create_dataset(name, (0,), kind, **options) for name, kind in (("data", dtype), ("indices", "i4"))
        }
        indptr = x.create_dataset("indptr", (n_cells + 1,), "i8")
        var = _frame(file, "var", planted.n_genes, [])
        var["_index"][:] = np.array(planted.genes, dtype=object)
        obs = _frame(file, "obs", n_cells, list(CATEGORIES))
        codes = {name: _categories(obs, name, n_cells) for name in CATEGORIES}
        start = n_values = 0
        for block in planted.blocks(n_cells):
            stop, end = start + len(block.indptr) - 1, n_values + len(block.data)
            for name, column in (("data", block.data), ("indices", block.indices)):
                values[name].resize((end,))
                values[name][n_values:end] = column
            indptr[start : stop + 1] = block.indptr + n_values
            obs["_index"][start:stop] = barcodes(start, stop)
            for name, column in block.labels.items():
                codes[name][start:stop] = column
            start, n_values = stop, end


def _mark(node: Any, encoding: str, version: str) -> Any:
    node.attrs.update({"encoding-type": encoding, "encoding-version": version})
    return node


def _frame(file: Any, name: str, n: int, columns: list[str]) -> Any:
    frame = _mark(file.create_group(name), "dataframe", "0.2.0")
    frame.attrs["_index"] = "_index"
    frame.attrs["column-order"] = np.array(columns, dtype=STRINGS)
    _mark(frame.create_dataset("_index", (n,), STRINGS, chunks=True), "string-array", "0.2.0")
    return frame


def _categories(obs: Any, name: str, n_cells: int) -> Any:
    group = _mark(obs.create_group(name), "categorical", "0.2.0")
    group.attrs["ordered"] = False
    group["categories"] = np.array(CATEGORIES[name], dtype=STRINGS)
    _mark(group["categories"], "string-array", "0.2.0")
    return _mark(group.create_dataset("codes", (n_cells,), "i1"), "array", "0.2.0")


def main(options: Any) -> None:
    """Write each number of cells, and print what that took."""
    for n_cells in options.cells:
        path, start = options.work / f"cells-{n_cells}.h5ad", time.process_time()
        write_data(path, n_cells)
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
        size_mb = path.stat().st_size / 1e6
        print(
            f"{n_cells:,} cells: {time.process_time() - start:.1f} CPU s, peak {peak_mb:.0f} MB, file {size_mb:.0f} MB"
        )
