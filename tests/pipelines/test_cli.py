"""The command line as a user meets it: its exit code, one clear message on stderr, and the answer on stdout.

Most of it without a process for each command, which takes a second or two to import what it needs; for some, one.
"""

import errno
import importlib
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import typer

from feature_store import FeatureStore
from feature_store.associations.held_out_units import limit_of_claims
from feature_store.errors import InputError
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from pipelines.cli import app, main
from pipelines.cli.parameters import load_stage
from pipelines.extract import extract
from pipelines.train import train

COMMANDS = (
    "demo inspect extract train import-sae export-sae encode associate match effects circuit inputs probe modules "
    "baseline compare steer run submit runs sql describe features plot models "
    "models-supported serve export-atlas verify forget"
).split()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home and an environment of its own; the folder is returned with the environment."""
    folder = tmp_path_factory.mktemp("home")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SCSAE_", "MLFLOW_"))}
    return {**kept, "HOME": str(folder), "OMP_NUM_THREADS": "1"}


def without_loading(stderr: str) -> str:
    """What a command said, without the lines that it prints on a slow machine while it loads."""
    return re.sub(r"^\S+ +loads its libraries, \d+ s\n", "", stderr, flags=re.MULTILINE)


@pytest.fixture
def scsae(tmp_path, home):
    """Run a command in an empty folder; text unless `text=False`."""
    here = tmp_path / "here"
    here.mkdir()

    def run(*arguments, text=True, env=None, **options):
        command = [sys.executable, "-m", "pipelines.cli", *map(str, arguments)]
        environment = {**home, **(env or {})}
        done = subprocess.run(
            command, cwd=here, env=environment, capture_output=True, text=text, check=False, timeout=240, **options
        )
        done.stderr = without_loading(done.stderr) if text else done.stderr
        return done

    run.here = here
    return run


@pytest.fixture
def scsae_here(tmp_path, home, monkeypatch, capsys):
    """The same in this process."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for key in os.environ.keys() - home.keys():
        monkeypatch.delenv(key)
    monkeypatch.setenv("HOME", home["HOME"])

    def run(*arguments):
        command = ["scsae", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return subprocess.CompletedProcess(command, ended.value.code, said.out, without_loading(said.err))

    run.here = here
    return run


@pytest.fixture(scope="module")
def bad(tmp_path_factory, tiny_cells):
    """A folder of files that a user may give by mistake."""
    folder = tmp_path_factory.mktemp("bad")
    scaled = tiny_cells.copy()
    dense = scaled.X.toarray()
    scaled.X = ((dense - dense.mean(axis=0)) / dense.std(axis=0)).astype(np.float32)
    scaled.write_h5ad(folder / "scaled.h5ad")
    mouse = tiny_cells.copy()
    mouse.var_names = [f"Mouse{i}" for i in range(mouse.n_vars)]
    mouse.write_h5ad(folder / "mouse.h5ad")
    (folder / "notes.h5ad").write_text("not HDF5")
    (folder / "wrong_key.yaml").write_text("train: {n_feature: 64}\n")
    (folder / "empty.yaml").write_text("store: somewhere\n")
    (folder / "two_origins.yaml").write_text("train: {k: 4}\nencode: {sae: abc}\n")
    (folder / "absent_data.yaml").write_text("extract: {data: absent.h5ad, layer: [1]}\n")
    (folder / "good.yaml").write_text("train: {k: 4}\n")
    (folder / "broken.gmt").write_text("one field only\n")
    return folder


EXTRACT = "extract {data} --model {model} --layer 1 --store new"
BAD_INPUT = {
    "missing file": (
        "extract {bad}/scale.h5ad --layer 1 --store new",
        ["scale.h5ad", "'scaled.h5ad'"],
    ),
    "no h5ad": ("extract {bad}/notes.h5ad --layer 1 --store new", ["notes.h5ad", "give an .h5ad file"]),
    "scaled values only": (
        "extract {bad}/scaled.h5ad --layer 1 --store new",
        ["scaled.h5ad", "raw counts"],
    ),
    "one file twice": (
        "extract {data} {data} --model {model} --layer 1 --store new",
        ["tiny.h5ad", "once"],
    ),
    "files with no gene in common": (
        "extract {data} {bad}/mouse.h5ad --model {model} --layer 1 --store new",
        ["mouse.h5ad.*tiny.h5ad"],
    ),
    "no data": ("extract --layer 1 --store new", ["Missing argument", "--help"]),
    "no gene in common": (
        "extract {bad}/mouse.h5ad --model {model} --layer 1 --store new",
        ["30 genes", "Mouse0, Mouse1, Mouse2", "GENE2, GENE3", "human orthologues"],
    ),
    "no such obs column": (
        f"{EXTRACT} --donor doner",
        ["--donor", "'doner'", "type, donor, batch", "'donor'"],
    ),
    "no such label": (f"{EXTRACT} --label typ", ["--label", "'typ'", "'type'"]),
    "no such matrix": (f"{EXTRACT} --matrix layers/raw", ["'layers/raw'", "X"]),
    "no layer": ("extract {data} --model {model} --store new", ["0 to 2", "--layer 2"]),
    "layer too deep": (f"{EXTRACT} --layer 3", ["--layer", "'3'", "0 to 2"]),
    "no such obs column, and no model": (
        "extract {data} --model nowhere --layer 1 --donor doner --store new",
        ["--donor", "'doner'"],
    ),
    "layer too deep, and no gene in common": (
        "extract {bad}/mouse.h5ad --model {model} --layer 3 --store new",
        ["--layer", "'3'", "0 to 2"],
    ),
    "no such site": (f"{EXTRACT} --layer neuron.1", ["'neuron.1'", "attention"]),
    "no model folder": (
        "extract {data} --model nowhere --layer 1 --store new",
        ["nowhere", "mini", "scsae models-supported"],
    ),
    "folder without a model": ("extract {data} --model {bad} --layer 1 --store new", ["{bad}", "args.json"]),
    "no such option": (f"{EXTRACT} --layr 2", ["No such option: --layr", "--layer", "--help"]),
    "no number": (f"{EXTRACT} --shard-cells two", ["--shard-cells", "give a whole number"]),
    "out of range": (f"{EXTRACT} --shard-cells 0", ["shard_cells was 0: give 1 or more"]),
    "no number among several": ("probe --k abc --store {store}", ["k was 'abc': give a whole number"]),
    "no number at all": ("train --lr fast --store {store}", ["--lr", "give a number"]),
    "missing gene sets": ("associate --gmt none.gmt --store {store}", ["none.gmt", "leave --gmt out", "built-in"]),
    "no store": ("features --store nowhere", ["nowhere does not exist", "is the path right", "scsae demo"]),
    "store without runs": ("features --store {bad}", ["{bad} holds no run", "is the path right", "scsae demo"]),
    "missing file beside no others": ("extract cells.h5ad --layer 1", ["cells.h5ad", "has no .h5ad, .h5 or .zarr"]),
    "missing folder": ("extract none/cells.h5ad --layer 1", ["folder .*none does not exist"]),
    "no such choice": (f"{EXTRACT} --dtype f8", ["dtype was 'f8'", "'f16', 'bf16' or 'f32'"]),
    "no size": (f"{EXTRACT} --shard-size 12", ["'12'", "256MB"]),
    "two sizes": (f"{EXTRACT} --shard-size 1MB --shard-cells 5", ["shard_cells.*shard_size"]),
    "no such command": ("extrac", ["No such command 'extrac'", "--help"]),
    "nothing to train on": (
        "train --store new",
        ["activations", "scsae extract DATA --store new"],
    ),
    "k too large": ("train --k 49 --n-features 48 --store {store}", ["k", "49", "48"]),
    "no such parent run": (
        "train --activations zzz --store {store}",
        ["--activations.*'zzz'"],
    ),
    "malformed gene sets": (
        "associate --gmt {bad}/broken.gmt --store {store}",
        ["broken.gmt.*line 1"],
    ),
    "nothing to match with": ("match --store {store}", ["--other", "scsae train"]),
    "no such SAE to match with": ("match --other zzz --store {store}", ["--other.*'zzz'"]),
    "too few permutations": ("match --other zzz --n-null 5 --store {store}", ["n_null was 5", "19"]),
    "no such target": ("steer --target C --store {store}", ["--target.*'C'", "A, B"]),
    "no such kind": ("steer --kind celltype --store {store}", ["--kind.*'celltype'", "cell_type, batch"]),
    "missing recipe": ("run {bad}/none.yaml --store new", ["none.yaml", "does not exist"]),
    "unknown recipe key": (
        "run {bad}/wrong_key.yaml --store new",
        ["'train.n_feature'", "'n_features'"],
    ),
    "empty recipe": (
        "run {bad}/empty.yaml --store new",
        ["extract, train or import-sae, encode, associate, steer"],
    ),
    "two origins": ("run {bad}/two_origins.yaml --store new", ["encode.sae was 'abc'", "train"]),
    "recipe without data": ("run {bad}/absent_data.yaml --store new", ["absent.h5ad"]),
    "nobody to submit to": (
        "submit {bad}/good.yaml --address http://127.0.0.1:9 --store /new",
        ["http://127.0.0.1:9", "http://HEAD:8265"],
    ),
    "no address at all": ("submit {bad}/good.yaml --address somewhere --store /new", ["somewhere", "http://HEAD:8265"]),
    "misspelt column": (
        "sql|SELECT densty FROM features|--store|{store}",
        ["'densty'", "density \\(features"],
    ),
    "misspelt table": ("sql|SELECT * FROM featurs|--store|{store}", ["'featurs'", "'features'"]),
    "no SELECT": ("sql|DROP TABLE features|--store|{store}", ["SELECT", "DROP TABLE"]),
    "table not made yet": ("sql|SELECT * FROM steering|--store|{store}", ["'steering'", "scsae steer"]),
    "empty store": ("sql|SELECT 1|--store|new", ["scsae demo --store new"]),
    "no such format": ("sql|SELECT 1|--format|xml|--store|{store}", ["--format", "xml", "table.*csv.*json.*parquet"]),
    "output without a form": ("sql|SELECT 1|--output|x.doc|--store|{store}", ["x.doc", "\\.csv", "--format"]),
    "output into nowhere": ("sql|SELECT 1|--output|none/x.csv|--store|{store}", ["--output", "none"]),
    "run of no kind": (
        "sql|SELECT 1 AS x|--associations|zzz|--store|{store}",
        ["'zzz'", "associations"],
    ),
    "two questions": ("features --gene GENE3 --label A --store {store}", ["--gene and --label"]),
    "no such gene": ("features --gene GEN33 --store {store}", ["'GEN33'", "'GENE"]),
    "no such cell id": ("features --cell ell12 --store {store}", ["'ell12'", "'cell12'"]),
    "no such label to look up": ("features --label Z --store {store}", ["'Z'", "A"]),
    "no such cell": ("features --cell 72 --store {store}", ["72", "0 to 71"]),
    "no such run": ("verify zzz --store {store}", ["'zzz'", "activations/", "codes/"]),
    "no registry": ("models --store new", ["scsae train --store new"]),
    "nothing to promote": ("models promote sae-tiny-layer.1 1 --store new", ["scsae train"]),
    "no such version": (
        "models promote sae-tiny-layer.1 9 --store {store}",
        ["sae-tiny-layer.1 version 9", "sae-tiny-layer.1 1"],
    ),
    "name that no registry takes": ("train --name a/b --store {store}", ["name", "'a/b'", "--name sae-mine"]),
    "columns without data": ("demo --cell-type type --store new", ["'type'", "--data"]),
}


@pytest.fixture
def assert_refused(chain, bad, tiny_data, tiny_model):
    """Run one of `BAD_INPUT` and check everything that it prints and writes."""
    values = {"data": tiny_data, "model": tiny_model, "bad": bad, "store": chain.store}

    def check(scsae, case):
        line, words = BAD_INPUT[case]
        before = content(chain.store)
        done = scsae(*(part.format(**values) for part in line.split("|" if "|" in line else None)))
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        assert len(re.findall(r"(?i)^error: ", done.stderr, flags=re.MULTILINE)) == 1, done.stderr
        assert "Traceback" not in done.stderr
        # a message of ours stands alone; typer's has its usage lines above
        assert done.stderr.startswith(("error: ", "Usage: ")), done.stderr
        for word in words:
            assert re.search(word.format(**values), done.stderr), f"{word!r} is not in: {done.stderr}"
        assert not list(scsae.here.iterdir())
        assert content(chain.store) == before

    return check


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gives_one_clear_message_and_exit_code_2_and_writes_nothing(scsae_here, assert_refused, case):
    assert_refused(scsae_here, case)


MISSPELT = {
    "file": "extract {bad}/scale.h5ad --layer 1 --store new",
    "column": f"{EXTRACT} --donor doner",
    "matrix": f"{EXTRACT} --matrix layers/raw",
    "file to inspect": "inspect {bad}/scale.h5ad",
    "label to probe": "probe --label typ --store {store}",
    "SAE of modules": "modules --sae zzz --store {store}",
    "activations of an import": "import-sae nowhere --activations zzz --store {store}",
    "SAE to export": "export-sae here --sae zzz --store {store}",
}


@pytest.mark.parametrize("case", MISSPELT)
def test_a_misspelt_name_is_told_before_torch_is_imported(tmp_path, chain, bad, tiny_data, tiny_model, home, case):
    values = {"data": tiny_data, "model": tiny_model, "bad": bad, "store": chain.store}
    code = (
        "import atexit, sys; from pipelines.cli import main; "
        "atexit.register(lambda: print({'torch', 'ray', 'mlflow', 'sklearn'} & set(sys.modules))); main()"
    )
    command = [sys.executable, "-c", code, *MISSPELT[case].format(**values).split()]
    done = subprocess.run(command, cwd=tmp_path, env=home, capture_output=True, text=True, check=False, timeout=240)
    assert (done.returncode, done.stdout) == (2, "set()\n"), done.stderr


def test_a_weight_that_is_not_finite_is_refused_before_anything_is_written(scsae_here, tiny_data, tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_model, tmp_path / "nan"))
    weights = load_file(folder / "model.safetensors")
    name = next(key for key in weights if "layers.1.norm2.weight" in key)
    weights[name][3] = math.nan
    save_file(weights, folder / "model.safetensors")
    done = scsae_here("extract", tiny_data, "--model", folder, "--layer", 1, "--store", "new")
    assert done.returncode == 2
    assert name in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(scsae_here.here.iterdir())


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (InputError("activation nan of token 0"), "activation nan"),
        (OSError(errno.ENOSPC, "No space left on device"), "run the same command again"),
        (MemoryError(), "--num-actors"),
    ],
)
def test_an_error_after_a_write_is_one_line_and_exits_1(scsae_here, tiny_data, tiny_model, monkeypatch, error, words):
    def fail(*_arguments, **_options):
        raise error

    monkeypatch.setattr("pipelines.extract.do_shards", fail)
    done = scsae_here("extract", tiny_data, "--model", tiny_model, "--layer", 1, "--store", "new")
    assert (done.returncode, done.stdout) == (1, "")
    # before it, extract said that it knows no donors
    *before, said = done.stderr.splitlines()
    assert said.startswith("error: ")
    assert words in said
    assert [line.partition(":")[0] for line in before] == ["warning"]
    assert list(scsae_here.here.iterdir())


def test_an_unexpected_error_keeps_its_traceback_in_plain_text_for_a_report(scsae_here, monkeypatch):
    error = ZeroDivisionError("of \x1b[31mred\x1b[39m\n[bold]")
    error.add_note("inside the actor:\n\x1b[36mray::A\x1b[39m")

    def fail(*_arguments, **_options):
        raise error

    monkeypatch.setattr("pipelines.inspection.inspect_data", fail)
    done = scsae_here("inspect", "x.h5ad")
    assert done.returncode == 1
    for words in ("Traceback (most recent", "in fail", "inside the actor:", "ray::A", "report it", "[bold]"):
        assert words in done.stderr
    assert "\x1b" not in done.stderr


def test_control_characters_in_a_path_are_printed_as_text(scsae_here):
    done = scsae_here("extract", "a\x1b[31m\nerror: b\u202e.h5ad", "--layer", 1)
    assert done.returncode == 2
    assert r"a\x1b[31m\nerror: b\u202e.h5ad" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not {"\x1b", "\u202e"} & set(done.stderr)
    refused = scsae_here("features", "--\x1b[31m")
    assert refused.returncode == 2
    assert r"--\x1b[31m" in refused.stderr


IN_DEFAULT = ("missing file", "no such option", "misspelt column")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in IN_DEFAULT else pytest.mark.slow) for case in BAD_INPUT]
)
def test_it_does_so_as_a_process(scsae, assert_refused, case):
    assert_refused(scsae, case)


def content(store):
    """Every file of a store with its time; sqlite's scratch files apart."""
    return {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}


def test_help_lists_every_command(scsae_here):
    done = scsae_here("--help")
    assert done.returncode == 0
    listed = re.findall(r"^  ([a-z][a-z-]*)  +\S", done.stdout, flags=re.MULTILINE)
    assert set(listed) == set(COMMANDS)


def test_the_help_shows_what_a_command_does_whole(scsae_here):
    said = " ".join(scsae_here("--help").stdout.split())
    assert "Measure which features of a later SAE change when a feature of an earlier one is ablated" in said
    assert "..." not in said.partition("Commands:")[2]


def test_a_shell_completes_commands_and_options():
    def completed(words):
        asked = {"_SCSAE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
        return subprocess.run(
            [Path(sys.executable).with_name("scsae")],
            env={**os.environ, **asked},
            capture_output=True,
            text=True,
            check=False,
        ).stdout.split()

    assert completed("scsae des") == ["describe"]
    assert completed("scsae train --ar") == ["--arch"]


def parameters(command, name="scsae"):
    for parameter in command.params:
        yield name, parameter
    for below, inner in getattr(command, "commands", {}).items():
        yield from parameters(inner, f"{name} {below}")


def test_every_option_and_argument_of_every_command_has_a_help_text():
    found = list(parameters(typer.main.get_command(app)))
    assert len(found) > 60
    silent = [f"{name}: {parameter.name}" for name, parameter in found if not (parameter.help or "").strip()]
    assert silent == []


def test_the_options_of_a_stage_are_listed_with_their_defaults(scsae_here):
    text = " ".join(scsae_here("steer", "--help").stdout.split())
    assert "--n-nulls" in text
    assert "random features of matched density" in text
    assert "default: 20" in text


QUERY = 'SELECT feature_id, density, dead, top_genes, "class" FROM features ORDER BY feature_id'
READERS = {"csv": pl.read_csv, "json": pl.read_json, "parquet": pl.read_parquet}


@pytest.mark.parametrize("form", READERS)
def test_an_answer_in_csv_json_or_parquet_is_the_answer_again_when_read(scsae, chain, form):
    done = scsae("sql", QUERY, "--format", form, "--store", chain.store, text=False)
    assert (done.returncode, done.stderr) == (0, b"")
    answer = FeatureStore.open(chain.store).sql(QUERY)
    read = READERS[form](io.BytesIO(done.stdout))
    if form == "parquet":
        assert read.schema == answer.schema
    assert read.columns == answer.columns
    assert read.rows() == answer.rows()


def test_an_answer_as_a_table_holds_every_row(scsae_here, chain):
    done = scsae_here(
        "sql", "SELECT feature_id, class FROM features WHERE feature_id < 3 ORDER BY feature_id", "--store", chain.store
    )
    assert done.returncode == 0
    assert re.findall(r"│\s+(\d+)\s+│", done.stdout) == ["0", "1", "2"]


def test_the_store_may_be_named_by_the_environment(scsae, chain):
    done = scsae("sql", "SELECT COUNT(*) AS n FROM cells", "--format", "csv", env={"SCSAE_STORE": str(chain.store)})
    assert (done.returncode, done.stdout) == (0, "n\n72\n")


def test_features_of_a_cell_are_its_largest_codes(scsae_here, chain):
    done = scsae_here("features", "--cell-idx", 5, "--n", 4, "--format", "json", "--store", chain.store)
    assert done.returncode == 0
    frame = pl.concat(
        [pl.read_parquet(part) for part in (Layout(chain.store).latest("codes").path / "by_cell").glob("*.parquet")]
    )
    largest = frame.filter(cell_idx=5).sort("value", "feature_id", descending=[True, False]).head(4)
    answer = [(row["feature_id"], row["value"]) for row in json.loads(done.stdout)]
    assert [feature for feature, _ in answer] == largest["feature_id"].to_list()
    np.testing.assert_allclose([value for _, value in answer], largest["value"].to_numpy(), rtol=1e-6)


def test_a_cell_is_named_by_its_place_or_by_its_id(scsae_here, chain):
    asked = [
        scsae_here("features", *cell, "--format", "csv", "--store", chain.store)
        for cell in (("--cell-idx", 5), ("--cell", "cell5"))
    ]
    assert asked[0].stdout.count("\n") > 1
    assert asked[0].stdout == asked[1].stdout
    unknown = scsae_here("features", "--cell", 5, "--store", chain.store)
    assert unknown.returncode == 2
    assert "'5'" in unknown.stderr
    assert "--cell-idx" in unknown.stderr
    both = scsae_here("features", "--cell", 5, "--cell-idx", 5, "--store", chain.store)
    assert both.returncode == 2
    assert "--cell and --cell-idx" in both.stderr


def test_an_answer_without_rows_says_why_and_is_written_all_the_same(scsae_here, chain):
    query = "SELECT feature_id FROM feature_label WHERE label = 'a'"
    done = scsae_here("sql", query, "--output", "answer.csv", "--store", chain.store)
    assert (done.returncode, done.stdout) == (0, "")
    assert "no rows: no label is 'a' in feature_label; did you mean 'A'" in done.stderr
    assert "0 rows in answer.csv" in done.stderr
    assert (scsae_here.here / "answer.csv").read_text() == "feature_id\n"


def test_a_query_may_begin_with_a_comment(scsae_here, chain):
    query = "-- how many cells\nSELECT count(*) AS n FROM cells"
    for order in (("sql", query, "--format", "csv"), ("sql", "--format", "csv", query)):
        done = scsae_here(*order, "--store", chain.store)
        assert (done.returncode, done.stdout) == (0, "n\n72\n"), done.stderr


def test_a_query_may_name_the_run_that_it_is_about(scsae_here, chain):
    run = Layout(chain.store).latest("codes").run
    done = scsae_here("sql", "SHOW TABLES", "--codes", run[:8], "--format", "csv", "--store", chain.store)
    assert done.returncode == 0, done.stderr
    assert "feature_label" in done.stdout


def test_the_result_of_associations_can_be_read_by_a_program(scsae_here, chain):
    done = scsae_here("associate", "--format", "json", "--store", chain.store)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert (row["kind"], row["run"]) == ("associations", Layout(chain.store).latest("associations").run)


@pytest.mark.parametrize("asked", [("features", "--label", "A"), ("associate",)], ids=["features", "associate"])
def test_few_donors_are_said_beside_the_answer(scsae_here, chain, asked):
    done = scsae_here(*asked, "--format", "json", "--store", chain.store)
    assert done.returncode == 0, done.stderr
    limit = limit_of_claims(FeatureStore.open(chain.store).panel_cells().collect())
    assert limit is not None
    assert done.stderr.count(limit) == 1
    assert limit not in done.stdout
    other = scsae_here("features", "--cell-idx", 5, "--format", "json", "--store", chain.store)
    assert other.stderr == ""


@pytest.mark.parametrize("form", ["table", "csv"])
def test_a_reader_that_goes_away_ends_a_command_without_a_word(chain, home, form):
    command = f"{sys.executable} -m pipelines.cli sql 'SELECT * FROM codes' --format {form} --store {chain.store}"
    buffered = {name: value for name, value in home.items() if name != "PYTHONUNBUFFERED"}
    # the reader is gone before the first row
    done = subprocess.run(
        ["bash", "-c", f"{command} | exec 0<&-"], env=buffered, capture_output=True, text=True, timeout=240, check=False
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_inspect_reports_coverage_and_writes_nothing(scsae_here, tiny_cells, tiny_data, tiny_model, home):
    done = scsae_here("inspect", tiny_data, "--model", tiny_model)
    assert (done.returncode, done.stderr) == (0, "")
    *lines, last = done.stdout.splitlines()
    facts = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in lines if line.strip())
    columns = ["--donor", "donor", "--batch", "batch", "--cell-type", "COLUMN"]
    words = ["next:", "scsae", "extract", str(tiny_data), "--model", str(tiny_model), "--layer", "2", *columns]
    assert shlex.split(last) == words
    counts = tiny_cells.X.toarray()
    known = counts[:, 2:]
    assert facts["cells"] == "72"
    assert facts["matrix"] == "X (counts)"
    assert facts["why this matrix"] == "counts of 30 genes"
    assert (facts["passed over"], facts["features left out"]) == ("none", "none")
    assert facts["genes matched"] == "28 of 30 (93%)"
    assert facts["checkpoint"] == "as its authors have it"
    assert facts["share of values matched"].startswith(f"{known.sum() / counts.sum():.0%} ")
    assert facts["tokens per cell"] == str(round((known > 0).sum(axis=1).mean(), 1))
    assert facts["obs columns"] == "type, donor, batch"
    assert not list(scsae_here.here.iterdir())


def test_verify_passes_an_intact_run_and_names_the_part_that_is_not(scsae_here, own_store):
    run = Layout(own_store).latest("activations")
    good = scsae_here("verify", run.run, "--store", own_store)
    assert good.returncode == 0
    assert "intact" in good.stderr
    part = commit.Run.open(run.path).part(1)
    part.write_bytes(part.read_bytes()[:-10])
    damaged = scsae_here("verify", run.run[:5], "--store", own_store)
    assert damaged.returncode == 1
    assert str(part) in damaged.stderr
    assert "run its stage again" in damaged.stderr
    assert "Traceback" not in damaged.stderr


def interrupted(scsae, home, stage, ready):
    """Start a command, press Ctrl-C once `ready()`, and return the exit code and what it said."""
    # a group of its own, as a shell gives each command: Ctrl-C reaches Ray's processes too
    running = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", *stage.split()],
        cwd=scsae.here,
        env=home,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    deadline = time.monotonic() + 240
    while not ready() and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGINT)
    out, err = running.communicate(timeout=240)
    return running.returncode, out, err


@pytest.mark.slow
def test_ctrl_c_in_an_extraction_says_that_the_same_command_resumes_and_it_does(
    scsae, chain, home, tmp_path, without_actors, tiny_data, tiny_model
):
    calm = extract(chain.extract.model_copy(update={"shard_cells": 1}), tmp_path / "calm")[0]
    stage = f"extract {tiny_data} --model {tiny_model} --layer 1 --donor donor --batch batch --cell-type type"
    stage += f" --dtype f32 --shard-cells 1 --num-actors 1 --store {tmp_path / 'broken'}"
    folder = tmp_path / "broken" / "activations" / calm.run
    code, out, err = interrupted(scsae, home, stage, lambda: len(list(folder.glob("part-*.json"))) >= 3)
    assert not (folder / "MANIFEST.json").exists(), "the run was over before Ctrl-C: the test shows nothing"
    assert (code, out) == (1, ""), err
    assert "the same command resumes" in err
    assert "Traceback" not in err
    n_before = len(list(folder.glob("part-*.json")))
    resumed = scsae(*stage.split())
    assert resumed.returncode == 0, resumed.stderr
    assert re.search(rf"reused\s+{n_before}\b", resumed.stdout)
    assert commit.Run.open(folder).manifest() == commit.Run.open(calm.path).manifest()
    assert commit.Run.open(folder).verify() == []


@pytest.mark.slow
def test_ctrl_c_in_a_training_says_the_same_and_the_sae_is_that_of_an_undisturbed_one(
    scsae, home, chain, own_store, tmp_path
):
    options = chain.train.model_copy(update={"n_steps": 4000, "checkpoint_steps": 50})
    before = {info.run for info in Layout(own_store).runs("saes")}
    stage = f"train --n-features 48 --k 4 --n-steps 4000 --batch-size 128 --checkpoint-steps 50 --store {own_store}"

    def checkpointed():
        (folder,) = [info.path for info in Layout(own_store).runs("saes") if info.run not in before] or [own_store]
        return len(list(folder.glob("checkpoints/step-*/trainer.json"))) > 1

    code, out, err = interrupted(scsae, home, stage, checkpointed)
    (broken,) = (info.path for info in Layout(own_store).runs("saes") if info.run not in before)
    assert not (broken / "MANIFEST.json").exists(), "the run was over before Ctrl-C: the test shows nothing"
    assert (code, out) == (1, ""), err
    assert "the same command resumes" in err
    assert "Traceback" not in err
    newest = max(int(path.name.removeprefix("step-")) for path in (broken / "checkpoints").iterdir())
    assert 0 < newest < 4000
    calm = train(options, Path(shutil.copytree(chain.store, tmp_path / "calm")))
    resumed = train(options, own_store)
    assert resumed.path == broken
    assert commit.Run.open(resumed.path).manifest() == commit.Run.open(calm.path).manifest()


def test_a_stage_says_that_it_loads_if_that_takes_longer_than_a_moment(capsys, monkeypatch):
    monkeypatch.setattr(importlib, "import_module", lambda name: time.sleep(1.0))
    load_stage("extract", "pipelines.extract")
    slow = capsys.readouterr()
    assert re.fullmatch(r"extract +loads its libraries, \d s\n", slow.err)
    assert without_loading(slow.err) == ""
    monkeypatch.setattr(importlib, "import_module", lambda name: None)
    load_stage("extract", "pipelines.extract")
    quick = capsys.readouterr()
    assert slow.out == quick.out == quick.err == ""
