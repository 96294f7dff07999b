"""`scsae models`: versions with their steering figures; one version with all that it came from."""

import json

import polars as pl
import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.errors import exit_code
from pipelines.models import for_people, version_facts, versions_frame, write_version
from pipelines.runtime.output import Destination


@pytest.fixture(scope="module")
def store(registry):
    registry.version("sae-1", name="m", select_fvu=0.2, test_fvu=0.25)
    registry.version("sae-2", name="m", select_fvu=0.1, test_fvu=0.15)
    registry.evaluation("eval-1", "sae-1", remaining=0.5)
    registry.evaluation("eval-2", "sae-1", dataset="skin", remaining=0.6)
    registry.evaluation("eval-3", "sae-2", plan={"target": "all", "kind": "batch", "toward": None}, scib_total=0.7)
    return registry.layout.root


def test_each_headline_has_a_column_beside_the_figures_of_the_training(store):
    frame = versions_frame(store).filter(name="m")
    assert frame.select("name", "version", "alias", "test_fvu", "select_fvu").rows() == [
        ("m", 1, "champion", 0.25, 0.2),
        ("m", 2, "", 0.15, 0.1),
    ]
    assert frame["remaining (stim -> ctrl, data)"].to_list() == [0.5, None]
    assert frame["remaining (stim -> ctrl, skin)"].to_list() == [0.6, None]
    assert frame["scib_total (mix batch, data)"].to_list() == [None, 0.7]


def test_the_newest_evaluation_of_a_question_is_shown(store, registry):
    registry.version("sae-3", name="n")
    registry.evaluation("eval-old", "sae-3", plan={"seed": 0}, remaining=0.1)
    registry.evaluation("eval-new", "sae-3", plan={"seed": 1}, remaining=0.9)
    frame = versions_frame(store).filter(name="n")
    assert frame["remaining (stim -> ctrl, data)"].to_list() == [0.9]


def test_people_see_the_figure_of_each_evaluation_that_decides_in_one_column(store):
    frame = for_people(versions_frame(store).filter(name="m"))
    assert frame.width < 8
    assert frame["steering on test cells"].to_list() == [
        "remaining 0.500 (stim -> ctrl, data); remaining 0.600 (stim -> ctrl, skin)",
        "scib_total 0.700 (mix batch, data)",
    ]


def test_one_version_is_shown_with_all_its_evaluations_in_any_form(store, tmp_path):
    facts = version_facts(store, "m", 1)
    assert list(facts)[:7] == ["version", "sae", "activations", "data set", "model", "code", "figures"]
    assert facts["sae"]["state"] == "not in this store (NotFoundError)"
    assert facts["evaluation eval-1"]["test/chosen/remaining"] == 0.5
    write_version(facts, Destination(form="json", file=tmp_path / "facts.json"))
    rows = json.loads((tmp_path / "facts.json").read_text())
    assert {"part": "evaluation eval-2", "fact": "test/chosen/remaining", "value": "0.6"} in rows
    write_version(facts, Destination(form="csv", file=tmp_path / "facts.csv"))
    assert pl.read_csv(tmp_path / "facts.csv").height == len(rows)


def test_the_commands_answer_in_the_forms_asked_for(store):
    run = CliRunner().invoke
    listed = json.loads(run(app, ["models", "--store", str(store), "--format", "json"]).stdout)
    assert [row["remaining (stim -> ctrl, skin)"] for row in listed if row["name"] == "m"] == [0.6, None]
    shown = json.loads(run(app, ["models", "show", "m", "1", "--store", str(store), "--format", "json"]).stdout)
    assert {"part": "sae", "fact": "run", "value": "sae-1"} in shown
    promoted = run(app, ["models", "promote", "m", "2", "--metric", "test_fvu", "--store", str(store)])
    assert "of version 1, the champion before" in promoted.stdout
    refused = run(app, ["models", "promote", "m", "1", "--metric", "test_fvu", "--store", str(store)])
    assert exit_code(refused.exception) == 2
    told = " ".join(run(app, ["models", "promote", "--help"]).stdout.split())
    assert "selects on them" in told
    assert "--force" not in told


def test_for_people_it_is_in_parts(store, capsys):
    write_version(version_facts(store, "m", 2), Destination(form="table"))
    shown = capsys.readouterr().out
    assert "evaluation eval-3" in shown
    assert "mix batch" in shown


def test_people_see_the_metrics_that_compare_versions_and_every_one_if_they_want(store, capsys):
    facts = version_facts(store, "m", 1)
    facts["evaluation eval-1"] |= {"test/random features/remaining": 0.25, "test/chosen/p_random_features": 0.125}
    write_version(facts, Destination(form="table"))
    shown = capsys.readouterr().out
    assert "test/chosen/remaining" in shown
    assert "--all" in shown
    assert not any(name in shown for name in ("random features", "p_random", "imported"))
    write_version(facts, Destination(form="table"), every=True)
    every = capsys.readouterr().out
    assert all(name in every for name in ("random features", "p_random", "imported"))
