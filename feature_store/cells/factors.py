"""A column of groups of cells as numbers: the names of the groups, and the group of each cell.

A column of text takes 16 bytes a cell in memory and more, its numbers 1 to 4, so what decides on splits and panel is
read in ranges of cells and kept as numbers.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.cells.canonical import canonical_text
from feature_store.errors import InputError

MISSING = "\0missing"
"""The name of the group of cells without a value."""
N_EXAMPLES = 3
BLOCK_CELLS = 1 << 20
_MOST_PAIRS = 1 << 26
Ints = npt.NDArray[np.integer]


class Factor(NamedTuple):
    """Groups by number: their names, sorted, and the group of each cell [n_cells]."""

    names: list[str]
    unit_of_cell: Ints

    @property
    def missing(self) -> int | None:
        """The group of the cells without a value; None if every cell has one."""
        return self.names.index(MISSING) if MISSING in self.names else None

    def is_known(self) -> npt.NDArray[np.bool_]:
        """Whether each cell has a value [n_cells]."""
        missing = self.missing
        return np.ones(len(self.unit_of_cell), dtype=bool) if missing is None else self.unit_of_cell != missing

    def texts(self, start: int, stop: int) -> pl.Series:
        """The names of the groups of the cells [start, stop), null where a value is missing."""
        names = pl.Series([None if name == MISSING else name for name in self.names], dtype=pl.String)
        return names.gather(self.unit_of_cell[start:stop])


Units = Sequence[str | None] | npt.NDArray[np.object_] | pl.Series | Factor


class FactorBuilder:
    """Makes a factor of a column that comes in ranges of cells, by the canonical text of its values.

    Attributes:
        n_known: cells with a value so far.
        examples: the first values.
    """

    def __init__(self, n_cells: int) -> None:
        self.n_known = 0
        self.examples: tuple[str, ...] = ()
        self._numbers: dict[str, int] = {}
        self._codes = np.zeros(n_cells, dtype=np.int32)

    def add(self, start: int, column: pl.Series) -> None:
        """Take the values of the cells from `start` on."""
        # careful: methods of a series fail where its name is a pattern
        texts = canonical_text(column.rename(""))
        self.n_known += len(texts) - texts.null_count()
        self.examples = self.examples or tuple(texts.drop_nulls().head(N_EXAMPLES))
        texts = texts.fill_null(MISSING)
        names = texts.unique()
        numbers = np.array([self._numbers.setdefault(name, len(self._numbers)) for name in names], dtype=np.int32)
        own = texts.cast(pl.Enum(names)).to_physical().to_numpy()
        self._codes[start : start + len(texts)] = numbers[own]

    @property
    def n_values(self) -> int:
        """Number of different values so far; a missing one is none."""
        return len(self._numbers) - (MISSING in self._numbers)

    def factor(self) -> Factor:
        """The factor; the builder is used up."""
        names = sorted(self._numbers)
        place = np.empty(len(names), dtype=np.min_scalar_type(max(len(names) - 1, 0)))
        place[[self._numbers[name] for name in names]] = np.arange(len(names))
        return Factor(names, place[self._codes])


def factorize(units: Units, n_cells: int) -> Factor:
    """Units by number, by their canonical text; cells without one are the group `Factor.missing`.

    InputError for another length.
    """
    n_units = len(units.unit_of_cell if isinstance(units, Factor) else units)
    if n_units != n_cells:
        raise InputError(f"units has {n_units} entries for {n_cells} cells")
    if isinstance(units, Factor):
        return units
    builder = FactorBuilder(n_cells)
    builder.add(0, canonical_text(units))
    return builder.factor()


def pairs_of(first: Ints, second: Ints, n_first: int, n_second: int) -> npt.NDArray[np.int64]:
    """The numbers `first * n_second + second` of the pairs of groups that occur among the cells, ascending.

    Groups are numbers below `n_first` and `n_second`, each [n_cells].
    """
    blocks = (first[cells].astype(np.int64) * n_second + second[cells] for cells in blocks_of(len(first)))
    if n_first * n_second > _MOST_PAIRS:
        return np.unique(np.concatenate([np.unique(block) for block in blocks]))
    occurs = np.zeros(n_first * n_second, dtype=np.bool_)
    for block in blocks:
        occurs[block] = True
    return np.flatnonzero(occurs)


def sizes_of(groups: Ints, n_groups: int) -> npt.NDArray[np.int64]:
    """The number of cells of each group [n_groups]; numpy's own count copies all cells as int64."""
    sizes = np.zeros(n_groups, dtype=np.int64)
    for cells in blocks_of(len(groups)):
        sizes += np.bincount(groups[cells], minlength=n_groups)
    return sizes


def blocks_of(n_cells: int) -> Iterator[slice]:
    """Ranges of cells that bound the memory of a pass over all of them."""
    return (slice(start, min(start + BLOCK_CELLS, n_cells)) for start in range(0, n_cells, BLOCK_CELLS))
