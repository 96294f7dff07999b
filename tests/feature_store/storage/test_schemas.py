from __future__ import annotations

import polars as pl
import pytest

from feature_store.errors import InputError
from feature_store.storage import schemas
from feature_store.storage.layout import ASSOCIATION_TABLES


@pytest.mark.parametrize("table", list(schemas.TABLES))
def test_a_table_without_one_of_its_columns_or_with_another_dtype_is_refused(table: str) -> None:
    frame = schemas.empty(table)
    for name in schemas.TABLES[table].columns:
        with pytest.raises(InputError, match=f"'{name}'"):
            schemas.check(table, frame.drop(name))
        with pytest.raises(InputError, match=f"'{name}' is Binary"):
            schemas.check(table, frame.with_columns(pl.Series(name, [], dtype=pl.Binary)))


def test_every_association_table_of_the_layout_has_a_schema() -> None:
    assert set(ASSOCIATION_TABLES) <= set(schemas.TABLES)


def test_check_names_every_problem_at_once() -> None:
    frame = schemas.empty("feature_gene").drop("q").with_columns(pl.col("feature_id").cast(pl.Int64))
    frame = pl.concat([frame, pl.DataFrame({"gene": [None]}, schema={"gene": pl.String})], how="diagonal")
    with pytest.raises(
        InputError, match=r"feature_id.* is Int64 instead of Int32; .*'gene' has 1 nulls; no column 'q'"
    ):
        schemas.check("feature_gene", frame)


def test_conform_casts_orders_and_keeps_further_columns_behind() -> None:
    numbers = {"q_matched": [1], "p_matched": [0], "q": [1], "p": [0], "overlap": [3], "odds_ratio": [2]}
    frame = pl.DataFrame({"method": ["x"], **numbers}).with_columns(
        feature_id=pl.lit(7), gene_set=pl.lit("s"), collection=pl.lit("c")
    )
    result = schemas.conform("feature_geneset", frame)
    assert result.columns == [*schemas.TABLES["feature_geneset"].columns, "method"]
    assert result.schema["feature_id"] == pl.Int32


def test_conform_refuses_a_value_that_the_dtype_cannot_hold() -> None:
    frame = schemas.empty("token_gene").with_columns(pl.col("gene_id").cast(pl.Int64))
    frame = pl.concat(
        [frame, pl.DataFrame({"split": [2], "gene_id": [2**40], "n_tokens": [1]}, schema_overrides={"split": pl.UInt8})]
    )
    with pytest.raises(InputError, match="token_gene"):
        schemas.conform("token_gene", frame)


def test_an_unknown_table_is_refused_with_the_tables() -> None:
    with pytest.raises(InputError, match="feature_label"):
        schemas.empty("feature_labels")
