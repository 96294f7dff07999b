"""The table `genes` of a data set."""

import numpy as np
import polars as pl

from feature_store.cells.source import BLOCK_ROWS, Source
from feature_store.storage import schemas


def gene_table(source: Source) -> pl.DataFrame:
    """The table `genes`: for each gene the number of cells with a value above 0, and the mean over all cells.

    One pass over the matrix, which checks every value.
    """
    n_cells = np.zeros(source.n_genes, dtype=np.int64)
    total = np.zeros(source.n_genes)
    with source.progress("check values", source.n_cells, "cells") as update:
        for start in range(0, source.n_cells, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, source.n_cells)
            rows = source.read_rows(start, stop)
            n_cells += np.bincount(rows.indices[rows.data > 0], minlength=source.n_genes)
            total += np.bincount(rows.indices, weights=rows.data, minlength=source.n_genes)
            update(stop)
    ensembl = source.ensembl_ids
    frame = pl.DataFrame(
        {
            "gene_idx": np.arange(source.n_genes, dtype=np.int32),
            "symbol": source.gene_symbols,
            "ensembl_id": pl.Series([name or None for name in ensembl or [""] * source.n_genes], dtype=pl.String),
            "n_cells": n_cells,
            "mean": total / source.n_cells,
        }
    )
    return schemas.conform("genes", frame)
