"""Which cells train the SAE, which choose thresholds and features, and which are reported: three splits.

Cells of one donor resemble each other, so all cells of a donor go to one split, and nothing is selected and reported on
the same donors. Without donors, cells are dealt singly. Batches are inside: donors, or the cells of each batch, are
dealt so that every batch is in every split where it has enough of them, because what tells batches apart can be chosen
in one split and reported in another only if both hold these batches. Whole batches are held out on request. Cells
without a donor are of nobody knows whom, of a held-out donor perhaps, so they are in `train` and count as no donor.

Units are assigned largest first, each to the split that lacks the most cells, but to one that a batch of theirs lacks
where that batch has no unit to spare; units within a factor of two in size are ordered by a hash of (seed, name), so
the seed decides without spoiling the balance. This costs microseconds per unit, and 2 bytes a cell in memory beside the
numbers of its units; some 30 bytes where cells are dealt singly.

A second data set that a trained SAE encodes may hold cells or donors that it was trained on (`KnownSplits`): each known
cell keeps its split, and a donor with known cells, or with a known name, takes the one furthest from being held out. A
donor of `train` in one file would otherwise be reported as held out in the other (1015 of the two Kang files, seed 0).

Method: grouped hold-out; why whole donors: Squair et al. 2021, doi:10.1038/s41467-021-25960-2.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.cells.factors import MISSING, Factor, Ints, Units, blocks_of, factorize, pairs_of, sizes_of
from feature_store.errors import InputError
from feature_store.storage.schemas import SPLITS

MIN_UNITS = len(SPLITS)
UNKNOWN = -1
TRAIN, SELECT, TEST = range(len(SPLITS))
SplitBy = Literal["donor", "batch", "cell"]
SplitLabels = npt.NDArray[np.object_]
"""The name of the split of each cell; cells of one split share one string, so a million cells take 8 MB."""
SplitNumbers = npt.NDArray[np.int8]
"""The split of each cell as a position in SPLITS."""


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """How cells are split: a seed, the wanted shares of cells in train, select and test, and the unit.

    `by` None means the donor where there are donors, else the cell.
    """

    seed: int = 0
    fractions: tuple[float, float, float] = (0.5, 0.25, 0.25)
    by: SplitBy | None = None

    def __post_init__(self) -> None:
        if len(self.fractions) != len(SPLITS) or min(self.fractions) <= 0 or abs(sum(self.fractions) - 1) > 1e-9:
            raise InputError(
                f"split fractions are {len(SPLITS)} positive numbers that sum to 1 ({', '.join(SPLITS)}); "
                f"got {self.fractions}"
            )


@dataclass(frozen=True, kw_only=True)
class KnownSplits:
    """What a trained SAE knows of the cells of some data.

    Attributes:
        cells: the split of each known cell as a position in SPLITS, `UNKNOWN` for the others [n_cells].
        unit: the kind of unit of the SAE's own cells: donor, batch or cell.
        units: the split of each of these units by name.
    """

    cells: npt.NDArray[np.int8]
    unit: str = "cell"
    units: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SplitRecord:
    """How cells were split.

    Attributes:
        unit, n_units: the kind of unit, and how many there are.
        cells, units: cells and units per split.
        n_batches, n_batches_in_all: batches, and those with cells in every split.
        n_kept: cells that have the split that a trained SAE knows.
        fallback: why this unit is not the one requested, and how many cells have none.
    """

    unit: str
    n_units: int
    cells: Mapping[str, int] = field(default_factory=dict)
    units: Mapping[str, int] = field(default_factory=dict)
    n_batches: int = 0
    n_batches_in_all: int = 0
    n_kept: int = 0
    fallback: str | None = None

    @property
    def text(self) -> str:
        """The record as a line for the reader."""
        whole = f"{self.n_units} whole {_plural(self.unit, self.n_units)}"
        inside = f"single cells inside {self.n_batches} {_plural('batch', self.n_batches)}"
        parts = [whole if self.unit != "cell" else inside if self.n_batches else "single cells"]
        parts[0] += ": " + ", ".join(f"{self.cells.get(split, 0)} {split}" for split in SPLITS) + " cells"
        if self.n_batches and self.unit != "batch":
            parts.append(f"{self.n_batches_in_all} of {self.n_batches} batches in every split")
            if self.n_batches_in_all < self.n_batches:
                parts[-1] += " (what goes with a batch is confirmed only if it has select and test cells)"
        if self.n_kept:
            parts.append(f"{self.n_kept} cells keep the split that the SAE knows")
        return "; ".join([*parts, *([] if self.fallback is None else [self.fallback])])


def make_splits(
    n_cells: int,
    *,
    donor: Units | None = None,
    batch: Units | None = None,
    known: KnownSplits | None = None,
    config: SplitConfig | None = None,
) -> tuple[SplitLabels, SplitRecord]:
    """The names of the splits that `split_numbers` gives, which does the work, and their record."""
    numbers, record = split_numbers(n_cells, donor=donor, batch=batch, known=known, config=config)
    labels: SplitLabels = _NAMES[numbers]
    return labels, record


def split_numbers(
    n_cells: int,
    *,
    donor: Units | None = None,
    batch: Units | None = None,
    known: KnownSplits | None = None,
    config: SplitConfig | None = None,
) -> tuple[SplitNumbers, SplitRecord]:
    """Split by donor, else by cell, inside batches; by cell where there are fewer than 3 units, and the record's
    `fallback` says so.

    `known`: cells keep the split that they have there, and units, by name or by their known cells, the one that comes
    first in SPLITS, however few they are; if anything is in train there, new cells go to select and test only. Cells of
    one unit are then in several splits only if the known ones are, and `fallback` says so.

    Returns the split of each cell [n_cells] and the record. InputError for fewer than 3 cells, units of another length,
    and a unit of which there is no column.
    """
    config = config or SplitConfig()
    kind = _unit(config.by, donor, batch, known)
    units = {"donor": donor, "batch": batch, "cell": None}[kind]
    factor = None if units is None else factorize(units, n_cells)
    batches = None if batch is None else factorize(batch, n_cells)
    kept = np.full(n_cells, UNKNOWN, dtype=np.int8) if known is None else known.cells
    known_units = _known_units(factor, known, kind)
    fallback = None
    n_units = 0 if factor is None else len(factor.names) - (factor.missing is not None)
    if factor is not None and not known_units and n_units < MIN_UNITS:
        fallback = (
            f"{n_units} {_plural(kind, n_units)} cannot fill {MIN_UNITS} splits: split by cell, so cells of "
            f"one {kind} are on both sides and held-out figures are optimistic"
        )
        factor = None
    if factor is None:
        split_of_cell = split_of_unit = _assign_cells(n_cells, config, kept, batches)
    else:
        split_of_unit = _assign_units(factor, config, known_units, None if kind == "batch" else batches)
        of_unit = split_of_unit[factor.unit_of_cell]
        split_of_cell = np.where(kept == UNKNOWN, of_unit, kept)
        divided = np.unique(factor.unit_of_cell[(split_of_cell != of_unit) & factor.is_known()])
        if len(divided):
            fallback = (
                f"{len(divided)} of {n_units} {_plural(kind, n_units)} have cells in several "
                f"splits, because cells that the SAE knows keep theirs and were not split by these {kind}s"
            )
            factor, split_of_unit = None, split_of_cell
        elif n_without := int((~factor.is_known() & (kept == UNKNOWN)).sum()):
            they = "cells" if n_without > 1 else "cell"
            fallback = f"{n_without} {they} without a {kind} in train, where cells go that may be of any {kind}"
    n_kept = int((kept != UNKNOWN).sum())
    return split_of_cell, _record(factor, kind, split_of_cell, split_of_unit, batches, fallback, n_kept=n_kept)


def splits_from_column(
    column: pl.Series | Factor,
    *,
    name: str,
    donor: Units | None = None,
    batch: Units | None = None,
    known: KnownSplits | None = None,
) -> tuple[SplitNumbers, SplitRecord]:
    """The splits [n_cells] in an obs column called `name`, and their record.

    All cells of a donor have to be in one split. Those of a batch need not be: a feature that tells batches apart can
    be chosen in one split and reported in another only if both hold these batches; the record's `fallback` says so.
    InputError for a value that is not a split, for a split without cells, for a donor in two splits, and for cells and
    donors of `train` (of any split, where the very cells are known) that the column moves to another split.
    """
    n_cells = len(column.unit_of_cell if isinstance(column, Factor) else column)
    names, of_cell = factorize(column, n_cells)
    if differ := sorted({str(None) if found == MISSING else found for found in names} ^ set(SPLITS)):
        raise InputError(
            f"--split was {name!r}, whose values differ from {', '.join(SPLITS)} in {', '.join(differ[:5])}; each cell "
            "needs one of the three, and each of the three needs cells: name another column, or leave --split out"
        )
    split_of_cell = split_of_unit = np.array([SPLITS.index(found) for found in names], dtype=np.int8)[of_cell]
    if known is not None:
        _check_known(split_of_cell, donor, known, name)
    kind, units, fallback = ("donor", donor, None) if donor is not None else ("batch", batch, None)
    factor = None if units is None else factorize(units, n_cells)
    try:
        if factor is not None:
            _check_whole(split_of_cell, factor)
    except InputError as error:
        if kind == "donor":
            raise
        factor, fallback = None, f"{error.args[0].partition(';')[0]}: figures are of held-out cells of the same batches"
    if factor is not None:
        split_of_unit = np.zeros(len(factor.names), dtype=np.int8)
        split_of_unit[factor.unit_of_cell] = split_of_cell
    batches = None if batch is None else factorize(batch, n_cells)
    return split_of_cell, _record(factor, kind, split_of_cell, split_of_unit, batches, fallback)


def _check_known(split_of_cell: Ints, donor: Units | None, known: KnownSplits, name: str) -> None:
    """Raise InputError if a column of splits moves what a trained SAE knows."""
    if len(moved := np.flatnonzero((known.cells != UNKNOWN) & (known.cells != split_of_cell))):
        cell = int(moved[0])
        raise InputError(
            f"--split was {name!r}, which moves {len(moved)} cells that the SAE knows to another split, the first is "
            f"row {cell} ({SPLITS[known.cells[cell]]} for the SAE, {SPLITS[split_of_cell[cell]]} in the column); leave "
            "--split out, and these cells keep their split"
        )
    if donor is not None and known.unit == "donor":
        factor = factorize(donor, len(split_of_cell))
        trained = np.array([known.units.get(one) == SPLITS[0] for one in factor.names], dtype=bool)
        if len(moved := np.flatnonzero(trained[factor.unit_of_cell] & (split_of_cell != 0))):
            who = factor.names[factor.unit_of_cell[moved[0]]]
            raise InputError(
                f"--split was {name!r}, which holds out cells of the donor {who!r}, whom the SAE was trained on; leave "
                "--split out, or give the donor another name if it is another person"
            )


def _unit(by: SplitBy | None, donor: Units | None, batch: Units | None, known: KnownSplits | None) -> SplitBy:
    """The kind of unit that is requested, or the default."""
    if by is None:
        whole_batches = batch is not None and known is not None and known.unit == "batch"
        return "donor" if donor is not None else "batch" if whole_batches else "cell"
    if {"donor": donor, "batch": batch, "cell": True}[by] is None:
        raise InputError(f"--split-by was {by!r}, but no {by} column was named; give --{by} COLUMN as well")
    return by


def _known_units(factor: Factor | None, known: KnownSplits | None, kind: str) -> dict[int, int]:
    """The split of each unit that is known by its name or by its cells: the first of SPLITS where there are several."""
    if factor is None or known is None:
        return {}
    splits = np.full(len(factor.names), len(SPLITS))
    here = known.cells != UNKNOWN
    np.minimum.at(splits, factor.unit_of_cell[here], known.cells[here])
    if known.unit == kind:
        for unit, name in enumerate(factor.names):
            if name in known.units:
                splits[unit] = min(splits[unit], SPLITS.index(known.units[name]))
    return {int(unit): int(splits[unit]) for unit in np.flatnonzero(splits < len(SPLITS)) if unit != factor.missing}


def _record(
    factor: Factor | None,
    kind: str,
    split_of_cell: SplitNumbers,
    split_of_unit: SplitNumbers,
    batches: Factor | None,
    fallback: str | None,
    *,
    n_kept: int = 0,
) -> SplitRecord:
    if factor is not None and factor.missing is not None:
        split_of_unit = np.delete(split_of_unit, factor.missing)
    cells, units = (
        dict(zip(SPLITS, sizes_of(split, len(SPLITS)).tolist(), strict=True))
        for split in (split_of_cell, split_of_unit)
    )
    n_batches = in_all = 0
    if batches is not None:
        n_batches = len(batches.names)
        pairs = pairs_of(batches.unit_of_cell, split_of_cell, n_batches, len(SPLITS)) // len(SPLITS)
        in_all = int((np.bincount(pairs, minlength=n_batches) == len(SPLITS)).sum())
    return SplitRecord(
        unit="cell" if factor is None else kind,
        n_units=len(split_of_unit),
        cells=cells,
        units=units,
        n_batches=n_batches,
        n_batches_in_all=in_all,
        n_kept=n_kept,
        fallback=fallback,
    )


def _plural(kind: str, n: int) -> str:
    return kind if n == 1 else f"{kind}es" if kind.endswith("ch") else f"{kind}s"


def check_whole_units(labels: SplitLabels, units: Units) -> None:
    """Raise InputError naming the first unit with cells in several splits; cells without a unit may lie anywhere."""
    _check_whole(_numbers(pl.Series(labels.tolist(), dtype=pl.String)), factorize(units, len(labels)))


def _check_whole(split_of_cell: SplitNumbers, units: Factor) -> None:
    pairs = pairs_of(units.unit_of_cell, split_of_cell, len(units.names), len(SPLITS))
    n_splits = np.bincount(pairs // len(SPLITS), minlength=len(units.names))
    if units.missing is not None:
        n_splits[units.missing] = 1
    divided = np.flatnonzero(n_splits > 1)
    if len(divided):
        where = [SPLITS[pair % len(SPLITS)] for pair in pairs[pairs // len(SPLITS) == divided[0]]]
        raise InputError(
            f"unit {units.names[divided[0]]!r} has cells in {' and '.join(where)} ({len(divided)} such units); "
            "all cells of a unit belong to one split: make the cell table again with `scsae extract`"
        )


def _numbers(column: pl.Series) -> SplitNumbers:
    return column.replace_strict(list(SPLITS), list(range(len(SPLITS))), return_dtype=pl.Int8).to_numpy()


_NAMES: SplitLabels = np.array(SPLITS, dtype=object)


def _assign_cells(n_cells: int, config: SplitConfig, kept: SplitNumbers, batches: Factor | None) -> SplitNumbers:
    """Split of each cell, by its number: those that are kept as they are, the others in the fractions in each batch.

    Batches of fewer than 3 cells are dealt together.
    """
    if n_cells < MIN_UNITS:
        raise InputError(f"{MIN_UNITS} splits need at least {MIN_UNITS} cells; got {n_cells}")
    is_new = kept == UNKNOWN
    n_new = int(is_new.sum())
    shares = np.array(config.fractions)
    if (kept == 0).any():
        # the SAE is trained already: cells that it has not seen are worth more held out
        shares[0] = 0
        shares /= shares.sum()
    stratum = np.zeros(n_new, dtype=np.int32)
    if batches is not None:
        sizes = sizes_of(batches.unit_of_cell[is_new], len(batches.names))
        stratum = np.where(sizes < MIN_UNITS, 0, np.arange(1, len(sizes) + 1)).astype(np.int32)[
            batches.unit_of_cell[is_new]
        ]
    sizes = sizes_of(stratum, 1 if batches is None else len(batches.names) + 1)
    # every split gets a cell however few there are
    before = np.cumsum(shares > 0)
    bounds = np.round(np.cumsum(shares) * sizes[:, None]).astype(int)
    bounds = np.clip(bounds, before, sizes[:, None] - (before[-1] - before))
    place = _places(np.random.default_rng(config.seed).permutation(n_new).astype(np.int32), stratum, sizes)
    new = np.empty(n_new, dtype=np.int8)
    for cells in blocks_of(n_new):
        new[cells] = (place[cells, None] >= bounds[stratum[cells], :-1]).sum(axis=1)
    split_of_cell = kept.copy()
    split_of_cell[is_new] = new
    return split_of_cell


def _places(rank: npt.NDArray[np.int32], stratum: npt.NDArray[np.int32], sizes: Ints) -> npt.NDArray[np.int32]:
    """The place of each cell among those of its stratum in the order of the ranks, which are a permutation."""
    if len(sizes) == 1:
        return rank
    order = np.lexsort((rank, stratum))
    place = np.empty(len(rank), dtype=np.int32)
    first = np.cumsum(sizes) - sizes
    for cells in blocks_of(len(rank)):
        place[order[cells]] = np.arange(cells.start, cells.stop) - first[stratum[order[cells]]]
    return place


def _assign_units(units: Factor, config: SplitConfig, known: Mapping[int, int], batches: Factor | None) -> SplitNumbers:
    """Split of each unit, by its number: the known ones first, then the largest, each to the split that lacks the most
    cells; none stays empty, and no split lacks a batch that has a unit for each split. Cells without a unit go to
    train.
    """
    sizes = sizes_of(units.unit_of_cell, len(units.names))
    lacking = np.array(config.fractions) * sizes.sum()
    n_units = np.zeros(len(SPLITS), dtype=int)
    split_of = np.zeros(len(sizes), dtype=np.int8)
    cover = _Coverage(units, batches)
    if units.missing is not None:
        lacking[TRAIN] -= sizes[units.missing]
        cover.add(units.missing, TRAIN)
    for unit, split in known.items():
        split_of[unit] = split
        lacking[split] -= sizes[unit]
        n_units[split] += 1
        cover.add(unit, split)
    if n_units[0]:
        # the SAE is trained already: units that it has not seen are worth more held out
        lacking[0] = -np.inf
        cover.lacks[:, 0] = False
    new = [unit for unit in range(len(sizes)) if unit not in known and unit != units.missing]
    order = sorted(new, key=lambda unit: (-int(sizes[unit]).bit_length(), _hash(config.seed, units.names[unit])))
    for position, unit in enumerate(order):
        empty = n_units == 0
        must_fill = len(order) - position <= empty.sum()
        open_splits = empty if must_fill else np.isfinite(lacking)
        needed = np.where(open_splits, cover.needed(unit), -1)
        split = int(np.argmax(np.where(needed == needed.max(), lacking, -np.inf)))
        split_of[unit] = split
        lacking[split] -= sizes[unit]
        n_units[split] += 1
        cover.add(unit, split)
    return split_of


class _Coverage:
    """Which batches lack which splits while units are assigned.

    Attributes:
        lacks: whether a batch has no cell in a split yet [n_batches 3].
    """

    def __init__(self, units: Factor, batches: Factor | None) -> None:
        n_batches = 0 if batches is None else len(batches.names)
        self.lacks = np.ones((n_batches, len(SPLITS)), dtype=bool)
        self._waiting = np.zeros(n_batches, dtype=int)
        self._batches_of: list[npt.NDArray[np.integer]] = [np.zeros(0, dtype=int)] * len(units.names)
        if batches is not None:
            pairs = pairs_of(units.unit_of_cell, batches.unit_of_cell, len(units.names), n_batches)
            self._waiting += np.bincount(pairs % n_batches, minlength=n_batches)
            bounds = np.searchsorted(pairs // n_batches, np.arange(len(units.names) + 1))
            self._batches_of = [pairs[a:b] % n_batches for a, b in pairwise(bounds)]

    def needed(self, unit: int) -> npt.NDArray[np.integer]:
        """For each split the batches of a unit that lack it and have no unit to spare [3]."""
        own = self._batches_of[unit]
        short = own[self._waiting[own] <= self.lacks[own].sum(axis=1)]
        counts: npt.NDArray[np.integer] = self.lacks[short].sum(axis=0)
        return counts

    def add(self, unit: int, split: int) -> None:
        """Count a unit as assigned."""
        own = self._batches_of[unit]
        self.lacks[own, split] = False
        self._waiting[own] -= 1


def _hash(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()
