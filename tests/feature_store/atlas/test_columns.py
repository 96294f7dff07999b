"""Columns for a browser: what is written comes back, in Python and in the browser's own reader."""

from __future__ import annotations

import base64
import math
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from feature_store.atlas.columns import encode

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Page

FRAME = pl.DataFrame(
    {
        "id": [0, 1, -5, None],
        "large": [1, 2**40, None, 3],
        "effect": [0.1, None, -2.5e-300, 1 / 3],
        "place": pl.Series([0.1, 2.0, None, 4.0], dtype=pl.Float32),
        "dead": [True, False, None, True],
        "label": pl.Series(["B", None, "ß <b>", "B"], dtype=pl.Categorical),
        "genes": ["CD79A MS4A1", "", "α 🧬", "x"],
    }
)


def test_a_frame_comes_back_as_it_was(decode: Callable[[bytes], pl.DataFrame]) -> None:
    found = decode(encode(FRAME))
    wanted = FRAME.with_columns(
        pl.col("label").cast(pl.String), pl.col("large").cast(pl.Float64), pl.col("id").cast(pl.Int32)
    )
    floats = pl.col(pl.Float32, pl.Float64).fill_nan(None)
    assert_frame_equal(found.with_columns(floats), wanted, check_exact=True)


@pytest.mark.parametrize("n", [0, 1, 3, 8])
def test_columns_begin_where_typed_arrays_may(n: int, decode: Callable[[bytes], pl.DataFrame]) -> None:
    data = encode(FRAME.head(1).select(pl.all().repeat_by(n).explode()) if n else FRAME.clear())
    size = int.from_bytes(data[:4], "little")
    assert (4 + size) % 8 == 0
    assert decode(data).height == n


def test_what_has_no_kind_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"'list'.*List"):
        encode(pl.DataFrame({"list": [[1]]}))


def test_the_browser_reads_the_same_values(open_page: Callable[..., Page]) -> None:
    page = open_page("")
    text = base64.b64encode(encode(FRAME)).decode()
    found = page.evaluate(
        """async (text) => {
            const { Columns } = await import('/static/js/data.js');
            const table = new Columns(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
            return table.names.map((name) => Array.from({ length: table.n }, (_, i) => table.get(name).at(i)));
        }""",
        text,
    )
    for name, values in zip(FRAME.columns, found, strict=True):
        wanted = FRAME[name].cast(pl.String).to_list() if name == "label" else FRAME[name].to_list()
        for a, b in zip(values, wanted, strict=True):
            assert a == b or (b == "" and a is None) or math.isclose(a, b, rel_tol=0), name


def test_the_browser_sorts_numbers_as_numpy_does(open_page: Callable[..., Page]) -> None:
    page = open_page("")
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(size=3000), rng.integers(-3, 3, 500), 1 + 1e-12 * rng.normal(size=200), [0.0]])
    values[rng.random(values.size) < 0.1] = np.nan
    found = page.evaluate(
        """async (values) => {
            const { ascending } = await import('/static/js/features.js');
            const { rows, known } = ascending(Float64Array.from(values, (x) => x ?? NaN));
            return [Array.from(rows), known];
        }""",
        [None if np.isnan(x) else float(x) for x in values],
    )
    assert found == [np.argsort(values, kind="stable").tolist(), int(np.isfinite(values).sum())]
