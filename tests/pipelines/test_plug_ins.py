"""A foundation model of another package goes through the stages like one from here."""

import sys

import pytest
from toy_family import write_toy

from feature_store.storage import commit
from feature_store.storage.layout import Layout
from pipelines.cli import main
from sae_core.scfm import load_model


@pytest.fixture
def command(monkeypatch, capsys):
    """Run `scsae` in this process; its exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["scsae", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return run


def test_the_model_of_an_installed_package_is_inspected_and_extracted(
    command, toy_plug_in, without_actors, tiny_data, tmp_path
):
    folder, store = write_toy(tmp_path / "mine", genes=[f"GENE{i}" for i in range(2, 30)]), tmp_path / "store"
    code, out, said = command("inspect", tiny_data, "--model", folder)
    assert code == 0, said
    assert "mine (toy, 2 layers, d_model 8)" in out
    options = ("--layer", 1, "--donor", "donor", "--cell-type", "type", "--store", store)
    code, _, said = command("extract", tiny_data, "--model", folder, *options)
    assert code == 0, said
    plan = commit.Run.open(Layout(store).latest("activations").path).plan
    assert (plan["model"], plan["site"], plan["d_model"]) == ("mine", "layer.1", 8)
    assert plan["model_digest"] == load_model(folder).digest


def test_without_the_package_the_folder_is_refused_and_nothing_is_written(command, tiny_data, tmp_path):
    folder = write_toy(tmp_path / "mine")
    code, out, said = command("extract", tiny_data, "--model", folder, "--layer", 1, "--store", tmp_path / "store")
    assert (code, out, said.count("\n")) == (2, "", 1)
    assert "toy.json" in said
    assert not (tmp_path / "store").exists()
