"""Gene correlation: does the cell code of a feature follow the expression of a gene?

Pearson's and Spearman's correlation of the cell code with log1p(CP10k) over the cells of a split, from additive sums
(`moments`); the zeros of both sides are one block of ties. p is never that of n independent cells: the ranks within
each replicate unit are permuted among the cells of the unit, and the moments of that permutation are exact, so
differences BETWEEN donors count for nothing. p tests the Spearman correlation within units, whichever column a table is
sorted by. It is conditional on the donors at hand, and takes the cells of a donor as exchangeable.

Ranks need all cells of a column but no other column, so the work is split into tiles, which are a range of features by
a range of genes, each exact by itself. The expression is read one range of genes at a time (`GeneTiles`), ranked once,
and kept while there is memory for it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy import sparse

from feature_store.associations.inputs import Bools, Floats, Ints, Labels, Sparse, Strata
from feature_store.associations.moments import BlockMoments, cross_product, power_sums
from feature_store.associations.rank_tests import two_sided
from feature_store.associations.ranks import column_ranks
from feature_store.associations.sorted_columns import Codes, SortedColumns, csc

METHOD = "blocked-spearman/1"
KEPT_BYTES = 400_000_000
"""Size in bytes of the ranked expression that is kept for the next range of features."""


class Expression(NamedTuple):
    """Each [n_features n_genes]: the correlations, p, and n_both, the number of cells where both are above zero;
    `within`, Pearson's correlation inside strata, is None without strata.
    """

    pearson: Floats
    spearman: Floats
    within: Floats | None
    p: Floats
    n_both: Floats


class Side(NamedTuple):
    """One of the two matrices with all that the products need: values, ranks and ranks within blocks with the same
    nonzeros (CSC of codes, CSR of expression), 16 bytes a nonzero, and the power sums of all three, the last of them
    of the ranks within blocks times their weights.
    """

    values: Sparse
    ranks: Sparse
    blocked: Sparse
    sums: Floats
    inner_sums: Floats | None
    rank_sums: Floats
    blocked_sums: Floats

    def by_cell(self) -> "Side":
        """The same with matrices in CSR, again with the same nonzeros."""
        own = self.values
        place = sparse.csr_array(csc(np.arange(own.nnz, dtype=np.int32), own.indices, own.indptr, own.shape))

        def to_csr(matrix: Sparse) -> Sparse:
            return sparse.csr_array((matrix.data[place.data], place.indices, place.indptr), matrix.shape)

        return self._replace(values=to_csr(own), ranks=to_csr(self.ranks), blocked=to_csr(self.blocked))

    @property
    def bytes(self) -> int:
        """Size of the matrices in bytes."""
        pattern = self.values.indices.nbytes + self.values.indptr.nbytes
        return int(pattern + sum(m.data.nbytes for m in (self.values, self.ranks, self.blocked)))


@dataclass(frozen=True, kw_only=True)
class CellBlocks:
    """The cells of one split: `rows` is their mask, `units` are the blocks of the permutation, and `inside` are the
    strata in which Pearson's correlation is computed once more, None without cell types.
    """

    rows: Bools
    units: Strata
    n_units: int | None
    inside: Strata | None

    @classmethod
    def of(cls, rows: Bools, units: Labels | None, within: Labels | None) -> "CellBlocks":
        """From labels of all cells [n_cells] and the mask of the split."""
        n = int(rows.sum())
        blocks = Strata.of(n, units.take(rows) if units else None)
        return cls(
            rows=rows,
            units=blocks,
            n_units=blocks.n_strata if units else None,
            inside=Strata.of(n, within.take(rows)) if within else None,
        )

    @property
    def n(self) -> int:
        """Cells of the split."""
        return int(self.units.codes.size)

    def side(self, codes: Codes) -> Side:
        """The ranks and sums of a matrix [n n_columns] without stored zeros."""
        one, columns = Strata.single(self.n), SortedColumns.of(codes)
        ranks, blocked = column_ranks(columns, one).scores, column_ranks(columns, self.units).scores
        return Side(
            values=columns.matrix,
            ranks=ranks,
            blocked=blocked,
            sums=power_sums(columns.matrix, one),
            inner_sums=None if self.inside is None else power_sums(columns.matrix, self.inside),
            rank_sums=power_sums(ranks, one),
            blocked_sums=power_sums(blocked, self.units, weight=self._weight()),
        )

    def correlate(self, features: Side, genes: Side) -> Expression:
        """The correlations of every feature with every gene of a tile."""
        one = np.array([float(self.n)])
        cross = cross_product(features.values, genes.values)
        within = None
        if self.inside is not None and features.inner_sums is not None and genes.inner_sums is not None:
            nested = BlockMoments(n=self.inside.sizes(), a=features.inner_sums, b=genes.inner_sums, cross=cross)
            within = nested.correlation()
        ranks = cross_product(features.ranks, genes.ranks)
        blocked = cross_product(features.blocked, genes.blocked, weight=self._weight())
        permuted = BlockMoments(n=self.units.sizes(), a=features.blocked_sums, b=genes.blocked_sums, cross=blocked)
        return Expression(
            pearson=BlockMoments(n=one, a=features.sums, b=genes.sums, cross=cross).correlation(),
            spearman=BlockMoments(n=one, a=features.rank_sums, b=genes.rank_sums, cross=ranks).correlation(),
            within=within,
            p=two_sided(permuted.permutation())[1],
            n_both=cross_product(_above_zero(features.values), _above_zero(genes.values), dtype=np.float32),
        )

    def _weight(self) -> Floats:
        """The weight of the ranks of each cell within its block [n]."""
        weight: Floats = (1.0 / (self.units.sizes() + 1.0))[self.units.codes]
        return weight


class Tile(NamedTuple):
    """A range of genes: `sides` by split (CSR), and per split how many cells express each gene."""

    genes: slice
    sides: Mapping[str, Side]
    n_cells: Mapping[str, Ints]


class GeneTiles:
    """The expression side of the correlations, a range of genes at a time.

    read(start, stop) returns the columns of a range of genes for all cells, CSC [n_cells stop - start] without stored
    zeros; bounds: where the ranges begin, and the number of genes; blocks: the cells of each split. Ranked expression
    is kept up to a size of `kept_bytes`; the rest is read and ranked again each time.
    """

    def __init__(
        self,
        read: Callable[[int, int], Sparse],
        bounds: Sequence[int],
        blocks: Mapping[str, CellBlocks],
        *,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self.n_genes = bounds[-1]
        self.blocks = blocks
        self._read = read
        self._bounds = bounds
        self._kept: dict[int, Tile] = {}
        self._room = kept_bytes

    def __iter__(self) -> Iterator[Tile]:
        """Each range of genes once, in order."""
        for start, stop in pairwise(self._bounds):
            tile = self._kept.get(start)
            if tile is None:
                tile = self._make(start, stop)
                size = sum(side.bytes for side in tile.sides.values())
                if size <= self._room:
                    self._room -= size
                    self._kept[start] = tile
            yield tile

    def _make(self, start: int, stop: int) -> Tile:
        matrix = self._read(start, stop)
        sides, n_cells = {}, {}
        for split, blocks in self.blocks.items():
            here = matrix[np.flatnonzero(blocks.rows)]
            sides[split] = blocks.side(here).by_cell()
            n_cells[split] = np.diff(here.indptr).astype(np.int64)
        return Tile(slice(start, stop), sides, n_cells)


def _above_zero(values: Sparse) -> Sparse:
    # careful: counts are exact in float32 up to 16 million cells
    return type(values)(((values.data > 0).astype(np.float32), values.indices, values.indptr), shape=values.shape)
