"""Cells that an SAE of given vectors never saw, from the command line: associated, held against baselines, matched."""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from given_vectors import COLUMN_OPTIONS, COLUMNS, refused_by, said_by, vectors_of
from safetensors.numpy import load_file
from scipy.stats import rankdata

import scsae
from feature_store.cells import read_cells
from feature_store.codes import CodesRun, load_cell_codes
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from pipelines.compare import compare_with_baselines
from pipelines.verify import verify_run

pytestmark = pytest.mark.usefixtures("without_ray", "without_mlflow", "few_cells")

STEPS = ("--n-features", 32, "--k", 4, "--n-steps", 80, "--batch-size", 32, "--num-workers", 0)
OF_B = ("--data", "b.h5ad", "--vectors", "b.npy", *COLUMN_OPTIONS)


@dataclass(frozen=True, kw_only=True)
class Two:
    """A folder with two data sets and a file of vectors of each, and a store with an SAE of each of the vectors."""

    folder: Path
    sae_a: str
    sae_b: str

    @property
    def layout(self) -> Layout:
        return Layout(self.folder / "store")


def newest(folder: Path, kind: str) -> str:
    return Layout(folder / "store").latest(kind).run


@pytest.fixture(scope="module")
def made(without_ray, without_mlflow, tmp_path_factory, tiny_cells) -> Two:
    folder = tmp_path_factory.mktemp("two")
    other = tiny_cells[::-1][:60].copy()
    other.X = other.X[:, ::-1].copy()
    other.obs_names = [f"new{i}" for i in range(60)]
    saes = []
    # careful: a copy of the store knows the files of this folder until a command names others
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SCSAE_STORE", "store")
        for seed, (name, cells) in enumerate({"a": tiny_cells, "b": other}.items()):
            cells.write_h5ad(f"{name}.h5ad")
            np.save(f"{name}.npy", vectors_of(cells))
            stored = ("--source-name", "emb", "--shard-cells", 16, "--dtype", "f32", *COLUMN_OPTIONS)
            said_by("extract", f"{name}.h5ad", "--vectors", f"{name}.npy", *stored)
            said_by("train", *STEPS, "--seed", seed)
            saes.append(newest(folder, "saes"))
        said_by("associate", "--sae", saes[0], *OF_B)
    return Two(folder=folder, sae_a=saes[0], sae_b=saes[1])


@pytest.fixture
def two(made, tmp_path, monkeypatch) -> Two:
    """A copy of it, which is the working folder, and in which its data and vectors are."""
    folder = Path(shutil.copytree(made.folder, tmp_path / "two"))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SCSAE_STORE", "store")
    said_by("encode", "--sae", made.sae_a, *OF_B)
    return Two(folder=folder, sae_a=made.sae_a, sae_b=made.sae_b)


def dense(folder: Path, n_cells: int = 60) -> np.ndarray:
    return load_cell_codes(CodesRun.open(folder), np.arange(n_cells)).toarray()


def test_associate_encodes_the_vectors_that_it_is_given_and_is_of_those_cells(two):
    run, layout = newest(two.folder, "associations"), two.layout
    plan = commit.Run.open(layout.associations_dir(run) / "features").plan
    assert (plan["sae"], plan["dataset"]) == (two.sae_a, CodesRun.open(layout.latest("codes").path).plan.dataset)
    codes = dense(layout.latest("codes").path)
    found = commit.read_table(layout.associations_dir(run) / "feature_label")
    row = (
        found.filter(label_kind="cell_type", label="A", split="test").sort("auroc", descending=True).row(0, named=True)
    )
    test = read_cells(layout.cells_dir(plan["dataset"])).filter(split="test")
    values = codes[test["cell_idx"].to_numpy(), row["feature_id"]]
    is_a = (test["cell_type"] == "A").to_numpy()
    u = rankdata(values)[is_a].sum() - is_a.sum() * (is_a.sum() + 1) / 2
    assert row["auroc"] == pytest.approx(u / (is_a.sum() * (~is_a).sum()))
    again = said_by("encode", "--sae", two.sae_a, *OF_B)
    assert re.search(r"done now +0 ", again)


def test_vectors_of_other_data_are_refused_where_they_cannot_be_those(two, tiny_cells):
    without = refused_by("associate", "--sae", two.sae_a, "--data", "b.h5ad", *COLUMN_OPTIONS)
    assert "name the vectors of b.h5ad from the same model: --data DATA --vectors PATH/vectors.npy" in without
    assert "vectors apply to other data only" in refused_by("associate", "--vectors", "b.npy")
    run = newest(two.folder, "codes")
    assert f"codes was '{run}'" in refused_by("associate", "--codes", run, "--vectors", "b.npy", "--data", "b.h5ad")
    np.save("short.npy", np.zeros((3, 12), np.float32))
    short = refused_by("associate", "--sae", two.sae_a, "--data", "b.h5ad", "--vectors", "short.npy")
    assert "short.npy has 3 vectors" in short
    cells = tiny_cells.copy()
    cells.obsm["X_emb"] = vectors_of(cells)
    cells.write_h5ad("c.h5ad")
    said_by("extract", "c.h5ad", "--vectors", "obsm/X_emb", "--store", "of-obsm")
    said_by("train", *STEPS, "--store", "of-obsm")
    lacks = refused_by("associate", "--data", "b.h5ad", "--store", "of-obsm")
    assert re.search(r"b\.h5ad has no obsm/X_emb; .*the SAE was trained on obsm/X_emb.*--vectors PATH/vectors", lacks)


def test_a_run_of_other_vectors_is_steered_and_held_against_its_own_baselines(two):
    own = newest(two.folder, "associations")
    said_by("steer", "--target", "A", "--n-nulls", 2, "--n-features", 3)
    shown = " ".join(said_by("baseline", "--kind", "random").split())
    assert "AUROC on test cells" in shown
    (of_random,) = compare_with_baselines(two.layout.root, own).representation.filter(representation="random").rows()
    assert verify_run(newest(two.folder, "codes"), two.layout.root) == 0
    # other vectors of the same cells have other baselines
    np.save("b2.npy", np.load("b.npy") * 2)
    said_by("associate", "--sae", two.sae_a, "--data", "b.h5ad", "--vectors", "b2.npy", *COLUMN_OPTIONS)
    other = newest(two.folder, "associations")
    assert "no baseline to compare with" in refused_by("compare")
    said_by("baseline", "--kind", "random")
    twice = compare_with_baselines(two.layout.root, other).representation
    assert twice.filter(representation="random").row(0) != of_random


def test_a_baseline_does_not_take_vectors_that_changed_and_finds_files_that_moved(two):
    np.save("b.npy", np.load("b.npy") + 1)
    n_runs = len(two.layout.runs("saes"))
    assert re.search(r"the vectors in .*b\.npy changed since codes/", refused_by("baseline", "--kind", "random"))
    assert verify_run(newest(two.folder, "codes"), two.layout.root) == 1
    np.save("b.npy", np.load("b.npy") - 1)
    Path("b.npy").rename("elsewhere.npy")
    moved = refused_by("baseline", "--kind", "random")
    assert re.search(r"b\.npy is not there.*`scsae encode --vectors PATH/vectors\.npy`", moved)
    assert len(two.layout.runs("saes")) == n_runs


def test_the_files_of_other_cells_may_move(two):
    Path("b.h5ad").rename("moved.h5ad")
    assert re.search(r"b\.h5ad is not there.*scsae baseline --data NEWPATH", refused_by("baseline", "--kind", "random"))
    said_by("baseline", "--kind", "random", "--data", "moved.h5ad")
    said_by("steer", "--target", "A", "--n-nulls", 2, "--n-features", 3)


def test_saes_of_two_sets_of_vectors_are_matched_by_the_commands_of_the_error(two):
    said_by("encode", "--sae", two.sae_b)
    shutil.rmtree(two.layout.associations_dir(newest(two.folder, "associations")))
    pair = ("match", "--sae", two.sae_b, "--other", two.sae_a)
    said = said_by(*pair)
    assert "pearson correlation of the cell codes" in said, "a.npy was encoded by one and b.npy by both"
    cosine = said_by(*pair, "--method", "cosine")
    assert "cosine of decoder rows" in cosine
    rows = [load_file(two.layout.saes_dir(sae) / "sae.safetensors")["W_dec"] for sae in (two.sae_b, two.sae_a)]
    b, a = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in rows)
    found = commit.read_table(two.layout.latest("matches").path / "feature_match").filter(sae=two.sae_b)
    found = found.filter(~pl.col("dead")).sort("feature_id")
    best = (b @ a.T)[found["feature_id"].to_numpy()][:, found["other_feature_id"].to_numpy()]
    np.testing.assert_allclose(found["similarity"], np.diag(best), rtol=1e-4)


@pytest.mark.slow
def test_an_sae_of_recorded_tokens_is_matched_on_the_cells_that_were_recorded(two):
    rng = np.random.default_rng(0)
    with scsae.ActivationWriter("store", "a.h5ad", name="net", d_model=6, **COLUMNS) as writer:
        writer.write(np.repeat(np.arange(72), 3), rng.integers(0, 30, 216), rng.normal(size=(216, 6)))
    said_by("train", *STEPS)
    recorded = newest(two.folder, "saes")
    for _ in range(2):
        said = refused_by("match", "--sae", recorded, "--other", two.sae_a)
        command = re.findall(r"`scsae ([^`]*)`", said)[0]
        assert "--data" not in command, "sae_a has codes of b, which nobody recorded"
        said_by(*shlex.split(command))
    assert "pearson correlation" in said_by("match", "--sae", recorded, "--other", two.sae_a)
    with scsae.ActivationWriter("store", "b.h5ad", name="other", d_model=6, **COLUMNS) as writer:
        writer.write(np.arange(60), np.zeros(60, int), rng.normal(size=(60, 6)))
    said_by("train", *STEPS)
    said = refused_by("match", "--sae", recorded, "--other", newest(two.folder, "saes"))
    assert "tokens that another program recorded are of other cells" in said


def test_the_command_that_a_match_names_has_the_vectors_that_the_store_knows(made, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(made.folder, tmp_path / "two"))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SCSAE_STORE", "store")
    shutil.rmtree("store/codes")
    shutil.rmtree("store/associations")
    shutil.rmtree("store/commits")
    said = refused_by("match", "--sae", made.sae_b, "--other", made.sae_a)
    commands = re.findall(r"`scsae ([^`]*)`", said)
    (other,) = [one for one in commands if "--data" in one]
    assert re.search(r"--vectors \S*/[ab]\.npy", other)
    for command in commands:
        said_by(*shlex.split(command))
    assert "pearson correlation of the cell codes" in said_by("match", "--sae", made.sae_b, "--other", made.sae_a)
