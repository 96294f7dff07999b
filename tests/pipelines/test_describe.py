"""`scsae describe`: what a table holds, with and without a store."""

from typer.testing import CliRunner

from pipelines.cli import app

RUNNER = CliRunner()


def test_a_table_is_described_where_there_is_no_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = RUNNER.invoke(app, ["describe", "feature_label"])
    assert said.exit_code == 0
    words = " ".join(said.stdout.split())
    assert words.startswith("feature_label: a row is one feature, label and split. Measured on: cells of the panel")
    assert "chance that the code is larger in a cell of the label" in words
    assert list(tmp_path.iterdir()) == []


def test_the_list_of_tables_is_written_as_csv(tmp_path):
    said = RUNNER.invoke(app, ["describe", "--format", "csv", "--store", str(tmp_path / "none")])
    assert said.stdout.splitlines()[0] == "table,row,measured_on,made_by"
    assert '\nfeature_number,"one feature, number of the cells and split"' in said.stdout


def test_an_unknown_table_names_the_nearest():
    assert "'feature_label'" in str(RUNNER.invoke(app, ["describe", "feature_labels"]).exception)
