"""Every table and every column is described, with its unit where it has one."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from feature_store import FeatureStore
from feature_store.errors import QueryError
from feature_store.query.described import SQL_TABLES, described_columns, described_tables
from feature_store.storage.descriptions import DESCRIPTIONS, SHARED
from feature_store.storage.schemas import OTHER_COLUMNS, TABLES

OF_QUERIES = {"top_label_q", "px", "py"}
"""Columns of answers and pages, which are in no table."""


def test_every_table_and_every_column_of_the_schemas_is_described():
    assert list(DESCRIPTIONS) == list(TABLES)
    lacking = {table: [c for c in TABLES[table].columns if not DESCRIPTIONS[table].column(c)] for table in TABLES}
    assert {table: columns for table, columns in lacking.items() if columns} == {}


def test_nothing_is_described_that_no_table_has():
    known = {name for table in TABLES.values() for name in table.columns} | OTHER_COLUMNS
    assert set(SHARED) <= known
    for table, about in DESCRIPTIONS.items():
        assert set(about.columns) <= {*TABLES[table].columns, *OTHER_COLUMNS}, table


def test_every_column_that_stages_add_is_described():
    described = {*SHARED, *(name for about in DESCRIPTIONS.values() for name in about.columns)}
    beside = {name for name in OTHER_COLUMNS if name.startswith("select_")}
    assert OTHER_COLUMNS - described - beside == OF_QUERIES


def test_every_text_is_a_phrase_without_a_full_stop_at_its_end():
    texts = [column.text for about in DESCRIPTIONS.values() for column in about.columns.values()]
    texts += [column.text for column in SHARED.values()]
    texts += [text for about in DESCRIPTIONS.values() for text in (about.row, about.measured_on)]
    assert [text for text in texts if not text or text != text.strip() or text.endswith(".")] == []


def test_a_list_of_all_tables_says_what_makes_each():
    found = described_tables()
    assert found["table"].to_list() == list(SQL_TABLES)
    assert found.filter(table="feature_label").row(0) == (
        "feature_label",
        "one feature, label and split",
        "cells of the panel of the split; of a batch inside cell types",
        "scsae associate",
    )


def test_the_columns_of_a_store_are_described_with_those_of_obs(small_store: Any):
    store = FeatureStore.open(small_store.layout.root)
    cells = store.describe("cells")
    assert cells["column"].to_list() == store.frame("cells").collect_schema().names()
    assert cells.filter(column="n_counts").row(0) == ("n_counts", "Float64", "", "a column of obs of the data")
    assert store.describe()["table"].to_list() == store.tables()
    with pytest.raises(QueryError, match="scsae serve"):
        store.describe("umap")


@pytest.mark.parametrize("table", SQL_TABLES)
def test_the_columns_of_a_table_are_described_without_a_store(table: str):
    found = described_columns(table)
    assert found.height
    assert found.filter(pl.col("meaning") == "").is_empty()


def test_an_unknown_table_is_answered_with_the_nearest():
    with pytest.raises(QueryError, match=r"'feature_labels'.*'feature_label'.*scsae describe"):
        described_columns("feature_labels")
