"""Which cells train the SAE, which choose thresholds and features, and which are reported: three splits of whole units.

Cells of one donor resemble each other, so all cells of a unit (a donor; without donors a batch; without batches a cell)
go to one split, and nothing is selected and reported on the same cells. Units are assigned largest first, each to the
split that lacks the most cells; units within a factor of two in size are ordered by a hash of (seed, name), so the seed
decides without spoiling the balance. This costs microseconds per unit, and 20 bytes a cell in memory.

A second data set that a trained SAE encodes may hold donors that it was trained on: a unit whose split is `known`
keeps it, or a donor of `train` in one file would be reported as held out in the other (1015 of the two Kang files, with
seed 0).

Method: grouped hold-out; why whole donors: Squair et al. 2021, doi:10.1038/s41467-021-25960-2.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.cells.canonical import canonical_text
from feature_store.errors import InputError
from feature_store.storage.schemas import SPLITS

MIN_UNITS = len(SPLITS)
SplitLabels = npt.NDArray[np.object_]
"""The name of the split of each cell; cells of one split share one string, so a million cells take 8 MB."""
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
    """How cells were split: the kind of unit, units and cells per split, and why this kind is not the one requested."""

    unit: str
    n_units: int
    cells: Mapping[str, int] = field(default_factory=dict)
    units: Mapping[str, int] = field(default_factory=dict)
    fallback: str | None = None


def make_splits(
    n_cells: int,
    *,
    donor: Units | None = None,
    batch: Units | None = None,
    known: Mapping[str, str] | None = None,
    config: SplitConfig | None = None,
) -> tuple[SplitLabels, SplitRecord]:
    """Split by donor, else by batch, else by cell; by cell where there are fewer than 3 units, and the record's
    `fallback` says so.

    `known`: the splits that units, by name, have in the data of a trained SAE. These units keep them, however few they
    are; if any of them is in train, new units go to select and test only.

    Returns the split of each cell [n_cells] and the record. InputError for fewer than 3 cells or units of another
    length.
    """
    config = config or SplitConfig()
    kind, units = ("donor", donor) if donor is not None else ("batch", batch) if batch is not None else ("cell", None)
    factor = None if units is None else _factorize(units, n_cells)
    fallback = None
    kept = {} if factor is None or known is None else {name: known[name] for name in factor.names if name in known}
    if factor is not None and not kept and (n_units := len(factor.names)) < MIN_UNITS:
        fallback = (
            f"{n_units} {kind}{'' if n_units == 1 else 's'} cannot fill {MIN_UNITS} splits: split by cell, so cells of "
            f"one {kind} are on both sides and held-out figures are optimistic"
        )
        kind, factor = "cell", None
    if factor is None:
        split_of_unit = split_of_cell = _assign_cells(n_cells, config.seed, config.fractions)
    else:
        split_of_unit = _assign_units(factor, config.seed, config.fractions, kept)
        split_of_cell = split_of_unit[factor.unit_of_cell]
    return _NAMES[split_of_cell], _record(kind, split_of_cell, split_of_unit, fallback)


def splits_from_column(
    column: pl.Series, *, name: str, donor: Units | None = None, batch: Units | None = None
) -> tuple[SplitLabels, SplitRecord]:
    """The splits [n_cells] in an obs column called `name`, and their record.

    All cells of a donor have to be in one split. Those of a batch need not be: a feature that tells batches apart can
    be chosen in one split and reported in another only if both hold these batches; the record's `fallback` says so.
    InputError for a value that is not a split, for a split without cells, and for a donor in two splits.
    """
    values = canonical_text(column)
    if differ := sorted({str(value) for value in values.unique()} ^ set(SPLITS)):
        raise InputError(
            f"--split was {name!r}, whose values differ from {', '.join(SPLITS)} in {', '.join(differ[:5])}; each cell "
            "needs one of the three, and each of the three needs cells: name another column, or leave --split out"
        )
    labels = split_labels(values)
    kind, units, fallback = ("donor", donor, None) if donor is not None else ("batch", batch, None)
    try:
        if units is not None:
            check_whole_units(labels, units)
    except InputError as error:
        if kind == "donor":
            raise
        units, fallback = None, f"{error.args[0].partition(';')[0]}: figures are of held-out cells of the same batches"
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


def check_whole_units(labels: SplitLabels, units: Units) -> None:
    """Raise InputError naming the first unit whose cells lie in more than one split."""
    names, unit_of_cell = _factorize(units, len(labels))
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


class _Factor(NamedTuple):
    """Units by number: their names, sorted, and the unit of each cell [n_cells]."""

    names: list[str]
    unit_of_cell: npt.NDArray[np.integer]


def _factorize(units: Units, n_cells: int) -> _Factor:
    if len(units) != n_cells:
        raise InputError(f"units has {len(units)} entries for {n_cells} cells")
    filled = canonical_text(units).fill_null(_MISSING)
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


def _assign_units(
    units: _Factor, seed: int, fractions: Sequence[float], kept: Mapping[str, str] | None = None
) -> npt.NDArray[np.intp]:
    """Split of each unit, by its number: largest first, each to the split that lacks the most cells; none stays empty.

    Units that are `kept` have their split before the others are assigned.
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
        # the SAE is trained already: units that it has not seen are worth more held out
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
