"""The whole chain on given vectors: every stage works behind them, and what would need a model says so."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from given_vectors import COLUMNS, said_by, vectors_of
from scipy.stats import rankdata
from stored_bytes import hashes_of

from feature_store import FeatureStore, plots
from feature_store.activations import ActivationReader
from feature_store.atlas.export import export
from feature_store.cells import read_cells
from feature_store.codes import CodesRun, load_cell_codes
from feature_store.errors import InputError
from feature_store.query.runs import RunChain
from feature_store.storage import commit
from feature_store.storage.layout import CODES_TABLES, Layout
from feature_store.storage.plans import ActivationsPlan
from pipelines.associate import associate, associate_all
from pipelines.baseline import baseline, encode_options
from pipelines.compare import compare_with_baselines
from pipelines.config import (
    AssociateOptions,
    BaselineOptions,
    EffectsOptions,
    EncodeOptions,
    ExtractOptions,
    InputsOptions,
    MatchOptions,
    SteerOptions,
    TrainOptions,
    check,
    load_recipe,
)
from pipelines.effects import effects
from pipelines.encode import encode
from pipelines.errors import UsageError
from pipelines.extract import extract
from pipelines.feature_inputs import inputs
from pipelines.match import match
from pipelines.recipe import run_recipe
from pipelines.steering.run import steer
from pipelines.train import train
from pipelines.verify import verify_run
from sae_core.sae import load_sae

pytestmark = pytest.mark.usefixtures("without_ray", "without_mlflow", "few_cells")

N_FEATURES, K = 32, 4


@dataclass(frozen=True, kw_only=True)
class Given:
    """Cells with vectors in their obsm, the vectors, the place of those in a file, and a store with every stage."""

    data: Path
    vectors: np.ndarray
    file: Path
    store: Path

    @property
    def options(self) -> ExtractOptions:
        return ExtractOptions(
            data=self.data,
            vectors="obsm/X_emb",
            source_name="emb-v1",
            shard_cells=16,
            dtype="f32",
            **COLUMNS,
        )

    @property
    def sae(self) -> Path:
        return Layout(self.store).latest("saes").path


@pytest.fixture(scope="module")
def given(without_ray, without_mlflow, tmp_path_factory, tiny_cells) -> Given:
    folder = tmp_path_factory.mktemp("given")
    cells, file, store = tiny_cells.copy(), folder / "emb.npy", folder / "store"
    vectors = cells.obsm["X_emb"] = vectors_of(cells)
    cells.write_h5ad(folder / "cells.h5ad")
    np.save(file, vectors)
    columns = ["--donor", "donor", "--batch", "batch", "--cell-type", "type", "--shard-cells", 16, "--dtype", "f32"]
    named = ["--vectors", "obsm/X_emb", "--source-name", "emb-v1", "--store", store]
    assert "12 numbers a cell, obsm/X_emb" in said_by("extract", folder / "cells.h5ad", *named, *columns)
    steps = ["--n-features", N_FEATURES, "--k", K, "--n-steps", 80, "--batch-size", 32, "--num-workers", 0]
    said = " ".join(said_by("train", "--store", store, *steps).split())
    assert "not measured: activations/" in said
    assert "given vectors" in said
    said_by("encode", "--store", store)
    said_by("associate", "--store", store)
    return Given(data=folder / "cells.h5ad", vectors=vectors, file=file, store=store)


@pytest.fixture
def own_store(given, tmp_path) -> Path:
    return Path(shutil.copytree(given.store, tmp_path / "own"))


def codes_of(run: Path, cells: int = 72) -> np.ndarray:
    return load_cell_codes(CodesRun.open(run), np.arange(cells)).toarray()


def encoded(given: Given, vectors: np.ndarray) -> np.ndarray:
    return load_sae(given.sae).encode(torch.from_numpy(vectors)).to_dense().numpy()


def test_an_extraction_holds_the_vectors_one_row_a_cell_under_the_name_that_was_given(given):
    run = commit.Run.open(Layout(given.store).latest("activations").path)
    plan, reader = ActivationsPlan.of(run), ActivationReader(run)
    blocks = [reader.read(group.shard, group.group) for group in reader.row_groups]
    np.testing.assert_array_equal(np.concatenate([block.act for block in blocks]), given.vectors)
    np.testing.assert_array_equal(np.concatenate([block.cell_idx for block in blocks]), np.arange(72))
    assert (plan.origin, plan.model, plan.site, plan.d_model, plan.readout) == (
        "vectors",
        "emb-v1",
        "vectors",
        12,
        None,
    )


def test_codes_are_those_of_the_vectors_and_features_know_the_types(given):
    layout = Layout(given.store)
    found = codes_of(layout.latest("codes").path)
    np.testing.assert_allclose(found, encoded(given, given.vectors), rtol=1e-4, atol=1e-5)
    cells = read_cells(layout.latest("cells").path)
    best = FeatureStore.open(given.store).features_for(label="A").row(0, named=True)
    test = cells.filter(split="test")
    values, is_a = found[test["cell_idx"].to_numpy(), best["feature_id"]], (test["cell_type"] == "A").to_numpy()
    n, n_a = len(values), is_a.sum()
    u = rankdata(values)[is_a].sum() - n_a * (n_a + 1) / 2
    assert best["auroc"] == pytest.approx(u / (n_a * (n - n_a)))
    assert best["auroc"] > 0.9
    genes = FeatureStore.open(given.store).sql("SELECT max(identity_recall) AS recall, count(*) AS n FROM feature_gene")
    assert not genes["recall"].item(), "a whole cell identifies no gene"
    assert genes["n"].item(), "and its expression is correlated all the same"


def test_the_same_vectors_in_a_file_are_the_same_run_and_others_are_another(given, own_store):
    same = given.options.model_copy(update={"vectors": str(given.file)})
    (first,) = extract(given.options, own_store)
    (again,) = extract(same, own_store)
    assert (again.run, again.done, again.reused) == (first.run, 0, 5)
    changed = given.vectors.copy()
    changed[40, 3] += 0.01
    np.save(own_store.parent / "changed.npy", changed)
    (other,) = extract(same.model_copy(update={"vectors": str(own_store.parent / "changed.npy")}), own_store)
    assert (other.run == first.run, other.done) == (False, 5)
    (unnamed,) = extract(same.model_copy(update={"source_name": None}), own_store)
    assert unnamed.facts["said to be of"] == "emb"


def test_a_killed_extraction_resumes_with_the_same_bytes(given, tmp_path, monkeypatch):
    (whole,) = extract(given.options, tmp_path / "whole")

    def killed(worker, work, shards, *_args, **_options):
        for shard in shards[:2]:
            worker(work).shard(shard)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.external.extraction.do_shards", killed)
        with pytest.raises(KeyboardInterrupt):
            extract(given.options, tmp_path / "killed")
    (resumed,) = extract(given.options, tmp_path / "killed")
    assert (resumed.run, resumed.done, resumed.reused) == (whole.run, 3, 2)
    assert hashes_of(resumed.path) == hashes_of(whole.path)


def steered(store, **options):
    return steer(SteerOptions(n_nulls=2, n_features=3, **options), store)


def embeddings(run: Path, condition: str) -> tuple[np.ndarray, np.ndarray]:
    variant = commit.read_table(run / "variants").filter(name=condition, draw=0)["variant"][0]
    frame = commit.read_table(run / "per_cell").filter(variant=variant).sort("cell_idx")
    return frame["cell_idx"].to_numpy(), frame["embedding"].to_numpy()


def test_steering_edits_the_vectors_themselves_and_says_so(given, own_store):
    done = steered(own_store, target="A")
    assert "the given vectors of emb-v1 themselves" in done.facts["steered"]
    features = done.facts["features"]
    cells, found = embeddings(done.path, "ablate")
    sae, x = load_sae(given.sae), torch.from_numpy(given.vectors[cells])
    z = sae.encode(x).to_dense()
    edited = z.clone()
    edited[:, features] = 0
    np.testing.assert_allclose(found, (x + (edited - z) @ sae.W_dec).numpy(), rtol=1e-4, atol=1e-4)
    _, unsteered = embeddings(done.path, "unsteered")
    assert {row.tobytes() for row in unsteered} <= {row.tobytes() for row in given.vectors}


@pytest.mark.slow
def test_a_move_is_drawn_and_the_atlas_says_what_was_steered(own_store):
    moved = steered(own_store, kind="batch", target="b0", toward="b1")
    assert np.isfinite(moved.facts["remaining"])
    store = FeatureStore.open(own_store)
    plots.dotplot(store, [0, 1], save=own_store.parent / "dots.png")
    plots.steering_bars(store, save=own_store.parent / "bars.png")
    export(store, own_store.parent / "atlas")
    said = "".join(path.read_text() for path in (own_store.parent / "atlas").rglob("*.json"))
    assert "one given vector a cell" in said
    assert "the steered vector itself" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head": True}, "--head"),
        ({"gene": ("GENE1",)}, "--gene"),
        ({"readout": "cls"}, "--readout cls"),
        ({"kind": "batch", "target": "b0", "toward": "b1", "by": "gene"}, "--by gene"),
    ],
)
def test_steering_refuses_what_needs_tokens_or_a_model(given, options, words):
    with pytest.raises(UsageError, match=f"{words}.*no tokens of genes, and there is no model"):
        steer(SteerOptions(**{"target": "A", **options}), given.store)


@pytest.mark.parametrize(
    ("stage", "options", "words"),
    [
        (effects, EffectsOptions(), "a feature changes a vector by its decoder row"),
        (inputs, InputsOptions(), "a vector has no genes that could be left out"),
    ],
)
def test_what_runs_the_model_behind_a_feature_refuses_given_vectors_and_writes_nothing(given, stage, options, words):
    with pytest.raises(UsageError, match=f"given vectors, and no model stands behind them: {words}.*--sae"):
        stage(options, given.store)
    assert not Layout(given.store).kind_dir(stage.__name__).exists()


def test_baselines_and_matches_work_and_a_random_model_is_refused(given, own_store):
    made = baseline(BaselineOptions(kind=("random",)), own_store)
    assert [result.kind for result in made] == ["saes", "codes", "associations"]
    assert compare_with_baselines(own_store).representation["representation"].to_list() == ["sae", "random"]
    (matched,) = match(MatchOptions(other=(made[0].run,)), own_store)
    assert matched.done
    with pytest.raises(UsageError, match=r"random-model, but activations/\w+ of emb-v1 are given vectors"):
        baseline(BaselineOptions(kind=("random-model",)), own_store)


def test_a_recipe_runs_every_stage_and_a_submitted_one_needs_an_absolute_file(given, own_store, tmp_path):
    from pipelines.runtime.job_submission import refuse_relative

    text = "extract: {data: DATA, vectors: VECTORS, source_name: emb-v1, donor: donor, batch: batch, cell_type: type,"
    text += " shard_cells: 16, dtype: f32}\n"
    text += "train: {n_features: 32, k: 4, n_steps: 80, batch_size: 32, num_workers: 0}\nencode: {}\nassociate: {}\n"
    recipe = tmp_path / "recipe.yaml"
    for place, is_refused in (("obsm/X_emb", False), ("emb.npy", True), (str(given.file), False)):
        recipe.write_text(text.replace("DATA", str(given.data)).replace("VECTORS", place))
        checked = load_recipe(recipe)
        if is_refused:
            with pytest.raises(UsageError, match=r"extract\.vectors was 'emb\.npy', a relative path"):
                refuse_relative(checked, "/store")
            continue
        refuse_relative(checked, "/store")
        assert [result.done for result in run_recipe(checked, own_store)] == [0, 0, 0, 0]


def test_fused_codes_are_byte_for_byte_those_of_the_stored_vectors_wherever_data_and_vectors_are(
    given, own_store, tmp_path
):
    stored = encode(EncodeOptions(), own_store)
    data, file = tmp_path / "moved.h5ad", tmp_path / "moved.npy"
    shutil.copy(given.data, data)
    layout = Layout(own_store)
    fused = encode(EncodeOptions(fused=True, shard_cells=16, data=data), own_store)
    for table in CODES_TABLES:
        parts = [commit.Run.open(run.path / table).manifest().shards for run in (fused, stored)]
        assert [one.sha256 for one in parts[0]] == [one.sha256 for one in parts[1]], table
    assert fused.run != stored.run
    shutil.copy(given.file, file)
    extract(given.options.model_copy(update={"vectors": str(file)}), own_store)
    file.rename(tmp_path / "renamed.npy")
    with pytest.raises(UsageError, match=r"moved\.npy is not there.*scsae encode --vectors PATH/vectors\.npy"):
        encode(EncodeOptions(fused=True, shard_cells=16), own_store)
    with pytest.raises(UsageError, match=r"moved\.npy is not there"):
        encode(EncodeOptions(fused=True), own_store)
    again = encode(EncodeOptions(vectors=str(tmp_path / "renamed.npy")), own_store)
    assert (again.run, again.done) == (stored.run, 0)
    assert encode(EncodeOptions(fused=True, shard_cells=16), own_store).run == fused.run
    associate(AssociateOptions(codes=fused.run), own_store)
    (tmp_path / "renamed.npy").unlink()
    with pytest.raises(UsageError, match=rf"vectors of codes/{fused.run} are read again, but .*renamed\.npy"):
        steered(own_store, target="A", associations=layout.latest("associations").run)


def test_other_cells_are_encoded_by_their_own_vectors_associated_and_steered(given, own_store, tmp_path, tiny_cells):
    other = tiny_cells[::-1][:60].copy()
    other.X = other.X[:, ::-1].copy()
    other.obs_names = [f"new{i}" for i in range(60)]
    vectors = vectors_of(other) + 0.1
    other.obsm["X_emb"] = vectors
    other.write_h5ad(tmp_path / "other.h5ad")
    done = encode(EncodeOptions(data=tmp_path / "other.h5ad", **COLUMNS), own_store)
    np.testing.assert_allclose(codes_of(done.path, 60), encoded(given, vectors), rtol=1e-4, atol=1e-5)
    np.save(tmp_path / "other.npy", vectors)
    in_file = EncodeOptions(data=tmp_path / "other.h5ad", vectors=str(tmp_path / "other.npy"), **COLUMNS)
    assert encode(in_file, own_store).run == done.run
    associated = associate(AssociateOptions(codes=done.run), own_store)
    result = steered(own_store, target="A", associations=associated.run)
    cells, found = embeddings(result.path, "unsteered")
    np.testing.assert_array_equal(found, vectors[cells])
    recalled = encode_options(
        Layout(own_store), RunChain.of(Layout(own_store), associated.run), "sae", BaselineOptions()
    )
    assert (recalled.vectors, recalled.data) == (in_file.vectors, (tmp_path / "other.h5ad",))
    np.save(tmp_path / "other.npy", vectors * 2)
    with pytest.raises(UsageError, match=r"the vectors in .*other\.npy changed"):
        steered(own_store, target="B", associations=associated.run)
    np.save(tmp_path / "narrow.npy", vectors[:, :5])
    narrow = in_file.model_copy(update={"vectors": str(tmp_path / "narrow.npy")})
    with pytest.raises(UsageError, match=r"narrow\.npy has vectors of 5 numbers, and the SAE was trained on 12"):
        encode(narrow, own_store)


def test_an_sae_of_a_file_needs_the_vectors_of_other_cells_by_name(given, own_store, tmp_path, tiny_cells):
    extract(given.options.model_copy(update={"vectors": str(given.file)}), own_store)
    tiny_cells[:40].copy().write_h5ad(tmp_path / "other.h5ad")
    n_runs = len(Layout(own_store).runs("cells"))
    for call in (
        lambda: encode(EncodeOptions(data=tmp_path / "other.h5ad"), own_store),
        lambda: associate_all(AssociateOptions(data=tmp_path / "other.h5ad"), own_store),
    ):
        with pytest.raises(UsageError, match=r"name the vectors of .*other\.h5ad from the same model"):
            call()
    with pytest.raises(UsageError, match="tokens_per_cell apply to the forward pass of a model"):
        encode(EncodeOptions(fused=True, tokens_per_cell=4), own_store)
    assert len(Layout(own_store).runs("cells")) == n_runs


def test_an_sae_of_a_sample_encodes_the_vectors_of_all_cells(given, tmp_path):
    extract(given.options.model_copy(update={"cells": 40}), tmp_path)
    assert ActivationReader(commit.Run.open(Layout(tmp_path).latest("activations").path)).n_tokens == 40
    options = {"n_features": N_FEATURES, "k": K, "n_steps": 5, "batch_size": 16, "num_workers": 0}
    sae = train(TrainOptions(**options), tmp_path)
    done = encode(EncodeOptions(), tmp_path)
    wanted = load_sae(sae.path).encode(torch.from_numpy(given.vectors)).to_dense().numpy()
    np.testing.assert_allclose(codes_of(done.path), wanted, rtol=1e-4, atol=1e-5)


def test_verify_compares_the_vectors_too(given, own_store, tmp_path, capsys):
    file = shutil.copy(given.file, tmp_path / "emb.npy")
    (done,) = extract(given.options.model_copy(update={"vectors": str(file)}), own_store)
    for kind in ("cells", "activations", "saes", "codes", "associations"):
        assert verify_run(Layout(own_store).latest(kind).run, own_store) == 0
    np.save(file, given.vectors + 1)
    assert verify_run(done.run, own_store) == 1
    assert f"{file} changed since activations/{done.run}" in capsys.readouterr().err
    Path(file).unlink()
    assert verify_run(done.run, own_store) == 0
    assert "not there, so the vectors were not compared" in capsys.readouterr().err


@pytest.mark.slow
def test_vectors_are_refused_for_an_sae_of_a_model(given, chain_of_a_model, tmp_path):
    with pytest.raises(UsageError, match=r"the SAE was trained on layer\.1 of tiny, not on given vectors"):
        encode(EncodeOptions(vectors=str(given.file)), chain_of_a_model)


@pytest.fixture
def chain_of_a_model(tmp_path, extract_options) -> Path:
    """A store with an SAE of the activations of a model."""
    extract(extract_options, tmp_path)
    train(TrainOptions(n_features=N_FEATURES, k=K, n_steps=2, batch_size=16, recovery_cells=0, num_workers=0), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("given_options", "words"),
    [
        ({"model": "mini"}, "no model runs, so that model would change nothing"),
        ({"layer": ("2",)}, "no model runs, so that layer"),
        ({"readout": "mean"}, "readout"),
        ({"tokens_per_cell": 5, "random_init": True}, "random_init, tokens_per_cell"),
        ({"source_name": " "}, "give a name of printable characters"),
        ({"vectors": "emb.csv"}, r"'emb\.csv' names no vectors; give obsm/KEY"),
        ({"vectors": "obsm/"}, "names no vectors"),
        ({"vectors": "emb.npy:key"}, "names no vectors"),
        ({"vectors": None, "source_name": "UCE"}, "source_name was 'UCE', which names given vectors"),
    ],
)
def test_options_that_contradict_each_other_are_refused(given_options, words):
    values = {"data": "x.h5ad", "vectors": "emb.npy", **given_options}
    with pytest.raises(UsageError, match=words):
        check(ExtractOptions, {name: value for name, value in values.items() if value is not None}, "scsae extract")


@pytest.mark.parametrize(
    ("vectors", "words"),
    [
        ("obsm/X_uce", r"no obsm/X_uce; its obsm has X_emb"),
        ("none.npy", r"no file .*none\.npy"),
        ("short.npy", r"short\.npy has 71 vectors"),
        ("nan.npy", r"nan\.npy, row 5 \(cell 'cell5'\)"),
        ("large.npy", "--dtype f32"),
    ],
)
def test_bad_vectors_are_refused_before_anything_is_written(given, tmp_path, vectors, words):
    bad = {"short": given.vectors[:-1], "nan": given.vectors.copy(), "large": given.vectors * 1e6}
    bad["nan"][5, 2] = np.nan
    for name, values in bad.items():
        np.save(tmp_path / f"{name}.npy", values)
    place = vectors if vectors.startswith("obsm/") else str(tmp_path / vectors)
    with pytest.raises(InputError, match=words):
        extract(ExtractOptions(data=given.data, vectors=place), tmp_path / "store")
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]


def test_probes_and_modules_take_the_codes_of_given_vectors(own_store):
    from feature_store.query.probes import PERMUTED, SAE
    from pipelines.config import ModulesOptions, ProbeOptions
    from pipelines.modules import modules
    from pipelines.probe import probe_labels

    probed = probe_labels(ProbeOptions(k=(1, 2), genes=0), own_store)
    scores = commit.read_table(probed.path / "probe_score").filter(pl.col("label").is_null())
    assert scores["representation"].to_list() == [SAE, SAE, PERMUTED, PERMUTED]
    assert scores.filter(representation=SAE, k=2)["auroc"].item() > 0.8
    found = modules(ModulesOptions(n_resamples=3, n_draws=20), own_store)
    assert "of shuffled codes" in " ".join(found.facts)
