"""The SQL of a store reads its tables, however a query is spelt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl
import pytest

from feature_store import FeatureStore
from feature_store.errors import QueryError
from feature_store.query.statements import check_statement

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "hunter2"
READERS = sorted(name for name in dir(pl) if name.startswith(("read_", "scan_")))
SPELLINGS = (
    "SELECT * FROM read_csv('{file}')",
    "select * from READ_CSV('{file}')",
    "SELECT * FROM Read_Csv ( '{file}' )",
    "SELECT * FROM read_csv/**/('{file}')",
    "SELECT * FROM read_csv/* /* nested */ */('{file}')",
    "SELECT * FROM read_csv--\n('{file}')",
    "SELECT * FROM read_csv\t\n\u00a0\u3000('{file}')",
    "SELECT * FROM \"read_csv\"('{file}')",
    "SELECT * FROM `read_csv`('{file}')",
    "SELECT * FROM \"READ_CSV\"/**/('{file}')",
    "SELECT * FROM (read_csv('{file}'))",
    "SELECT * FROM cells, read_csv('{file}') AS r",
    "SELECT * FROM cells CROSS JOIN read_csv('{file}')",
    "SELECT * FROM cells WHERE 'hunter2' IN (SELECT secret FROM read_csv('{file}'))",
    "SELECT (SELECT max(secret) FROM read_csv('{file}')) AS m FROM cells",
    "WITH q AS (SELECT * FROM read_csv('{file}')) SELECT * FROM q",
    "SELECT 1 AS user, 'a' AS secret UNION ALL SELECT * FROM read_csv('{file}')",
    "FROM read_csv('{file}')",
    "FROM read_csv('{file}') SELECT *",
    "(SELECT * FROM read_csv('{file}'))",
    "EXPLAIN SELECT * FROM read_csv('{file}')",
    "CREATE TABLE t AS SELECT * FROM read_csv('{file}')",
    "/* first */ SELECT * FROM read_csv('{file}')",
    "SELECT '--' AS a, * FROM read_csv('{file}') -- '",
    "SELECT 'it''s', * FROM read_csv('{file}')",
    "SELECT '\\' AS a, * FROM read_csv('{file}') AS \"'\"",
    'SELECT "\'" FROM (SELECT 1 AS "\'"), read_csv(\'{file}\') AS "\'"',
    "SELECT * FROM read_csv/*!('{file}')*/",
    "SELECT * FROM read_csv/*+ a */('{file}')",
    "SELECT * FROM cells -- x\r, read_csv('{file}')",
    "SELECT $$'$$, * FROM read_csv('{file}') -- '",
    "SELECT $a$'$a$, * FROM read_csv('{file}') -- '",
    "SELECT q'(')', * FROM read_csv('{file}') -- '",
    "SELECT E'\\'', * FROM read_csv('{file}') -- '",
    'SELECT U&"\\0072ead_csv", * FROM cells',
    "SELECT * FROM \ufeffread_csv('{file}')",
    "SELECT * FROM read_csv\u200b('{file}')",
    "SELECT * FROM '{file}'",
    'SELECT * FROM "{file}"',
    "SELECT * FROM `{file}`",
    "SELECT * FROM TABLE(read_csv('{file}'))",
    "COPY cells TO '{file}'",
)
HARMLESS = (
    "SELECT count(*) AS n FROM cells",
    "-- cells\nSELECT count(*) AS n FROM cells",
    "/* read_csv('x') */ SELECT count(*) AS n FROM cells;",
    "/* a /* b */ c */\n\n -- d\n select count(*) AS n from cells -- read_csv('x')",
    "SELECT count(*) AS n FROM cells WHERE cell_id <> 'read_csv(''x'')'",
    "SELECT count(*) AS n FROM cells WHERE cell_id <> '/* it''s \\'",
    'SELECT count(*) AS n FROM cells AS "read_csv"',
    "(SELECT count(*) AS n FROM cells)",
    "WITH q AS (SELECT * FROM cells) SELECT count(*) AS n FROM q WHERE cell_idx >= -1e0 AND cell_idx % 1 = 0",
    "FROM cells SELECT count(*) AS n",
    "SELECT count(*) AS n FROM cells WHERE cell_idx & 0 = 0",
)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "secret.csv"
    file.write_text(f"user,secret\nroot,{SECRET}\n")
    return file


def test_no_spelling_of_a_query_reads_a_file(small_store, secret: Path) -> None:
    store = FeatureStore.open(small_store.layout.root)
    answered = []
    for spelling in SPELLINGS:
        try:
            answered.append((spelling, store.sql(spelling.format(file=secret)).to_dicts()))
        except QueryError as error:
            assert SECRET not in str(error)  # noqa: PT017  every spelling is tried
    assert [spelling for spelling, _ in answered] == []
    assert secret.read_text() == f"user,secret\nroot,{SECRET}\n"


@pytest.mark.parametrize("name", READERS)
def test_no_reader_of_polars_is_a_table(name: str) -> None:
    with pytest.raises(QueryError, match=rf"'{name}'.*`SHOW TABLES`"):
        check_statement(f"SELECT * FROM {name} ('x')")


@pytest.mark.parametrize("query", HARMLESS)
def test_a_query_over_the_tables_is_answered_with_comments_texts_and_brackets(small_store, query: str) -> None:
    assert FeatureStore.open(small_store.layout.root).sql(query).rows() == [(40,)]


@pytest.mark.parametrize(
    "query",
    [
        "DROP TABLE cells",
        "DELETE FROM cells",
        "TRUNCATE cells",
        "CREATE TABLE x AS SELECT * FROM cells",
        "selec 1",
        "-- ",
    ],
)
def test_a_statement_that_is_no_query_is_refused(small_store, query: str) -> None:
    with pytest.raises(QueryError, match=r"SELECT, WITH.*`SHOW TABLES`"):
        FeatureStore.open(small_store.layout.root).sql(query)


@pytest.mark.parametrize("query", ["SELECT 'a", 'SELECT "a', "SELECT 1 /* a", "SELECT /* /* */ 1"])
def test_a_text_name_or_comment_without_an_end_is_named(query: str) -> None:
    with pytest.raises(QueryError, match=r"without an end at character \d+"):
        check_statement(query)
