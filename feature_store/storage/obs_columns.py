"""The names of obs columns in the table `cells`.

A column of obs keeps its name, so that `SELECT condition FROM cells` works. The name gets the prefix `obs_` where a
table that joins with the cells, directly or by way of another, has a column of that name (`gene`, `value`, `donor`
without --donor), because a join would take the two for one; where it begins with `obs_` already, so that no two names
become one; and where Polars would read it as a pattern (`*`, `^...$`) or it is empty. Options take the name that the
data have, and pages show it.
"""

from collections.abc import Collection
from typing import TypeVar

import polars as pl

from feature_store.storage.schemas import OTHER_COLUMNS, TABLES

PREFIX = "obs_"
OWN = frozenset(TABLES["cells"].columns)
"""The columns of the table `cells` that are no obs columns."""
KEYS = frozenset(("cell_idx", "feature_id", "gene_id", "gene_idx"))
"""Columns by which tables of cells, features and genes join; `steering` and `steering_variants` have none of them."""
TAKEN = OTHER_COLUMNS.union(*(table.columns for table in TABLES.values() if KEYS & table.columns.keys()))
"""The names of all columns of the tables that join with the cells."""
Frame = TypeVar("Frame", pl.DataFrame, pl.LazyFrame)


def column_of(name: str) -> str:
    """The column of the table `cells` that holds an obs column."""
    is_pattern = name in ("", "*") or (name.startswith("^") and name.endswith("$"))
    return f"{PREFIX}{name}" if name in TAKEN or is_pattern or name.startswith(PREFIX) else name


def shown_name(column: str) -> str:
    """The name to show for a column of the table `cells`: the name that the data have.

    The prefix stays where the table has an own column of that name: `obs_donor` is not its `donor`.
    """
    name = column.removeprefix(PREFIX)
    return column if name in OWN else name


def find_column(name: str, known: Collection[str]) -> str | None:
    """The one of the known columns that a name given by a user means, or None.

    The name is that of the data, or else that of the column. Of what is found nothing is looked up again.
    """
    wanted = (name, column_of(name)) if name in OWN else (column_of(name), name)
    return next((column for column in wanted if column in known), None)


def columns_of_cells(cells: pl.DataFrame | pl.LazyFrame) -> list[str]:
    """The columns of a table `cells` that names are looked up in.

    An own column without a value (`donor` without --donor) is left out where the data have a column of that name.
    """
    columns = cells.collect_schema().names()
    doubled = [name for name in columns if name in OWN and f"{PREFIX}{name}" in columns]
    if not doubled:
        return columns
    known = cells.lazy().select(pl.col(doubled).is_not_null().any()).collect().row(0, named=True)
    return [name for name in columns if known.get(name, True)]
