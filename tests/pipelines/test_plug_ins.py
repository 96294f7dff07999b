"""A foundation model of another package goes through the stages like one from here."""

import re
import sys

import numpy as np
import pytest
from toy_family import write_toy

from feature_store.activations import ActivationReader
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


def test_a_fact_of_each_cell_goes_into_the_model_from_its_column_of_obs(
    command, toy_plug_in, without_actors, tiny_data, tiny_cells, tmp_path
):
    folder, store = write_toy(tmp_path / "mine", genes=[f"GENE{i}" for i in range(2, 30)]), tmp_path / "store"
    platforms = ["deep" if i % 3 else "" for i in range(tiny_cells.n_obs)]
    table = tmp_path / "platforms.csv"
    rows = zip(tiny_cells.obs_names, platforms, strict=True)
    table.write_text("cell_id,tool\n" + "".join(f"{name},{platform}\n" for name, platform in rows))
    common = (tiny_data, "--model", folder, "--layer", 1, "--dtype", "f32", "--store", store, "--obs", table)
    code, _, said = command("extract", *common, "--model-option", "platform=obs:tol")
    assert (code, store.exists()) == (2, False)
    assert "takes the platform of each cell from the obs column 'tol'" in said
    assert "did you mean 'tool'?" in said
    code, _, said = command("extract", *common, "--shard-cells", 7, "--model-option", "platform=obs:tool")
    assert code == 0, said
    reader = ActivationReader(commit.Run.open(Layout(store).latest("activations").path))
    found = np.concatenate([reader.read(one.shard, one.group).act_f32() for one in reader.row_groups])
    x, expected = tiny_cells.X.tocsr(), {}
    for platform in ("deep", ""):
        model = load_model(folder, options={"platform": platform})
        match = model.match_genes(list(tiny_cells.var_names))
        tokens = model.tokenize(x.indptr, x.indices, x.data, match, seed=0)
        act = next(iter(model.activations(tokens, ["layer.1"]).values())).numpy()
        expected |= {i: own for i, own in enumerate(np.split(act, tokens.offsets[1:-1])) if platforms[i] == platform}
    np.testing.assert_allclose(found, np.concatenate([expected[i] for i in range(tiny_cells.n_obs)]), atol=1e-5)


def test_options_of_a_family_are_named_values_and_each_is_given_once(command, toy_plug_in, tiny_data, tmp_path):
    folder = write_toy(tmp_path / "mine")
    for given, wanted in (
        (("part=rde",), "part was 'rde'.*only scfoundation"),
        (("plaform=deep",), "plaform was 'deep'.*it has platform"),
        (("deep",), "'deep' has not the form NAME=VALUE"),
        (("platform=a", "platform=b"), "platform was given twice, as 'a' and 'b'"),
    ):
        options = [text for one in given for text in ("--model-option", one)]
        code, _, said = command("inspect", tiny_data, "--model", folder, *options)
        assert code == 2
        assert re.search(wanted, said), said
    code, out, _ = command("models-supported", "--format", "csv")
    assert code == 0
    assert "toy (scsae-toy 0.3)" in out
    assert "platform: Platform of the cells" in out


def test_without_the_package_the_folder_is_refused_and_nothing_is_written(command, tiny_data, tmp_path):
    folder = write_toy(tmp_path / "mine")
    code, out, said = command("extract", tiny_data, "--model", folder, "--layer", 1, "--store", tmp_path / "store")
    assert (code, out, said.count("\n")) == (2, "", 1)
    assert "toy.json" in said
    assert not (tmp_path / "store").exists()
