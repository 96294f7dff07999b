"""The panel of a data set: the cells that get everything, where there are too many for all of them to get it.

Up to a wanted number of cells the panel is all cells. Of more cells it is a seeded draw inside strata, which are the
combinations of split, donor, cell type and other labels that occur (a missing value is a value):

    floor       each stratum gives min(size, t) cells, with the largest t <= STRATUM_CELLS for which this is at most a
                sixteenth of the panel, so that a rare group is measured on all of its cells;
    share       the rest of the panel goes to the strata in proportion to the cells that they have left, so that what is
                estimated on the panel is close to what all cells would give. Shares are rounded so that the strata up
                to any one have their exact sum within a cell: where most strata have less than one cell of the panel,
                splits and donors, which come first, still have their share. The seed decides who is rounded up, so that
                every stratum has its exact share on average;
    values      each value of each column by itself then gets at least min(size, t) cells, t <= VALUE_CELLS and half of
                the panel for all values, from its strata by their shares, as far as another sixteenth of the panel
                allows. 1,000 cells put the standard error of an AUROC at .01.

Floors are not free: they change the mixture of types among the others, which an AUROC against the rest sees. With
floors of half the panel statistics differed from those of all cells by up to 9 standard errors, whatever the seed; with
a sixteenth, by their standard errors (`docs/measured.md`).

Inside a stratum every set of cells is equally likely: each cell has a random number, which depends on the seed and its
position alone, and the smallest are taken. Beside the codes of the columns this takes 4 bytes a cell in memory.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from feature_store.cells.factors import Ints, blocks_of, pairs_of, sizes_of

PANEL_CELLS = 200_000
"""Cells of a panel, where no other number is asked for."""
STRATUM_CELLS = 100
"""Most cells of a stratum that are taken whole."""
VALUE_CELLS = 1_000
"""Cells that a value of a column has at least, where it has as many and the panel has room."""
FLOORS = 16
"""The floors of the strata, and those of the values of a column, take at most one in this many cells of the panel."""
_STREAM = 17
"""Sets the random numbers of the panel apart from those of the splits, which have the same seed."""

Counts = npt.NDArray[np.int64]


def draw_panel(columns: Sequence[Ints], n_cells: int, *, n_wanted: int, seed: int) -> npt.NDArray[np.bool_]:
    """Whether each cell is in the panel [n_cells]: all cells if they are at most `n_wanted`, else exactly `n_wanted`.

    `columns` are the codes of split, donor, cell type and labels, each [n_cells], as far as there are such columns: a
    code is the number of a value, from 0 on, and a missing value has a number of its own.
    """
    if n_cells <= n_wanted:
        return np.ones(n_cells, dtype=np.bool_)
    stratum, values = _cross(columns, n_cells)
    sizes = sizes_of(stratum, len(values))
    offset = np.random.default_rng((seed, _STREAM)).random()
    return _draw(stratum, sizes, panel_counts(sizes, values, n_wanted, offset=offset), seed)


def panel_counts(sizes: Ints, values: Ints, n_wanted: int, *, offset: float = 0.5) -> Counts:
    """The number of cells that each stratum gives to the panel [n_strata].

    `sizes` are the strata's cells, and `values` the code of each of them in each column [n_strata n_columns]. Sums of
    shares are rounded down after `offset`, in [0, 1), is added.
    """
    floors = np.minimum(sizes, _floor(sizes, STRATUM_CELLS, n_wanted // FLOORS))
    counts = _filled(sizes, floors, n_wanted, offset)
    for of_stratum in values.T:
        of_value, has = (_sums(of_stratum, cells) for cells in (sizes, counts))
        lacks = np.maximum(np.minimum(of_value, _floor(of_value, VALUE_CELLS, n_wanted // 2)) - has, 0)
        is_short = lacks[of_stratum] > 0
        most = min(n_wanted - int(np.where(is_short, counts, floors).sum()), n_wanted // FLOORS)
        if lacks.sum() > most:
            lacks = _shares(np.array([most]), lacks, np.zeros(len(lacks), dtype=np.int64), offset)
        floors = np.where(is_short, counts, floors) + _shares(lacks, sizes - counts, of_stratum, offset)
        counts = _filled(sizes, floors, n_wanted, offset)
    return counts


def _floor(sizes: Ints, most: int, room: int) -> int:
    """The largest number up to `most` of which every group can have as many, or all that it has, in `room` cells."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(sizes, middle).sum() <= room else (low, middle - 1)
    return low


def _filled(sizes: Ints, floors: Ints, n_wanted: int, offset: float) -> Counts:
    """The floors and a share of what they leave of the panel, in proportion to the cells that are left."""
    room = sizes - floors
    return floors + _shares(np.array([n_wanted - floors.sum()]), room, np.zeros(len(room), dtype=np.int64), offset)


def _shares(amounts: Ints, weights: Ints, group: Ints, offset: float) -> Counts:
    """Whole numbers in proportion to the weights, whose sum in each group is its amount, and none above its weight.

    No amount is above the sum of the weights of its group. The sum of the numbers up to any one in its group is the
    exact sum plus the offset, rounded down.
    """
    order = np.argsort(group, kind="stable")
    own = group[order]
    total = _sums(group, weights)
    until = np.cumsum(weights[order]) - (np.cumsum(total) - total)[own]
    # careful: an amount times a sum of weights stays below 2 ** 63 up to 3 billion cells
    up_to = (amounts[own] * until + (offset * total).astype(np.int64)[own]) // np.maximum(total[own], 1)
    is_first = np.diff(own, prepend=-1) > 0
    counts = np.empty(len(weights), dtype=np.int64)
    counts[order] = np.where(is_first, up_to, np.diff(up_to, prepend=0))
    return counts


def _sums(group: Ints, cells: Ints) -> Counts:
    sums = np.zeros(int(group.max()) + 1, dtype=np.int64)
    np.add.at(sums, group, cells)
    return sums


def _cross(columns: Sequence[Ints], n_cells: int) -> tuple[npt.NDArray[np.int32], Ints]:
    """The stratum of each cell, and the code of each stratum in each column [n_strata n_columns].

    The strata are sorted by the first column, then the second, and so on.
    """
    stratum = np.zeros(n_cells, dtype=np.int32)
    values = np.zeros((1, 0), dtype=np.int64)
    for codes in columns:
        n_codes = int(codes.max()) + 1
        pairs = pairs_of(stratum, codes, len(values), n_codes)
        for cells in blocks_of(n_cells):
            stratum[cells] = np.searchsorted(pairs, stratum[cells].astype(np.int64) * n_codes + codes[cells])
        values = np.column_stack([values[pairs // n_codes], pairs % n_codes])
    return stratum, values


def _draw(stratum: npt.NDArray[np.int32], sizes: Ints, counts: Ints, seed: int) -> npt.NDArray[np.bool_]:
    """Whether each cell is one of the `counts` cells of its stratum with the smallest random numbers [n_cells]."""
    limit = (counts + 6 * np.sqrt(counts) + 20) / sizes
    while True:
        cells, numbers = _below(limit, stratum, seed)
        own = stratum[cells]
        n_found = np.bincount(own, minlength=len(sizes))
        if (n_found >= counts).all():
            break
        # in less than one draw of 10 ** 8
        limit = np.where(n_found < counts, 2 * limit, limit)
    order = np.lexsort((numbers, own))
    place = np.arange(len(order)) - np.repeat(np.cumsum(n_found) - n_found, n_found)
    drawn = np.zeros(len(stratum), dtype=np.bool_)
    drawn[cells[order[place < counts[own[order]]]]] = True
    return drawn


def _below(
    limit: npt.NDArray[np.float64], stratum: npt.NDArray[np.int32], seed: int
) -> tuple[Counts, npt.NDArray[np.float64]]:
    """The cells whose random number, uniform in [0, 1), is below the limit of their stratum, and these numbers."""
    rng = np.random.default_rng((seed, _STREAM, 1))
    cells, numbers = [], []
    for block in blocks_of(len(stratum)):
        random = rng.random(block.stop - block.start)
        found = np.flatnonzero(random < limit[stratum[block]])
        cells.append(found + block.start)
        numbers.append(random[found])
    return np.concatenate(cells), np.concatenate(numbers)
