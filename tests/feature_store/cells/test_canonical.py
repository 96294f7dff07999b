"""One value has one canonical text, whatever type it comes in."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest

from feature_store.cells import canonical_column, canonical_name, canonical_text


@pytest.mark.parametrize(
    ("text", "values"),
    [
        (
            "1015",
            [1015, 1015.0, "1015", "1015.0", "1015.00", np.int16(1015), np.float32(1015), np.float64(1015), b"1015"],
        ),
        ("True", [True, "True", "true", "TRUE", np.True_]),
        ("False", [False, "False", "false", "FALSE", np.False_]),
        ("0.1", [0.1, np.float32(0.1), "0.1"]),
        ("1e-05", [1e-5, np.float32(1e-5), "1e-05"]),
        ("0", [0, 0.0, -0.0, "0.0", "-0.0", np.float32(0)]),
        ("-2.5", [-2.5, "-2.5", np.float32(-2.5)]),
        ("007", ["007"]),
        ("1.10", ["1.10"]),
        ("B-01.0-0", ["B-01.0-0"]),
        ("CD14+ Mono", ["CD14+ Mono", np.str_("CD14+ Mono")]),
        ("1000000000000000000", [1e18, 10**18, "1000000000000000000"]),
        (None, [None, float("nan"), np.float32("nan"), "", "nan", "NaN", "<NA>", pd.NA, pd.NaT]),
        ("2020-01-02", [datetime.date(2020, 1, 2)]),
    ],
)
def test_a_value_has_one_text_in_every_type(text: str | None, values: list[Any]) -> None:
    assert [canonical_name(value) for value in values] == [text] * len(values)
    assert canonical_text(values).to_list() == [text] * len(values)
    assert canonical_name(text) == text


@pytest.mark.parametrize("dtype", [pl.Int8, pl.UInt64, pl.Float32, pl.Float64, pl.String, pl.Categorical])
def test_a_column_has_the_same_texts_in_every_type(dtype: type[pl.DataType]) -> None:
    numbers = pl.Series("donor", [3, None, 0, 101])
    column = (
        numbers.cast(pl.Float64).cast(pl.String).cast(dtype)
        if dtype in (pl.String, pl.Categorical)
        else numbers.cast(dtype)
    )
    found = canonical_text(column)
    assert (found.name, found.dtype) == ("donor", pl.String)
    assert found.to_list() == ["3", None, "0", "101"]
    assert pl.DataFrame({"x": column}).lazy().select(canonical_column("x")).collect()["x"].to_list() == found.to_list()


def test_arrays_and_empty_columns_have_texts_too() -> None:
    assert canonical_text(np.array([0.1, np.nan, 2], dtype=np.float32)).to_list() == ["0.1", None, "2"]
    assert canonical_text(np.array(["a", None, 1.0, True], dtype=object)).to_list() == ["a", None, "1", "True"]
    assert canonical_text(pl.Series("x", [None, None])).to_list() == [None, None]
    assert canonical_text([]).to_list() == []


def test_fractions_are_written_as_python_writes_them(rng: np.random.Generator) -> None:
    numbers = rng.standard_normal(300) * 10.0 ** rng.integers(-20, 20, 300)
    for array in (numbers, numbers.astype(np.float32)):
        wanted = [str(int(x)) if float(x).is_integer() and abs(x) < 2**63 else repr(float(str(x))) for x in array]
        assert canonical_text(array).to_list() == wanted
        assert canonical_text(wanted).to_list() == wanted
