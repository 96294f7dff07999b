"""The one text of an id or a label: donors, batches, cell types and labels are compared and shown as this text.

Files store the same donor as the integer 1015, the float 1015.0 (pandas makes it one where another donor is missing),
a category or text. The canonical text depends on the value alone, so that all of these are one donor:

    a number       as Python writes it, whole numbers without a point: 1015.0 is "1015", a float32 of 0.1 is "0.1"
    a truth value  "True" or "False"; the texts true and false in any case are truth values
    text           itself; the text of a whole number with a point loses the point and the zeros ("1015.0" is "1015"),
                   and numbers with leading zeros ("007") or other decimals ("1.10") stay as they are
    missing        null: NaN, empty text, and what pandas writes for a missing value ("nan", "NaN", "NaT", "<NA>")

The canonical text of a canonical text is that text. A million texts or numbers take .1 s.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

MISSING_TEXTS = ("", "nan", "NaN", "NaT", "<NA>")
_WHOLE = r"^(-?(?:0|[1-9][0-9]*))\.0+$"
_MAY_CHANGE = r"(?i)^(?:|true|false|nan|nat|<na>|-0|.*\.0+)$"
_INT64 = 2.0**63


def canonical_text(values: pl.Series | npt.NDArray[Any] | Iterable[Any]) -> pl.Series:
    """The canonical text of each value, in a series of the same name; null where a value is missing."""
    column = values if isinstance(values, pl.Series) else _series(values)
    kind = column.dtype
    if kind.is_float():
        return _of_floats(column)
    if kind == pl.Boolean:
        return column.to_frame("x").select(_truth(pl.col("x")).alias(column.name)).to_series()
    if kind.is_integer():
        return column.cast(pl.String)
    if kind.is_nested() or kind in (pl.Object, pl.Binary, pl.Duration):
        column = pl.Series(column.name, [_python_text(value) for value in column], dtype=pl.String)
    return _of_texts(column.cast(pl.String))


def canonical_name(value: Any) -> str | None:
    """The canonical text of one value, such as a label that a user gives; None if it is missing."""
    name: str | None = canonical_text([value])[0]
    return name


def canonical_column(column: str | pl.Expr) -> pl.Expr:
    """The canonical text of a column, as an expression."""
    expression = pl.col(column) if isinstance(column, str) else column
    return expression.map_batches(canonical_text, return_dtype=pl.String)


def _series(values: Iterable[Any]) -> pl.Series:
    """Python values as a series of their type, or of their texts where types differ."""
    if isinstance(values, np.ndarray) and values.dtype.kind in "biuf":
        return pl.Series(values)
    items = list(values)
    kinds = {type(value) for value in items if value is not None}
    if len(kinds) == 1 and issubclass(kinds.pop(), str | bool | int | float | np.number | np.bool_):
        return pl.Series(items)
    return pl.Series([_python_text(value) for value in items], dtype=pl.String)


def _python_text(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, float | np.floating):
        return canonical_text(pl.Series([value]))[0] or ""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _truth(column: pl.Expr) -> pl.Expr:
    return pl.when(column).then(pl.lit("True")).when(~column).then(pl.lit("False"))


def _of_floats(column: pl.Series) -> pl.Series:
    number = pl.col("x")
    size = number.abs()
    is_whole = (number == number.round()) & (size < _INT64)
    # Polars and Python write other fractions alike; the text of a float32 is the shortest that names it
    is_extreme = ~is_whole & ((size < 1e-4) | (size >= 1e15))
    frame = column.fill_nan(None).to_frame("x")
    frame = frame.with_columns(
        text=pl.when(is_whole)
        .then(number.cast(pl.Int64, strict=False).cast(pl.String))
        .otherwise(number.cast(pl.String)),
        is_extreme=is_extreme.fill_null(False),
    )
    places = frame["is_extreme"].arg_true()
    text = frame["text"]
    if len(places):
        text = text.scatter(places, [repr(float(str(value))) for value in frame["x"].gather(places).to_numpy()])
    return text.rename(column.name)


def _of_texts(column: pl.Series) -> pl.Series:
    # nearly all columns are canonical: no copy is made
    if not column.str.contains(_MAY_CHANGE).any():
        return column
    text = pl.col("x")
    lower = text.str.to_lowercase()
    shown = (
        pl.when(text.is_in(MISSING_TEXTS))
        .then(None)
        .when(lower == "true")
        .then(pl.lit("True"))
        .when(lower == "false")
        .then(pl.lit("False"))
        .otherwise(text.str.replace(_WHOLE, "$1").replace("-0", "0"))
    )
    return column.to_frame("x").select(shown.alias(column.name)).to_series()
