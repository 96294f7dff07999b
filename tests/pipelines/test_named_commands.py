"""The look-ups of README and docs run on a store as they are written, or name the command that makes what they need."""

import re
import shlex
import shutil
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from printed_commands import commands_in, refusal
from typer.testing import CliRunner

from feature_store import FeatureStore
from pipelines.cli import app
from sae_core.scfm import load_model

ROOT = Path(__file__).parents[2]
LOOK_UPS = ("compare", "describe", "features", "models", "plot", "runs", "sql", "verify", "export-atlas")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMED = sorted({words.strip() for page in PAGES for words in commands_in(page.read_text())})
CHANGES = ("models promote",)
"""What changes the store, and is tested on its own."""
SHOWN = [words for words in NAMED if words.startswith(LOOK_UPS) and refusal(words) is None]
SHOWN = [words for words in SHOWN if not words.startswith(CHANGES)]


def stand_ins(store):
    """What takes the place of the names that a page uses: those of the tiny store."""
    lineage = store.lineage
    return {
        **{"B cells": "A", "CELL": "cell0", "TABLE": "features", "DIR": "atlas"},
        **{"NAME": "sae-tiny-layer.1", "RUN": lineage.associations, "DATASET": lineage.dataset},
        **{"KIND": "umap", "FILE.png": "plot.png"},
    }


@pytest.fixture(scope="module")
def store(chain, tmp_path_factory):
    """A copy of the store, because plots and the atlas make the maps that it lacks."""
    return Path(shutil.copytree(chain.store, tmp_path_factory.mktemp("named") / "store"))


def test_look_ups_of_every_kind_are_named():
    assert {words.split()[0] for words in SHOWN} == set(LOOK_UPS)


@pytest.mark.parametrize("words", SHOWN)
def test_a_look_up_runs_or_names_the_command_that_makes_what_it_needs(words, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = stand_ins(FeatureStore.open(store))
    typed = [names.get(word, word) for word in shlex.split(words)]
    if "--store" in typed:
        typed = typed[: typed.index("--store")]
    done = CliRunner().invoke(app, [*typed, "--store", str(store)])
    if done.exit_code == 0:
        return
    said = f"{done.exception} {done.output}"
    commands = re.findall(r"`(scsae [^`]+)`", said)
    assert commands, said
    assert [why for command in commands if (why := refusal(command)) is not None] == []


N_CELLS = 24


def write_own_cells(path, donor):
    """Cells of 200 genes of the project's model, with obs columns that a user may have; `donor` is the name of one."""
    vocabulary = load_model("mini").vocabulary
    genes = [token for token in vocabulary.tokens if token not in vocabulary.special][:200]
    obs = pd.DataFrame(
        {
            donor: [f"donor {i % 6}" for i in range(N_CELLS)],
            "batch": [f"batch {i % 2}" for i in range(N_CELLS)],
            "cell_type": [("B cells", "T cells")[i // 2 % 2] for i in range(N_CELLS)],
            "condition": [("ctrl", "stim")[i // 4 % 2] for i in range(N_CELLS)],
        },
        index=[f"cell{i}" for i in range(N_CELLS)],
    )
    counts = np.random.default_rng(0).poisson(1.0, (N_CELLS, len(genes))).astype(np.float32)
    anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=genes)).write_h5ad(path)


def ran(words):
    """The output of a command that succeeds."""
    done = CliRunner().invoke(app, shlex.split(words))
    assert done.exit_code == 0, f"{done.exception} {done.output}"
    return done.output


def test_the_first_commands_for_ones_own_cells_run_as_the_readme_has_them(tmp_path, monkeypatch):
    """They need no checkpoint: the model is that of the project."""
    block = (ROOT / "README.md").read_text().partition("## Your own cells")[2].split("```")[1]
    inspect, extract, *_ = commands_in(f"```{block}```")
    write_own_cells(tmp_path / "cells.h5ad", "donor_id")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCSAE_STORE", "my-store")
    assert "--donor COLUMN --batch batch --cell-type cell_type" in ran(inspect), "donor_id is the name of a schema"
    ran(f"{extract} --num-actors 0")
    cells = FeatureStore.open("my-store").frame("cells").collect()
    assert cells.select("donor", "batch", "cell_type", "condition").null_count().sum_horizontal().item() == 0
    assert cells.height == N_CELLS


def test_the_command_that_inspect_ends_with_extracts_the_cells(tmp_path, monkeypatch):
    write_own_cells(tmp_path / "cells.h5ad", "donor")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCSAE_STORE", "my-store")
    (command,) = re.findall(r"next: scsae (.*)", ran("inspect cells.h5ad"))
    assert command == "extract cells.h5ad --layer 2 --donor donor --batch batch --cell-type cell_type"
    ran(f"{command} --num-actors 0")
    cells = FeatureStore.open("my-store").frame("cells").collect()
    assert cells["donor"].n_unique() == 6
    assert cells["cell_type"].unique().sort().to_list() == ["B cells", "T cells"]
