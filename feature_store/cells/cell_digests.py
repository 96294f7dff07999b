"""Digests of cells, by which the same cell is recognised in another file, and what a trained SAE knows of such cells.

The digest of a cell is the sum, modulo 2^64, of a hash of (gene, rank) over the genes with a value; the rank is that of
the value among the distinct values of the cell. So the order of the genes, genes without values, the number type, the
name of the cell and a normalisation that keeps the order of the values (CP10k, log1p) change nothing, and another set
of genes or another order of their values makes another digest. There is one with the genes' symbols and one with their
Ensembl ids, since a copy of a file may have lost either. Two cells with MIN_GENES genes or more do not share a digest
by chance; below that, name and digest have to agree.

Recognised: other cell names, another order of cells or genes, counts as integers or floats, counts and their
log-normalised values, a part of the cells, files joined with others. Where at least half of the cells are recognised,
the others with a known name are trusted to be those cells, too. Not recognised: values that were corrected or
down-sampled, a selection of genes, and genes under other names, unless the cells have the same names and nearly the
same order by their number of genes (`_same_by_name`).

This costs 20 bytes a cell on disk, and about .1 CPU seconds a million values in the pass over the matrix that the gene
table makes anyway.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.cells.canonical import canonical_text
from feature_store.cells.matrices import CSRRows
from feature_store.cells.splits import UNKNOWN, KnownSplits
from feature_store.storage.schemas import SPLITS

MIN_GENES = 16
"""Fewest genes of a cell whose digest alone identifies it."""
TRUSTED_SHARE = 0.5
"""Share of recognised cells from which on the names of the others are trusted."""
MIN_PAIRS, MIN_CORRELATION = 20, 0.7
"""Cells of the same name, and rank correlation of their numbers of genes, from which on they are the same cells."""
_UInts = npt.NDArray[np.uint64]
_STEP, _MIX_1, _MIX_2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def gene_hashes(names: Sequence[str]) -> _UInts:
    """A hash of each name [n_genes]."""
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


def row_digests(rows: CSRRows, genes: Sequence[_UInts]) -> tuple[npt.NDArray[np.int32], list[_UInts]]:
    """The number of genes with a value of each row [n_rows], and a digest of each row by each of the `genes`, the
    hashes of the names of the columns [n_columns].
    """
    row = np.repeat(np.arange(len(rows.indptr) - 1, dtype=np.uint64), np.diff(rows.indptr))
    kept = rows.data != 0
    row, column, value = row[kept], rows.indices[kept], rows.data[kept]
    n_genes = np.bincount(row.astype(np.int64), minlength=len(rows.indptr) - 1)
    # positive floats are ordered as their bits are, so (row, value) is one integer
    keys = (row << np.uint64(32)) | value.astype(np.float32).view(np.uint32)
    distinct = np.unique(keys)
    first = np.searchsorted(distinct, np.arange(len(n_genes), dtype=np.uint64) << np.uint64(32))
    rank = (np.searchsorted(distinct, keys) - first[row.astype(np.int64)] + 1).astype(np.uint64)
    ends = np.concatenate([[0], np.cumsum(n_genes)])
    digests = []
    for hashes in genes:
        sums = np.concatenate(
            [np.zeros(1, np.uint64), np.cumsum(_mixed(hashes[column] + rank * _STEP), dtype=np.uint64)]
        )
        digests.append(sums[ends[1:]] - sums[ends[:-1]])
    return n_genes.astype(np.int32), digests


def _mixed(x: _UInts) -> _UInts:
    """A bijection of 64-bit integers that scatters them (the finaliser of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def known_cells(cells: pl.DataFrame, known: pl.DataFrame) -> npt.NDArray[np.int8]:
    """The split that each cell has among the cells of a trained SAE, a position in SPLITS, else UNKNOWN [n_cells].

    Both frames have cell_id, n_detected, symbol_digest and ensembl_digest; `known` has split as well. A cell that is
    there several times gets the first of its splits in SPLITS, but that of its name if one has it.
    """
    mine, theirs = _keyed(cells), _keyed(known).with_columns(split=_number(known["split"]))
    found = pl.Series([None] * mine.height, dtype=pl.Int8)
    for digest in ("symbol_digest", "ensembl_digest"):
        found = found.fill_null(_matched(mine, theirs, ["cell_id", digest]))
        large = pl.col("n_detected") >= MIN_GENES
        found = found.fill_null(
            _matched(mine.with_columns(pl.when(large).then(digest)), theirs.filter(large), [digest])
        )
    if found.is_not_null().sum() >= TRUSTED_SHARE * len(found) or _same_by_name(mine, theirs, found):
        found = found.fill_null(_matched(mine, theirs, ["cell_id"]))
    return found.fill_null(UNKNOWN).to_numpy().astype(np.int8)


def known_splits(cells: pl.DataFrame, known: pl.DataFrame, unit: str) -> KnownSplits:
    """What the cells of a trained SAE, split by `unit`, say of some cells; the frames are those of `known_cells`, and
    `known` has the column `unit` as well.
    """
    return KnownSplits(cells=known_cells(cells, known), unit=unit, units=_units(known, unit))


def same_cells(known: pl.DataFrame, unit: str) -> KnownSplits:
    """What the cells of a trained SAE, split by `unit`, say of themselves."""
    return KnownSplits(cells=_number(known["split"]).to_numpy(), unit=unit, units=_units(known, unit))


def _units(known: pl.DataFrame, unit: str) -> dict[str, str]:
    return {} if unit == "cell" else dict(known.select(unit, "split").drop_nulls().unique().iter_rows())


def _keyed(cells: pl.DataFrame) -> pl.DataFrame:
    filled = pl.when(pl.col("n_detected") > 0)
    return cells.select(
        canonical_text(cells["cell_id"]), "n_detected", filled.then("symbol_digest"), filled.then("ensembl_digest")
    )


def _number(splits: pl.Series) -> pl.Series:
    return splits.replace_strict(list(SPLITS), range(len(SPLITS)), return_dtype=pl.Int8)


def _matched(mine: pl.DataFrame, theirs: pl.DataFrame, on: list[str]) -> pl.Series:
    """The first split of the rows of `theirs` with the same values in all columns `on` [n rows of mine]."""
    first = theirs.drop_nulls(on).group_by(on).agg(pl.col("split").min())
    return mine.select(on).join(first, on=on, how="left", maintain_order="left")["split"]


def _same_by_name(mine: pl.DataFrame, theirs: pl.DataFrame, found: pl.Series) -> bool:
    """Whether cells of the same name are the same cells, as their numbers of genes have nearly the same order.

    Names may agree by chance: barcodes of two experiments, or cells that are numbered.
    """
    both = (
        mine.filter(found.is_null())
        .unique("cell_id", keep="none")
        .join(theirs.unique("cell_id", keep="none"), on="cell_id")
    )
    if both.height < MIN_PAIRS:
        return False
    correlation = both.select(pl.corr("n_detected", "n_detected_right", method="spearman")).item()
    return correlation is not None and correlation >= MIN_CORRELATION
