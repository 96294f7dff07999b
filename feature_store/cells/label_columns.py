"""What an obs column is as a label: groups of cells, a number of each cell, or names of single cells.

Features are tested against each group of a label. A measurement (the share of mitochondrial counts, the number of
genes) is no group: each value would be a label of one cell. Columns of numbers with many different values are therefore
measured as numbers (`feature_store.associations.number_statistics`), and columns of text in which most cells have a
value of their own are refused.
"""

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

import polars as pl

from feature_store.cells.factors import Factor, FactorBuilder
from feature_store.cells.source import OBS_CELLS, Source
from feature_store.errors import InputError

MOST_GROUPS = 50
"""A column of numbers with more different values than this is measured as numbers."""
LEAST_NAMES = 20
"""A column with at most this many different values is never refused as names of cells."""
LEAST_NUMBERS = 12
"""A column of numbers with at most this many different values is never measured as numbers."""
CELLS_OF_A_GROUP = 2
"""Least mean number of cells of a group."""


class LabelKind(StrEnum):
    """How a label column is measured."""

    GROUPS = "groups"
    NUMBERS = "numbers"
    NAMES = "names of cells"


def label_kind(column: pl.Series) -> LabelKind:
    """How a label column is measured; null and NaN are unknown, and truth values are groups."""
    known = column.drop_nulls()
    if column.dtype.is_float():
        known = known.drop_nans()
    return kind_of(known.n_unique(), known.len(), numeric=column.dtype.is_numeric())


def kind_of(n_values: int, n_known: int, *, numeric: bool) -> LabelKind:
    """How a label column with `n_values` different values in `n_known` cells is measured."""
    is_own = n_values * CELLS_OF_A_GROUP > n_known
    if numeric:
        many = n_values > MOST_GROUPS or (is_own and n_values > LEAST_NUMBERS)
        return LabelKind.NUMBERS if many else LabelKind.GROUPS
    return LabelKind.NAMES if is_own and n_values > LEAST_NAMES else LabelKind.GROUPS


@dataclass(frozen=True, kw_only=True)
class Groups:
    """An obs column as groups of cells.

    Attributes:
        numeric: whether it is a column of numbers.
        factor: the group of each cell; None for numbers that are no groups.
        n_values, n_known: different values, and cells with a value; of numbers that are no groups, of the cells read.
        examples: some first values.
    """

    numeric: bool
    factor: Factor | None
    n_values: int
    n_known: int
    examples: tuple[str, ...]

    @property
    def kind(self) -> LabelKind:
        """How the column is measured if it is a label."""
        return kind_of(self.n_values, self.n_known, numeric=self.numeric)

    def refuse_names(self, option: str, name: str, *, as_text: bool) -> None:
        """Raise InputError if the values name single cells; `option` is the one that gave the column.

        Numbers do so only where they are ids, `as_text`.
        """
        if kind_of(self.n_values, self.n_known, numeric=self.numeric and not as_text) is LabelKind.NAMES:
            raise InputError(
                f"{option} was {name!r}, which has {self.n_values} different values in {self.n_known} cells "
                f"({', '.join(self.examples)}, ...): they name cells, not groups of cells. Give a column of groups, or "
                "store numbers as numbers: --label takes these too"
            )


def read_groups(source: Source, columns: Collection[str], *, groups: Collection[str]) -> dict[str, Groups]:
    """Read obs columns in ranges of cells, once; those in `groups` are groups whatever they hold."""
    names = list(dict.fromkeys(columns))
    numeric = {name: source.obs_schema[name].is_numeric() for name in names}
    builders = {name: FactorBuilder(source.n_cells) for name in names}
    stopped = set()
    for start in range(0, source.n_cells, OBS_CELLS):
        left = [name for name in names if name not in stopped]
        frame = source.obs(start, min(start + OBS_CELLS, source.n_cells), left) if left else pl.DataFrame()
        for name in left:
            builders[name].add(start, frame[name])
            if numeric[name] and name not in groups and builders[name].n_values > MOST_GROUPS:
                stopped.add(name)
    return {
        name: Groups(
            numeric=numeric[name],
            factor=None if name in stopped else builders[name].factor(),
            n_values=builders[name].n_values,
            n_known=builders[name].n_known,
            examples=builders[name].examples,
        )
        for name in names
    }
