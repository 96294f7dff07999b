"""What a stage, an error or the demo prints as the next command is a command that `scsae` takes."""

import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from printed_commands import refusal

from feature_store.query.tables import MADE_BY
from feature_store.storage.layout import KINDS, Layout
from pipelines import demo
from pipelines.runtime.reports import NEXT

ROOT = Path("/data/my store")


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_that_makes_a_kind_of_run_is_taken(kind):
    command = Layout(ROOT).command_for(kind)
    assert refusal(command) is None
    assert shlex.split(command)[-2:] == ["--store", str(ROOT)]


@pytest.mark.parametrize("command", [*MADE_BY.values(), *NEXT.values()])
def test_the_command_that_makes_a_table_or_follows_a_stage_is_taken(command):
    assert refusal(f"{command} {Layout(ROOT).store_option}") is None


def test_every_command_at_the_end_of_the_demo_is_taken(capsys, monkeypatch):
    other = SimpleNamespace(lineage=SimpleNamespace(associations="other"))
    monkeypatch.setattr(demo, "FeatureStore", SimpleNamespace(open=lambda _: other))
    demo._next(ROOT, [], 3.0, "4f2a")
    said = capsys.readouterr().out
    commands = [line[line.index("scsae ") :] for line in said.splitlines() if "scsae " in line]
    assert len(commands) == 6
    assert {command: why for command in commands if (why := refusal(command)) is not None} == {}


def test_a_feature_is_steered_without_naming_a_number_of_features(monkeypatch):
    from typer.testing import CliRunner

    from pipelines.cli import app

    given = []
    monkeypatch.setattr("pipelines.steering.run.steer", lambda options, *_, **__: given.append(options) or 1 / 0)
    CliRunner().invoke(app, ["steer", "--feature", "3", "--feature", "5"])
    CliRunner().invoke(app, ["steer", "--n-features", "10"])
    assert [(options.feature, options.n_features) for options in given] == [((3, 5), (10,)), ((), (10,))]
    assert given[0].model_fields_set == {"feature"}
    refused = CliRunner().invoke(app, ["steer", "--feature", "3", "--n-features", "10"])
    assert "feature and n_features" in str(refused.exception)
