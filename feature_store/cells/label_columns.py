"""What an obs column is as a label: groups of cells, a number of each cell, or names of single cells.

Features are tested against each group of a label. A measurement (the share of mitochondrial counts, the number of
genes) is no group: each value would be a label of one cell. Columns of numbers with many different values are therefore
measured as numbers (`feature_store.associations.number_statistics`), and columns of text in which most cells have a
value of their own are refused.
"""

from enum import StrEnum

import polars as pl

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
    n = known.n_unique()
    is_own = n * CELLS_OF_A_GROUP > known.len()
    if column.dtype.is_numeric():
        many = n > MOST_GROUPS or (is_own and n > LEAST_NUMBERS)
        return LabelKind.NUMBERS if many else LabelKind.GROUPS
    return LabelKind.NAMES if is_own and n > LEAST_NAMES else LabelKind.GROUPS


def refuse_names(option: str, column: pl.Series) -> None:
    """Raise InputError for a column whose values name single cells; `option` is the one that gave it."""
    if label_kind(column) is LabelKind.NAMES:
        known = column.drop_nulls()
        example = ", ".join(str(value) for value in known.head(3))
        raise InputError(
            f"{option} was {column.name!r}, which has {known.n_unique()} different values in {known.len()} cells "
            f"({example}, ...): they name cells, not groups of cells. Give a column of groups, or store numbers as "
            "numbers: --label takes these too"
        )
