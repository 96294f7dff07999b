"""`scsae runs` and `scsae --version`: what a store holds, in any state."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.metadata import version

import pytest

from feature_store.query.run_list import run_list
from feature_store.query.runs import RunChain
from feature_store.storage.layout import Layout
from pipelines.cli import main


@pytest.fixture
def said(monkeypatch, capsys):
    """The code of a command, and what it wrote to stdout and stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["scsae", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        return (int(ended.value.code or 0), *capsys.readouterr())

    return run


def test_every_run_is_listed_with_its_state_and_what_it_was_made_of(own_store):
    layout = Layout(own_store)
    chain = RunChain.of(layout, layout.latest("associations").run)
    sae, activations = chain.associations.sae, chain.sae.activations
    found = {row["kind"]: row for row in run_list(layout).iter_rows(named=True)}
    assert list(found) == ["cells", "activations", "saes", "codes", "associations"]
    assert {row["state"] for row in found.values()} == {"complete"}
    assert {row["control"] for row in found.values()} == {None}
    assert found["saes"]["made_of"] == activations
    assert found["codes"]["made_of"] == f"{sae} {chain.associations.dataset}"
    assert found["associations"]["made_of"] == chain.associations.codes
    part = next((own_store / "activations" / activations).glob("part-*.parquet"))
    assert found["activations"]["bytes"] > part.stat().st_size
    assert run_list(layout, "saes")["run"].to_list() == [sae]

    plan = own_store / "activations" / activations / "plan.json"
    content = json.loads(plan.read_text())
    plan.write_text(json.dumps({**content, "dataset": "other"}))
    assert run_list(layout, "activations")["state"].to_list() == ["damaged"]
    shutil.rmtree(own_store / "saes" / sae)
    assert run_list(layout, "saes").select("state", "bytes").row(0) == ("lost", None)
    (own_store / "codes" / chain.associations.codes / "by_cell" / "MANIFEST.json").unlink()
    assert run_list(layout, "codes")["state"].to_list() == ["lost"]


def test_the_command_prints_the_runs_and_refuses_unknown_kinds(own_store, said):
    code, out, _ = said("runs", "--store", str(own_store), "--format", "csv")
    assert code == 0
    assert out.splitlines()[0] == "kind,run,state,control,made_of,created,bytes"
    assert len(out.splitlines()) == 6
    code, _, err = said("runs", "--kind", "sae", "--store", str(own_store))
    assert code == 2
    assert "did you mean 'saes'" in err
    code, _, err = said("runs", "--store", str(own_store / "nothing"))
    assert code == 2
    assert "scsae demo --store" in err


def test_the_version_is_that_of_the_package(said):
    code, out, _ = said("--version")
    assert (code, out.strip()) == (0, f"scsae {version('scsae')}")
