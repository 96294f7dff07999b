"""The tables `genes` and `digests` of a data set, in one pass over its matrix, which checks every value.

The pass is cut into shards, ranges of cells (`shard_cells`). Each gives its sums by gene and the digests of its cells,
and the sums are added in the order of the shards, so the tables do not depend on which process made which shard. Up to
ONE_SHARD_CELLS cells are one shard.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.cells.cell_digests import gene_hashes, row_digests
from feature_store.cells.source import BLOCK_ROWS, Source
from feature_store.errors import StoreError
from feature_store.storage import commit, schemas
from feature_store.storage.layout import Layout
from feature_store.storage.plans import CellsPlan, DigestsPlan

ONE_SHARD_CELLS = 200_000
SHARD_CELLS = 100_000


class ShardTables(NamedTuple):
    """What a range of cells gives: n_cells and total of each gene (`sums` [n_genes]), and the rows of `digests`."""

    sums: pl.DataFrame
    digests: pl.DataFrame


@dataclass(frozen=True, kw_only=True)
class MatrixTables:
    """The tables that one pass over a matrix makes; the digests shard by shard."""

    genes: pl.DataFrame
    n_shards: int
    digests_of: Callable[[int], pl.DataFrame]
    """Returns the digests of the cells of a shard."""

    @property
    def digests(self) -> pl.DataFrame:
        """The digests of all cells: 28 bytes each."""
        return pl.concat([self.digests_of(shard) for shard in range(self.n_shards)])


class MakeTables(Protocol):
    """Passes over the matrix of a source and returns its tables."""

    def __call__(self, source: Source, /) -> MatrixTables:
        """Return the tables; InputError names the row of an impossible value."""


class MatrixPass:
    """A pass over the matrix of a source, in ranges of cells."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._files = source.gene_names_of_files()
        self._hashes = cache(self._hashes_of)

    def shard(self, start: int, stop: int, update: Callable[[int], None] = lambda _done: None) -> ShardTables:
        """For each gene the number of cells [start, stop) with a value above 0 and the sum of their values; for each
        cell its number of genes with a value and its digests (`cell_digests`).

        `update` gets the index up to which cells are done. InputError names the row of an impossible value.
        """
        n_genes = self._source.n_genes
        n_cells, total, digests = np.zeros(n_genes, dtype=np.int64), np.zeros(n_genes), []
        for file, (end, *_) in enumerate(self._files):
            while start < min(end, stop):
                last = min(start + BLOCK_ROWS, end, stop)
                rows = self._source.read_rows(start, last)
                n_cells += np.bincount(rows.indices[rows.data > 0], minlength=n_genes)
                total += np.bincount(rows.indices, weights=rows.data, minlength=n_genes)
                digests.append(_digest_frame(start, *row_digests(rows, self._hashes(file))))
                update(last)
                start = last
        sums = pl.DataFrame({"n_cells": n_cells, "total": total})
        return ShardTables(sums, schemas.conform("digests", pl.concat(digests)))

    def _hashes_of(self, file: int) -> list[npt.NDArray[np.uint64]]:
        _, symbols, ensembl = self._files[file]
        names = [symbols]
        if ensembl is not None:
            names.append([one or symbol for one, symbol in zip(ensembl, symbols, strict=True)])
        return [gene_hashes(one) for one in names]


def shard_cells(n_cells: int) -> int:
    """The number of cells of a shard of the pass."""
    return n_cells if n_cells <= ONE_SHARD_CELLS else SHARD_CELLS


def shard_range(shard: int, n_cells: int, size: int) -> tuple[int, int]:
    """The cells [start, stop) of a shard of `size` cells."""
    return shard * size, min((shard + 1) * size, n_cells)


def matrix_tables(source: Source) -> MatrixTables:
    """The tables of a source, made in this process. InputError names the row of an impossible value."""
    size = shard_cells(source.n_cells)
    one_pass = MatrixPass(source)
    with source.progress("check values", source.n_cells, "cells") as update:
        made = [
            one_pass.shard(*shard_range(shard, source.n_cells, size), update)
            for shard in range(-(-source.n_cells // size))
        ]
    genes = gene_table_of(source, (shard.sums for shard in made))
    return MatrixTables(genes=genes, n_shards=len(made), digests_of=lambda shard: made[shard].digests)


def gene_table_of(source: Source, sums: Iterable[pl.DataFrame]) -> pl.DataFrame:
    """The table `genes` from the sums of all shards, in their order: for each gene the number of cells with a value
    above 0 and the mean over all cells.
    """
    n_cells, total = np.zeros(source.n_genes, dtype=np.int64), np.zeros(source.n_genes)
    for one in sums:
        n_cells += one["n_cells"].to_numpy()
        total += one["total"].to_numpy()
    ids = source.ensembl_ids
    genes = pl.DataFrame(
        {
            "gene_idx": np.arange(source.n_genes, dtype=np.int32),
            "symbol": source.gene_symbols,
            "ensembl_id": pl.Series([name or None for name in ids or [""] * source.n_genes], dtype=pl.String),
            "n_cells": n_cells,
            "mean": total / source.n_cells,
        }
    )
    return schemas.conform("genes", genes)


def stored_tables(layout: Layout, source: Source) -> MatrixTables | None:
    """The tables of a data set of the store with the same content and matrix; None if there is none, or a damaged
    one.
    """
    for info in layout.runs("cells"):
        with suppress(StoreError):
            plan = CellsPlan.of(commit.Run.open(info.path))
            run = commit.Run.open(layout.digests_dir(info.run))
            is_same = (plan.digest, plan.matrix) == (source.digest, source.matrix)
            if info.complete and is_same and DigestsPlan.of(run).shard_cells == shard_cells(source.n_cells):
                return _tables_of(layout, info.run, run.checked_parts())
    return None


def _tables_of(layout: Layout, dataset: str, parts: Sequence[Path]) -> MatrixTables:
    genes = commit.read_table(layout.genes_dir(dataset))
    return MatrixTables(genes=genes, n_shards=len(parts), digests_of=lambda shard: commit.read_part(parts[shard]))


def write_digests(folder: Path, plan: DigestsPlan, tables: Callable[[], MatrixTables]) -> None:
    """Write the table `digests`, a part for each shard; `tables` is called if a part is missing or damaged."""
    run = commit.Run.create(folder, plan.table("digests", n_shards=plan.n_shards))
    for shard in run.pending():
        write = partial(commit.write_frame, frame=tables().digests_of(shard))
        start, stop = shard_range(shard, plan.n_cells, plan.shard_cells)
        run.commit_shard(shard, write, start=start, stop=stop)
    run.finalize()


def _digest_frame(start: int, n_genes: npt.NDArray[np.int32], found: list[npt.NDArray[np.uint64]]) -> pl.DataFrame:
    frame = pl.DataFrame(
        {"cell_idx": np.arange(start, start + len(n_genes)), "n_detected": n_genes, "symbol_digest": found[0]}
    )
    ensembl = pl.Series(found[1]) if len(found) > 1 else pl.lit(None, pl.UInt64)
    return frame.with_columns(ensembl_digest=ensembl)
