"""Which genes vary most over the `train` cells of a data set, by batch, from two passes over its counts.

For each batch b and gene g, with mean m and variance v (n - 1) over the n cells of the batch:

    log10 v ~ loess(log10 m), degree 2, span .3, over the genes with v > 0      s^2 = 10^(its value)
    v_std = sum_c (min(x_cg, m + s sqrt(n)) - m)^2 / ((n - 1) s^2)

that is, the variance of the counts, clipped at sqrt(n) standard deviations, over that expected of a gene of this mean.
Genes are ranked by it in each batch. A gene's place is the median of its ranks in the batches where it is among the
first N, then the number of these batches; further ties go by the order of the genes. This is what scanpy calls flavor
`seurat_v3`. Batches of fewer than LEAST_CELLS `train` cells have no say, unless all are so small: then all cells count
as one batch. Cells without a batch are a batch of their own.

The first pass sums x and x^2, the second the clipped values: memory is five numbers for each batch and gene (100
batches of 20,000 genes: 80 MB) and one block of rows. Sums of counts are exact, and the clipped ones are added in the
order of the shards, so neither depends on how many processes read.

Methods: Stuart et al. 2019, doi:10.1016/j.cell.2019.05.031 (variable genes, and their ranks over data sets);
`feature_store.cells.loess` has the smoother.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.cells import loess as smoother
from feature_store.cells.factors import MISSING
from feature_store.cells.source import BLOCK_ROWS, Source
from feature_store.cells.splits import TRAIN
from feature_store.errors import InputError
from feature_store.storage import commit
from feature_store.storage.plans import constants_of
from feature_store.storage.schemas import SPLITS

SPAN = 0.3
LEAST_CELLS = 10
"""Least number of `train` cells of a batch whose ranks count."""
LEAST_GENES = 5
"""Least number of genes that vary in a batch, for a curve through them."""
NO_BATCH = -1
Ints = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class TrainBatches:
    """The batches of the `train` cells of a data set.

    Attributes:
        names: the names of the batches that have a say; None if all cells are one batch.
        n_cells: the number of `train` cells of each of them.
        n_left_out: the number of batches with too few `train` cells.
    """

    names: tuple[str, ...] | None
    n_cells: tuple[int, ...]
    n_left_out: int

    def of_cells(self, folder: str | Path, start: int, stop: int) -> npt.NDArray[np.int32]:
        """The number of the batch of each of the cells [start, stop) in `Layout.cells_dir(dataset)`; NO_BATCH for a
        cell that has no say. Only the parts that hold them are read.
        """
        parts = [np.empty(0, dtype=np.int32)]
        for frame in _split_and_batch(folder, start, stop):
            number = pl.lit(0, pl.Int32)
            if self.names is not None:
                places = range(len(self.names))
                number = _BATCH.replace_strict(list(self.names), places, default=NO_BATCH, return_dtype=pl.Int32)
            is_train = pl.col("split") == SPLITS[TRAIN]
            parts.append(frame.select(pl.when(is_train).then(number).otherwise(NO_BATCH)).to_series().to_numpy())
        return np.concatenate(parts)


def train_batches(folder: str | Path) -> TrainBatches:
    """The batches of the `train` cells in `Layout.cells_dir(dataset)`.

    InputError if there are fewer than LEAST_CELLS of these cells.
    """
    sizes: Counter[str] = Counter()
    for frame in _split_and_batch(folder):
        train = frame.filter(split=SPLITS[TRAIN])
        sizes.update(dict(train.select(_BATCH.value_counts()).unnest("batch").iter_rows()))
    n_train = sizes.total()
    if n_train < LEAST_CELLS:
        raise InputError(
            f"variable genes are chosen on `train` cells, of which there are {n_train}, and {LEAST_CELLS} are needed: "
            "give a list of genes with --genes FILE, or leave --genes out"
        )
    names = tuple(sorted(name for name, size in sizes.items() if size >= LEAST_CELLS))
    if not names or len(sizes) == 1:
        return TrainBatches(names=None, n_cells=(n_train,), n_left_out=0)
    return TrainBatches(names=names, n_cells=tuple(sizes[name] for name in names), n_left_out=len(sizes) - len(names))


def _split_and_batch(folder: str | Path, start: int = 0, stop: int | None = None) -> Iterator[pl.DataFrame]:
    """The columns split and batch of the cells [start, stop), part by part."""
    run = commit.Run.open(folder)
    for marker in run.manifest().shards:
        if marker.stop > start and (stop is None or marker.start < stop):
            (part,) = run.checked_parts([marker])
            first = max(start - marker.start, 0)
            last = marker.stop - marker.start if stop is None else stop - marker.start
            yield commit.read_part(part, ["split", "batch"])[first:last]


_BATCH = pl.col("batch").fill_null(MISSING)


class BatchSums(NamedTuple):
    """The sums of the values, and of their squares, of each gene in each batch [n_batches n_genes]."""

    total: Floats
    squares: Floats

    @classmethod
    def of_frames(cls, frames: Iterable[pl.DataFrame], n_batches: int, n_genes: int) -> "BatchSums":
        """The sums over all shards, added in their order."""
        sums = cls(np.zeros((n_batches, n_genes)), np.zeros((n_batches, n_genes)))
        for frame in frames:
            at = frame["batch"].to_numpy(), frame["gene"].to_numpy()
            sums.total[at] += frame["total"].to_numpy()
            sums.squares[at] += frame["squares"].to_numpy()
        return sums

    def to_frame(self) -> pl.DataFrame:
        """A row for each batch and gene that has a value."""
        batch, gene = np.nonzero(self.total)
        return pl.DataFrame(
            {
                "batch": batch.astype(np.int32),
                "gene": gene.astype(np.int32),
                "total": self.total[batch, gene],
                "squares": self.squares[batch, gene],
            }
        )


def sums_of_cells(
    source: Source,
    start: int,
    batch: Ints,
    genes: Ints,
    n_batches: int,
    *,
    clip: Floats | None = None,
    update: Callable[[int], None] = lambda _done: None,
) -> BatchSums:
    """The sums over the cells from `start` on, of which `batch` [n_cells] has the batches.

    `genes` [n_genes] are the places of the genes in the source. `clip` [n_batches n_genes] is the largest value of each
    gene in each batch; larger values count as this one. `update` gets the index up to which cells are done. InputError
    names the row of an impossible value.
    """
    n_genes = len(genes)
    place = np.full(source.n_genes, -1, dtype=np.int64)
    place[genes] = np.arange(n_genes)
    total, squares = np.zeros(n_batches * n_genes), np.zeros(n_batches * n_genes)
    for low in range(0, len(batch), BLOCK_ROWS):
        own = batch[low : low + BLOCK_ROWS]
        if (own == NO_BATCH).all():
            continue
        rows = source.read_rows(start + low, start + low + len(own))
        of_value, gene = np.repeat(own, np.diff(rows.indptr)), place[rows.indices]
        use = (of_value != NO_BATCH) & (gene >= 0)
        key, value = of_value[use] * np.int64(n_genes) + gene[use], rows.data[use].astype(np.float64)
        if clip is not None:
            value = np.minimum(value, clip.ravel()[key])
        total += np.bincount(key, weights=value, minlength=len(total))
        squares += np.bincount(key, weights=value * value, minlength=len(total))
        update(start + low + len(own))
    return BatchSums(total.reshape(n_batches, n_genes), squares.reshape(n_batches, n_genes))


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What is expected of the counts of each gene in each batch [n_batches n_genes]."""

    n_cells: npt.NDArray[np.int64]
    mean: Floats
    deviation: Floats
    """The standard deviation of a gene of this mean; 1 for a gene that does not vary."""

    @property
    def clip(self) -> Floats:
        """The largest value that counts."""
        clip: Floats = self.mean + self.deviation * np.sqrt(self.n_cells)[:, None]
        return clip


def expected_counts(sums: BatchSums, n_cells: Sequence[int]) -> Expected:
    """Mean and expected standard deviation of each gene in each batch of `n_cells` cells, from the sums of the first
    pass.

    InputError for a batch in which fewer than LEAST_GENES genes vary.
    """
    n = np.array(n_cells)[:, None]
    mean = sums.total / n
    variance = np.maximum(sums.squares - n * mean**2, 0) / (n - 1)
    deviation = np.ones_like(mean)
    for own_mean, own_variance, own_deviation in zip(mean, variance, deviation, strict=True):
        varies = own_variance > 0
        if varies.sum() < LEAST_GENES:
            raise InputError(
                f"in a batch of the `train` cells {int(varies.sum())} genes vary, and a curve through them needs "
                f"{LEAST_GENES}: choose genes by a list, with --genes FILE, or leave --genes out"
            )
        curve = smoother.loess(np.log10(own_mean[varies]), np.log10(own_variance[varies]), span=SPAN)
        own_deviation[varies] = np.sqrt(10.0**curve)
    return Expected(n_cells=np.array(n_cells), mean=mean, deviation=deviation)


def standardised_variance(clipped: BatchSums, of: Expected) -> Floats:
    """The variance of the clipped counts over the expected one [n_batches n_genes], from the sums of the second."""
    n = of.n_cells[:, None]
    squared = n * of.mean**2 + clipped.squares - 2 * clipped.total * of.mean
    found: Floats = squared / ((n - 1) * of.deviation**2)
    return found


class Ranking(NamedTuple):
    """The places of genes [n_genes]."""

    order: npt.NDArray[np.int64]
    """The genes, the most variable one first."""
    rank: Floats
    """Median rank, from 0, over the batches in which the gene is among the first N; NaN if there is none."""
    n_batches: npt.NDArray[np.int64]
    """Number of these batches."""
    variance: Floats
    """Standardised variance, the mean over batches."""


def rank_genes(variance: Floats, n: int) -> Ranking:
    """Rank genes by their standardised variances [n_batches n_genes], of which the first `n` of each batch count."""
    order = np.argsort(-variance, axis=1, kind="stable")
    rank = np.empty(variance.shape)
    np.put_along_axis(rank, order, np.arange(variance.shape[1], dtype=np.float64)[None], axis=1)
    is_first = rank < n
    n_batches = is_first.sum(axis=0)
    median = np.full(variance.shape[1], np.nan)
    has = n_batches > 0
    median[has] = np.nanmedian(np.where(is_first, rank, np.nan)[:, has], axis=0)
    place = np.lexsort((-n_batches, np.where(has, median, np.inf)))
    return Ranking(order=place, rank=median, n_batches=n_batches, variance=variance.mean(axis=0))


def variable_gene_constants() -> dict[str, Any]:
    """The constants that a choice depends on, by `module.NAME`, for its plan."""
    return constants_of([sys.modules[__name__], smoother])
