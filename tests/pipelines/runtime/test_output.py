"""An answer is the same in every form and place; a place that cannot be written is refused before the query runs."""

import datetime
import io
import math
import re

import polars as pl
import pytest

from pipelines.cli.lookups import Lookup
from pipelines.errors import UsageError
from pipelines.runtime.output import FORMS, Destination, print_frame
from pipelines.runtime.reports import results_frame
from pipelines.runtime.stage import StageResult

FRAME = pl.DataFrame(
    {
        "id": [2**60, -1],
        "name": ['[bold] α, "quoted"\nline', None],
        "third": [1 / 3, 1e-300],
        "single": pl.Series([0.1, 3.4e38], dtype=pl.Float32),
        "yes": [True, None],
        "genes": [["A", "B"], []],
        "day": [datetime.date(2024, 2, 29), None],
    }
)


@pytest.mark.parametrize("form", ["csv", "json", "parquet"])
def test_numbers_are_unrounded_in_a_file_and_on_stdout_alike(form, tmp_path, capfdbinary):
    file = tmp_path / f"answer.{form}"
    Destination.choose(None, file).write(FRAME)
    assert b"2 rows in" in capfdbinary.readouterr().err
    Destination.choose(form, None).write(FRAME)
    out, err = capfdbinary.readouterr()
    assert (out, err) == (file.read_bytes(), b"")
    match form:
        case "csv":
            read = pl.read_csv(io.BytesIO(out), try_parse_dates=True, schema_overrides={"single": pl.Float32})
            assert read.equals(FRAME.with_columns(genes=pl.col("genes").list.join(",")))
        case "json":
            read = pl.read_json(io.BytesIO(out))
            assert read.drop("day", "single").equals(FRAME.drop("day", "single"))
            assert read["single"].cast(pl.Float32).equals(FRAME["single"])
        case _:
            assert pl.read_parquet(io.BytesIO(out)).equals(FRAME)


def test_json_has_null_where_a_number_is_none_that_json_has(capfdbinary):
    Destination(form="json").write(pl.DataFrame({"x": [math.nan, math.inf, 1.0]}))
    assert capfdbinary.readouterr().out == b'[{"x":null},{"x":null},{"x":1.0}]\n'


def test_a_table_shows_the_first_rows_and_a_table_in_a_file_all_of_them(tmp_path, capsys):
    frame = pl.DataFrame({"row": [f"[b]{i}" for i in range(60)], "x": [1 / 3] * 60})
    print_frame(frame)
    shown = capsys.readouterr().out
    assert "[b]49" in shown
    assert "[b]50" not in shown
    assert "10 more rows" in shown
    assert "0.333 " in shown
    Destination.choose(None, tmp_path / "all.txt").write(frame)
    assert "[b]59" in (tmp_path / "all.txt").read_text()


@pytest.mark.parametrize("form", FORMS)
def test_an_empty_answer_has_its_columns_in_every_form(form, tmp_path, capsys):
    Destination.choose(form, tmp_path / "any.thing").write(FRAME.head(0))
    content = (tmp_path / "any.thing").read_bytes()
    assert content == b"[]\n" if form == "json" else b"third" in content


def test_bytes_are_refused_on_a_terminal_and_written_into_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with pytest.raises(UsageError, match=r"parquet.*--output FILE\.parquet"):
        Destination.choose("parquet", None)
    assert Destination.choose("parquet", tmp_path / "x").form == "parquet"
    assert Destination.choose("csv", None).form == "csv"


def test_a_file_that_cannot_be_is_refused_naming_what_can(tmp_path):
    with pytest.raises(UsageError, match=r"x\.doc.*\.txt, \.csv, \.json, \.parquet, or .*--format"):
        Destination.choose(None, tmp_path / "x.doc")
    with pytest.raises(UsageError, match=r"--output.*nowhere"):
        Destination.choose(None, tmp_path / "nowhere" / "x.csv")
    with pytest.raises(UsageError, match=r"--format was 'xml'.*table, csv, json, parquet"):
        Destination.choose("xml", None)
    assert list(tmp_path.iterdir()) == []


def test_the_result_of_a_stage_is_a_row_with_its_facts(tmp_path):
    facts = [{"features": 48, "dead": 0}, {"features": 48, "class mixed": 3}]
    results = [
        StageResult(kind="associations", run=str(i), path=tmp_path, done=5, reused=i, seconds=1 / 3, facts=facts[i])
        for i in range(2)
    ]
    found = results_frame(results)
    assert found["seconds"].to_list() == [1 / 3, 1 / 3]
    assert found.select("kind", "run", "done", "reused", "features", "dead", "class mixed").rows() == [
        ("associations", "0", 5, 0, 48, 0, None),
        ("associations", "1", 5, 1, 48, None, 3),
    ]


def test_a_look_up_has_one_subject():
    with pytest.raises(UsageError, match="--label and --cell"):
        Lookup(label="B", cell="3")
    with pytest.raises(UsageError, match=r"--kind was 'batch'.*--label or --gene-set"):
        Lookup(gene="CD79A", kind="batch")


@pytest.mark.parametrize(("q", "said"), [([0.01, 0.2], "1 of 2 .*0.05"), ([0.06, None], "no feature of 'B'.*0.05")])
def test_a_look_up_says_how_many_features_are_significant(q, said, capfd):
    class Store:
        def features_for(self, **_):
            return pl.DataFrame({"feature_id": [1, 2], "q": q, "holds_on_test": [x == 0.01 for x in q]})

        def tables(self):
            return []

    assert Lookup(label="B").answer(Store()).height == 2
    assert re.search(said, capfd.readouterr().err)
