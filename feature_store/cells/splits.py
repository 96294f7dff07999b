"""Which cells train the SAE, which choose thresholds and features, and which are reported: three splits of whole units.

Cells of one donor resemble each other, so a unit (a donor; without donors a batch; without batches a cell) goes to
one split whole, and nothing is selected and reported on the same cells. Units are dealt out largest first, each to the
split that lacks the most cells; units within a factor of two in size are ordered by a hash of (seed, name), so the seed
decides without spoiling the balance. Costs microseconds per unit, and 20 bytes a cell while it works.

A second data set that a trained SAE encodes may hold donors that it was trained on: what is `known` of a unit stays,
or a donor of `train` in one file would be reported as held out in the other (1015 of the two Kang files, with seed 0).

Method: grouped hold-out; why whole donors: Squair et al. 2021, doi:10.1038/s41467-021-25960-2.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.errors import InputError
from feature_store.storage.schemas import SPLITS

MIN_UNITS = len(SPLITS)
Labels = npt.NDArray[np.object_]
"""Strings, of which a cell holds a reference: a million cells are 8 MB."""
Units = Sequence[str | None] | npt.NDArray[np.object_] | pl.Series


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """How cells are split: a seed and the wanted shares of cells in train, select and test."""

    seed: int = 0
    fractions: tuple[float, float, float] = (0.5, 0.25, 0.25)

    def __post_init__(self) -> None:
        if len(self.fractions) != len(SPLITS) or min(self.fractions) <= 0 or abs(sum(self.fractions) - 1) > 1e-9:
            raise InputError(
                f"split fractions are {len(SPLITS)} positive numbers that sum to 1 ({', '.join(SPLITS)}); "
                f"got {self.fractions}"
            )


@dataclass(frozen=True, kw_only=True)
class SplitRecord:
    """What was split: the kind of unit, units and cells per split, and why the kind is not the one asked for."""

    unit: str
    n_units: int
    cells: Mapping[str, int] = field(default_factory=dict)
    units: Mapping[str, int] = field(default_factory=dict)
    fallback: str | None = None


def make(
    n_cells: int,
    *,
    donor: Units | None = None,
    batch: Units | None = None,
    known: Mapping[str, str] | None = None,
    config: SplitConfig | None = None,
) -> tuple[Labels, SplitRecord]:
    """Split by donor, else by batch, else by cell; with fewer than 3 units by cell, which the record's `fallback` says.

    `known`: splits that units have already, by name, from the data of a trained SAE. They keep them, however few there
    are, and where some of them were trained on, units that are new go to select and test alone.

    Returns the split of each cell [n_cells] and the record. InputError for fewer than 3 cells or units of another
    length.
    """
    config = config or SplitConfig()
    kind, units = ("donor", donor) if donor is not None else ("batch", batch) if batch is not None else ("cell", None)
    found = None if units is None else _factorize(units, n_cells)
    fallback = None
    kept = {} if found is None or known is None else {name: known[name] for name in found.names if name in known}
    if found is not None and not kept and (n_units := len(found.names)) < MIN_UNITS:
        fallback = (
            f"{n_units} {kind}{'' if n_units == 1 else 's'} cannot fill {MIN_UNITS} splits: split by cell, so cells of "
            f"one {kind} are on both sides and held-out figures are optimistic"
        )
        kind, found = "cell", None
    if found is None:
        split_of_unit = split_of_cell = _assign_cells(n_cells, config.seed, config.fractions)
    else:
        split_of_unit = _deal(found, config.seed, config.fractions, kept)
        split_of_cell = split_of_unit[found.unit_of_cell]
    return _NAMES[split_of_cell], _record(kind, split_of_cell, split_of_unit, fallback)


def given(
    column: pl.Series, *, name: str, donor: Units | None = None, batch: Units | None = None
) -> tuple[Labels, SplitRecord]:
    """The splits that an obs column called `name` gives [n_cells], and their record.

    Donors have to be whole. Batches need not be: a feature that tells batches apart can be chosen in one split and
    reported in another only where both hold these batches; the record's `fallback` says so. InputError for a value that
    is no split, for a split without cells, and for a donor in two splits.
    """
    values = column.cast(pl.String)
    if differ := sorted({str(value) for value in values.unique()} ^ set(SPLITS)):
        raise InputError(
            f"--split was {name!r}, whose values are not the three of {', '.join(SPLITS)} (different: "
            f"{', '.join(differ[:5])}); each cell has one of them and each has cells: name another column, or leave "
            "--split out"
        )
    labels = labels_of(values)
    kind, units, fallback = ("donor", donor, None) if donor is not None else ("batch", batch, None)
    try:
        if units is not None:
            check_whole_units(labels, units)
    except InputError as torn:
        if kind == "donor":
            raise
        units, fallback = None, f"{torn.args[0].partition(';')[0]}: figures are of held-out cells of the same batches"
    split_of_cell = split_of_unit = np.array([SPLITS.index(label) for label in labels])
    if units is not None:
        first = np.unique(_factorize(units, len(labels)).unit_of_cell, return_index=True)[1]
        split_of_unit = split_of_cell[first]
    return labels, _record("cell" if units is None else kind, split_of_cell, split_of_unit, fallback)


def _record(
    kind: str, split_of_cell: npt.NDArray[np.intp], split_of_unit: npt.NDArray[np.intp], fallback: str | None
) -> SplitRecord:
    cells, units = (
        dict(zip(SPLITS, np.bincount(split, minlength=len(SPLITS)).tolist(), strict=True))
        for split in (split_of_cell, split_of_unit)
    )
    return SplitRecord(unit=kind, n_units=len(split_of_unit), cells=cells, units=units, fallback=fallback)


def assign(
    units: Units | None,
    n_cells: int,
    *,
    seed: int = 0,
    fractions: tuple[float, float, float] = SplitConfig.fractions,
) -> Labels:
    """The split of each cell, "train", "select" or "test" [n_cells]; by whole units, or by cell where `units` is None.

    A function of (seed, unit names and sizes): the order of the cells does not matter. Cells without a unit (None) form
    one unit together. InputError for fewer than 3 units or cells, or `units` of another length.
    """
    SplitConfig(seed=seed, fractions=fractions)
    if units is None:
        return _NAMES[_assign_cells(n_cells, seed, fractions)]
    found = _factorize(units, n_cells)
    if len(found.names) < MIN_UNITS:
        raise InputError(
            f"{MIN_UNITS} splits need at least {MIN_UNITS} units; got {found.names}; split by cell instead"
        )
    labels: Labels = _NAMES[_deal(found, seed, fractions)[found.unit_of_cell]]
    return labels


def check_whole_units(labels: Labels, units: Units) -> None:
    """Raise InputError naming the first unit whose cells lie in more than one split."""
    names, unit_of_cell = _factorize(units, len(labels))
    present = np.stack([np.bincount(unit_of_cell[labels == split], minlength=len(names)) > 0 for split in SPLITS])
    torn = np.flatnonzero(present.sum(axis=0) > 1)
    if len(torn):
        where = [split for split, has in zip(SPLITS, present[:, torn[0]], strict=True) if has]
        raise InputError(
            f"unit {names[torn[0]]!r} has cells in {' and '.join(where)} ({len(torn)} such units); "
            "a unit belongs to one split whole: make the cell table again with `scsae extract`"
        )


def labels_of(column: pl.Series) -> Labels:
    """A column of the names of splits as such an array: all cells of a split share one string."""
    numbers = column.replace_strict(list(SPLITS), list(range(len(SPLITS))), return_dtype=pl.UInt8)
    labels: Labels = _NAMES[numbers.to_numpy()]
    return labels


_NAMES: Labels = np.array(SPLITS, dtype=object)
_MISSING = "\0missing"


class _Factor(NamedTuple):
    """Units by number: their names, sorted, and the unit of each cell [n_cells]."""

    names: list[str]
    unit_of_cell: npt.NDArray[np.integer]


def _factorize(units: Units, n_cells: int) -> _Factor:
    if len(units) != n_cells:
        raise InputError(f"units has {len(units)} entries for {n_cells} cells")
    if not isinstance(units, pl.Series):
        units = pl.Series([None if unit is None else str(unit) for unit in units], dtype=pl.String)
    filled = units.cast(pl.String).fill_null(_MISSING)
    names = filled.unique().sort()
    return _Factor(names.to_list(), filled.cast(pl.Enum(names)).to_physical().to_numpy())


def _assign_cells(n_cells: int, seed: int, fractions: Sequence[float]) -> npt.NDArray[np.intp]:
    """Split of each cell, by its number."""
    if n_cells < MIN_UNITS:
        raise InputError(f"{MIN_UNITS} splits need at least {MIN_UNITS} cells; got {n_cells}")
    bounds = np.round(np.cumsum(fractions) * n_cells).astype(int)
    # every split gets a cell however few there are
    bounds = np.clip(bounds, np.arange(1, 4), n_cells - np.arange(2, -1, -1))
    ranks = np.random.default_rng(seed).permutation(n_cells)
    return np.searchsorted(bounds, ranks, side="right")


def _deal(
    units: _Factor, seed: int, fractions: Sequence[float], kept: Mapping[str, str] | None = None
) -> npt.NDArray[np.intp]:
    """Split of each unit, by its number: largest first, each to the split lacking the most cells, none left empty.

    Units that are `kept` have theirs before the dealing starts.
    """
    kept = kept or {}
    sizes = np.bincount(units.unit_of_cell, minlength=len(units.names))
    lacking = np.array(fractions) * sizes.sum()
    n_units = np.zeros(len(SPLITS), dtype=int)
    split_of = np.zeros(len(sizes), dtype=np.intp)
    for unit, name in enumerate(units.names):
        if name in kept:
            split_of[unit] = SPLITS.index(kept[name])
            lacking[split_of[unit]] -= sizes[unit]
            n_units[split_of[unit]] += 1
    if n_units[0]:
        # the SAE is trained already: what it has not seen is worth more held out
        lacking[0] = -np.inf
    new = [unit for unit, name in enumerate(units.names) if name not in kept]
    order = sorted(new, key=lambda unit: (-int(sizes[unit]).bit_length(), _hash(seed, units.names[unit])))
    for position, unit in enumerate(order):
        empty = n_units == 0
        must_fill = len(order) - position <= empty.sum()
        split = int(np.argmax(np.where(empty, lacking, -np.inf) if must_fill else lacking))
        split_of[unit] = split
        lacking[split] -= sizes[unit]
        n_units[split] += 1
    return split_of


def _hash(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()
