"""Which cells train the SAE, which choose thresholds and features, and which are reported: three splits.

Cells of one donor resemble each other, so all cells of a donor go to one split, and nothing is selected and reported on
the same donors. Without donors, cells are dealt singly. Batches are inside: donors, or the cells of each batch, are
dealt so that every batch is in every split where it has enough of them, because what tells batches apart can be chosen
in one split and reported in another only if both hold these batches. Whole batches are held out on request.

Units are assigned largest first, each to the split that lacks the most cells, but to one that a batch of theirs lacks
where that batch has no unit to spare; units within a factor of two in size are ordered by a hash of (seed, name), so
the seed decides without spoiling the balance. This costs microseconds per unit, and 20 bytes a cell in memory.

A second data set that a trained SAE encodes may hold cells or donors that it was trained on (`KnownSplits`): each known
cell keeps its split, and a donor with known cells, or with a known name, takes the one furthest from being held out. A
donor of `train` in one file would otherwise be reported as held out in the other (1015 of the two Kang files, seed 0).

Method: grouped hold-out; why whole donors: Squair et al. 2021, doi:10.1038/s41467-021-25960-2.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.cells.canonical import canonical_text
from feature_store.errors import InputError
from feature_store.storage.schemas import SPLITS

MIN_UNITS = len(SPLITS)
UNKNOWN = -1
SplitBy = Literal["donor", "batch", "cell"]
SplitLabels = npt.NDArray[np.object_]
"""The name of the split of each cell; cells of one split share one string, so a million cells take 8 MB."""
Units = Sequence[str | None] | npt.NDArray[np.object_] | pl.Series
_Ints = npt.NDArray[np.integer]


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
        fallback: why this unit is not the one requested.
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
    if factor is not None and not known_units and (n_units := len(factor.names)) < MIN_UNITS:
        fallback = (
            f"{n_units} {_plural(kind, n_units)} cannot fill {MIN_UNITS} splits: split by cell, so cells of "
            f"one {kind} are on both sides and held-out figures are optimistic"
        )
        factor = None
    if factor is None:
        split_of_cell = split_of_unit = _assign_cells(n_cells, config, kept, batches)
    else:
        split_of_unit = _assign_units(factor, config, known_units, None if kind == "batch" else batches)
        split_of_cell = np.where(kept == UNKNOWN, split_of_unit[factor.unit_of_cell], kept)
        divided = np.unique(factor.unit_of_cell[split_of_cell != split_of_unit[factor.unit_of_cell]])
        if len(divided):
            fallback = (
                f"{len(divided)} of {len(factor.names)} {_plural(kind, len(factor.names))} have cells in several "
                f"splits, because cells that the SAE knows keep theirs and were not split by these {kind}s"
            )
            factor, split_of_unit = None, split_of_cell
    n_kept = int((kept != UNKNOWN).sum())
    unit = "cell" if factor is None else kind
    return _NAMES[split_of_cell], _record(unit, split_of_cell, split_of_unit, batches, fallback, n_kept=n_kept)


def splits_from_column(
    column: pl.Series,
    *,
    name: str,
    donor: Units | None = None,
    batch: Units | None = None,
    known: KnownSplits | None = None,
) -> tuple[SplitLabels, SplitRecord]:
    """The splits [n_cells] in an obs column called `name`, and their record.

    All cells of a donor have to be in one split. Those of a batch need not be: a feature that tells batches apart can
    be chosen in one split and reported in another only if both hold these batches; the record's `fallback` says so.
    InputError for a value that is not a split, for a split without cells, for a donor in two splits, and for cells and
    donors of `train` (of any split, where the very cells are known) that the column moves to another split.
    """
    values = canonical_text(column)
    if differ := sorted({str(value) for value in values.unique()} ^ set(SPLITS)):
        raise InputError(
            f"--split was {name!r}, whose values differ from {', '.join(SPLITS)} in {', '.join(differ[:5])}; each cell "
            "needs one of the three, and each of the three needs cells: name another column, or leave --split out"
        )
    labels = split_labels(values)
    split_of_cell = split_of_unit = np.array([SPLITS.index(label) for label in labels])
    if known is not None:
        _check_known(split_of_cell, donor, known, name)
    kind, units, fallback = ("donor", donor, None) if donor is not None else ("batch", batch, None)
    try:
        if units is not None:
            check_whole_units(labels, units)
    except InputError as error:
        if kind == "donor":
            raise
        units, fallback = None, f"{error.args[0].partition(';')[0]}: figures are of held-out cells of the same batches"
    if units is not None:
        first = np.unique(factorize(units, len(labels)).unit_of_cell, return_index=True)[1]
        split_of_unit = split_of_cell[first]
    batches = None if batch is None else factorize(batch, len(labels))
    return labels, _record("cell" if units is None else kind, split_of_cell, split_of_unit, batches, fallback)


def _check_known(split_of_cell: _Ints, donor: Units | None, known: KnownSplits, name: str) -> None:
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


def _known_units(factor: "Factor | None", known: KnownSplits | None, kind: str) -> dict[int, int]:
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
    return {int(unit): int(splits[unit]) for unit in np.flatnonzero(splits < len(SPLITS))}


def _record(
    kind: str,
    split_of_cell: _Ints,
    split_of_unit: _Ints,
    batches: "Factor | None",
    fallback: str | None,
    *,
    n_kept: int = 0,
) -> SplitRecord:
    cells, units = (
        dict(zip(SPLITS, np.bincount(split, minlength=len(SPLITS)).tolist(), strict=True))
        for split in (split_of_cell, split_of_unit)
    )
    n_batches = in_all = 0
    if batches is not None:
        n_batches = len(batches.names)
        pairs = np.unique(batches.unit_of_cell.astype(np.int64) * len(SPLITS) + split_of_cell) // len(SPLITS)
        in_all = int((np.bincount(pairs, minlength=n_batches) == len(SPLITS)).sum())
    return SplitRecord(
        unit=kind,
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
    """Raise InputError naming the first unit whose cells lie in more than one split."""
    names, unit_of_cell = factorize(units, len(labels))
    present = np.stack([np.bincount(unit_of_cell[labels == split], minlength=len(names)) > 0 for split in SPLITS])
    divided = np.flatnonzero(present.sum(axis=0) > 1)
    if len(divided):
        where = [split for split, has in zip(SPLITS, present[:, divided[0]], strict=True) if has]
        raise InputError(
            f"unit {names[divided[0]]!r} has cells in {' and '.join(where)} ({len(divided)} such units); "
            "all cells of a unit belong to one split: make the cell table again with `scsae extract`"
        )


def split_labels(column: pl.Series) -> SplitLabels:
    """A column of names of splits as an array, in which all cells of a split share one string."""
    numbers = column.replace_strict(list(SPLITS), list(range(len(SPLITS))), return_dtype=pl.UInt8)
    labels: SplitLabels = _NAMES[numbers.to_numpy()]
    return labels


_NAMES: SplitLabels = np.array(SPLITS, dtype=object)
_MISSING = "\0missing"


class Factor(NamedTuple):
    """Units by number: their names, sorted, and the unit of each cell [n_cells]."""

    names: list[str]
    unit_of_cell: npt.NDArray[np.integer]


def factorize(units: Units, n_cells: int) -> Factor:
    """Units by number, by their canonical text; a missing unit is one of its own. InputError for another length."""
    if len(units) != n_cells:
        raise InputError(f"units has {len(units)} entries for {n_cells} cells")
    filled = canonical_text(units).fill_null(_MISSING)
    names = filled.unique().sort()
    return Factor(names.to_list(), filled.cast(pl.Enum(names)).to_physical().to_numpy())


def _assign_cells(
    n_cells: int, config: SplitConfig, kept: npt.NDArray[np.int8], batches: Factor | None
) -> npt.NDArray[np.intp]:
    """Split of each cell, by its number: those that are kept as they are, the others in the fractions in each batch.

    Batches of fewer than 3 cells are dealt together.
    """
    if n_cells < MIN_UNITS:
        raise InputError(f"{MIN_UNITS} splits need at least {MIN_UNITS} cells; got {n_cells}")
    split_of_cell = kept.astype(np.intp)
    new = np.flatnonzero(kept == UNKNOWN)
    shares = np.array(config.fractions)
    if (kept == 0).any():
        # the SAE is trained already: cells that it has not seen are worth more held out
        shares[0] = 0
        shares /= shares.sum()
    stratum = np.zeros(len(new), dtype=np.int64) if batches is None else batches.unit_of_cell[new].astype(np.int64) + 1
    stratum[np.bincount(stratum)[stratum] < MIN_UNITS] = 0
    sizes = np.bincount(stratum)
    # every split gets a cell however few there are
    before = np.cumsum(shares > 0)
    bounds = np.round(np.cumsum(shares) * sizes[:, None]).astype(int)
    bounds = np.clip(bounds, before, sizes[:, None] - (before[-1] - before))
    order = np.lexsort((np.random.default_rng(config.seed).permutation(len(new)), stratum))
    place = np.empty(len(new), dtype=np.int64)
    place[order] = np.arange(len(new)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    split_of_cell[new] = (place[:, None] >= bounds[stratum, :-1]).sum(axis=1)
    return split_of_cell


def _assign_units(
    units: Factor, config: SplitConfig, known: Mapping[int, int], batches: Factor | None
) -> npt.NDArray[np.intp]:
    """Split of each unit, by its number: the known ones first, then the largest, each to the split that lacks the most
    cells; none stays empty, and no split lacks a batch that has a unit for each split.
    """
    sizes = np.bincount(units.unit_of_cell, minlength=len(units.names))
    lacking = np.array(config.fractions) * sizes.sum()
    n_units = np.zeros(len(SPLITS), dtype=int)
    split_of = np.zeros(len(sizes), dtype=np.intp)
    cover = _Coverage(units, batches)
    for unit, split in known.items():
        split_of[unit] = split
        lacking[split] -= sizes[unit]
        n_units[split] += 1
        cover.add(unit, split)
    if n_units[0]:
        # the SAE is trained already: units that it has not seen are worth more held out
        lacking[0] = -np.inf
        cover.lacks[:, 0] = False
    new = [unit for unit in range(len(sizes)) if unit not in known]
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
            pairs = np.unique(units.unit_of_cell.astype(np.int64) * n_batches + batches.unit_of_cell)
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
