"""The tables `genes` and `digests` of a data set, in one pass over its matrix, which checks every value."""

from typing import NamedTuple

import numpy as np
import polars as pl

from feature_store.cells.cell_digests import gene_hashes, row_digests
from feature_store.cells.source import BLOCK_ROWS, Source
from feature_store.storage import schemas


class MatrixTables(NamedTuple):
    """The tables that one pass over a matrix makes."""

    genes: pl.DataFrame
    digests: pl.DataFrame


def matrix_tables(source: Source) -> MatrixTables:
    """For each gene the number of cells with a value above 0 and the mean over all cells; for each cell its number of
    genes with a value and its digests (`cell_digests`).
    """
    n_cells = np.zeros(source.n_genes, dtype=np.int64)
    total = np.zeros(source.n_genes)
    digests = []
    with source.progress("check values", source.n_cells, "cells") as update:
        start = 0
        for end, symbols, ensembl in source.gene_names_of_files():
            hashes = [gene_hashes(symbols)]
            if ensembl is not None:
                hashes.append(gene_hashes([one or symbol for one, symbol in zip(ensembl, symbols, strict=True)]))
            while start < end:
                stop = min(start + BLOCK_ROWS, end)
                rows = source.read_rows(start, stop)
                n_cells += np.bincount(rows.indices[rows.data > 0], minlength=source.n_genes)
                total += np.bincount(rows.indices, weights=rows.data, minlength=source.n_genes)
                n_genes, found = row_digests(rows, hashes)
                digests.append(_digest_frame(start, n_genes, found))
                update(stop)
                start = stop
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
    return MatrixTables(schemas.conform("genes", genes), schemas.conform("digests", pl.concat(digests)))


def _digest_frame(start: int, n_genes: np.ndarray, found: list[np.ndarray]) -> pl.DataFrame:
    frame = pl.DataFrame(
        {"cell_idx": np.arange(start, start + len(n_genes)), "n_detected": n_genes, "symbol_digest": found[0]}
    )
    ensembl = pl.Series(found[1]) if len(found) > 1 else pl.lit(None, pl.UInt64)
    return frame.with_columns(ensembl_digest=ensembl)
