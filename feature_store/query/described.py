"""The tables of a store in words, as tables themselves: which there are, and what each column holds."""

from collections.abc import Iterable, Mapping

import polars as pl

from feature_store.errors import QueryError
from feature_store.query.metrics import CURVES
from feature_store.query.suggestions import did_you_mean
from feature_store.query.tables import MADE_BY
from feature_store.storage import schemas
from feature_store.storage.descriptions import DESCRIPTIONS, Column, TableDescription

TRAINING = TableDescription(
    row="one step of the training at which figures were logged",
    measured_on="tokens of train cells",
    columns={
        "step": Column("the step of the training", "steps"),
        **{metric.name: Column(metric.description, metric.unit) for metric in CURVES},
    },
)
"""The table `training`, whose columns are the metrics that a training logs."""
OF_OBS = Column("a column of obs of the data")
SQL_TABLES = tuple(MADE_BY)
"""The tables that SQL can ask for, in the order in which stages make them."""


def described_tables(names: Iterable[str] = SQL_TABLES) -> pl.DataFrame:
    """What tables hold: a row a table with `table`, `row`, `measured_on` and `made_by`, the command that makes it."""
    rows = [(name, found.row, found.measured_on, MADE_BY[name]) for name in names for found in [description_of(name)]]
    return pl.DataFrame(rows, schema=dict.fromkeys(("table", "row", "measured_on", "made_by"), pl.String), orient="row")


def described_columns(table: str, columns: Mapping[str, pl.DataType] | None = None) -> pl.DataFrame:
    """What the columns of a table hold: a row a column with `column`, `type`, `unit` and `meaning`.

    columns: those that the table has in a store; default: those that its schema and its description name. Raises
    QueryError for an unknown table, with the nearest name.
    """
    about = description_of(table)
    if columns is None:
        listed = schemas.TABLES[table].columns if table in schemas.TABLES else {}
        columns = {**listed, **{name: _NOT_LISTED for name in about.columns if name not in listed}}
    rows = [
        (name, "" if dtype == _NOT_LISTED else str(dtype), found.unit, found.text)
        for name, dtype in columns.items()
        for found in [about.column(name) or (OF_OBS if table == "cells" else Column(""))]
    ]
    return pl.DataFrame(rows, schema=dict.fromkeys(("column", "type", "unit", "meaning"), pl.String), orient="row")


def description_of(table: str) -> TableDescription:
    """What a table that SQL can ask for holds. QueryError for an unknown table, with the nearest name."""
    if table not in MADE_BY:
        raise QueryError(
            f"no table {table!r}{did_you_mean(table, SQL_TABLES)}; tables are {', '.join(SQL_TABLES)}; "
            "`scsae describe` says what each holds"
        )
    return TRAINING if table == "training" else DESCRIPTIONS[table]


_NOT_LISTED = pl.Null()
"""The type of a column that the description names and the schema does not."""
