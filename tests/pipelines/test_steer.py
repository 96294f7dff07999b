"""Steering: doing nothing is exactly nothing, choices come from select cells, nulls match, and all is logged once."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from feature_store import commit, ingest
from feature_store.errors import NotFoundError
from feature_store.layout import Layout
from pipelines.config import SteerOptions
from pipelines.effects import METRICS
from pipelines.errors import UsageError
from pipelines.stage import StageResult
from pipelines.steer import NULLS, Steerer, choose_features, make_conditions, steer
from pipelines.tracking import Tracking
from sae_core.sae import SparseCodes, load_sae
from sae_core.scfm import load_model
from sae_core.steering import random_direction

pytestmark = pytest.mark.ray

ABLATE = SteerOptions(kind="cell_type", target="A", n_features=(3,), n_nulls=4)
SITE = "layer.1"


@dataclass(frozen=True, kw_only=True)
class Steered:
    """A store with two steering runs: features of type A ablated, and the same features scaled by 1."""

    store: Path
    ablated: StageResult
    idle: StageResult


@pytest.fixture(scope="module")
def steered(chain, tmp_path_factory, shards_here):
    store = Path(shutil.copytree(chain.store, tmp_path_factory.mktemp("steered") / "store"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.steer.do_shards", shards_here)
        patch.setattr("pipelines.steer.SHARD_CELLS", 16)
        idle = ABLATE.model_copy(update={"intervention": "scale", "dose": (1.0,)})
        return Steered(store=store, ablated=steer(ABLATE, store), idle=steer(idle, store))


def embeddings(result, condition, draw=0):
    """cell_idx and embeddings of one condition, by cell."""
    frame = pl.concat([pl.read_parquet(part) for part in sorted((result.path / "per_cell").glob("part-*.parquet"))])
    own = frame.filter(condition=condition, draw=draw).sort("cell_idx")
    return own["cell_idx"].to_list(), own["embedding"].to_numpy()


def cells_of(store):
    return ingest.read_cells(next(path for path in (store / "cells").iterdir()))


def embed(chain, cells, patch=None):
    """Embedding of some cells straight from the model, one cell at a time, with a dense patch of gene tokens."""
    model = load_model(chain.extract.model)
    source = ingest.open_source(chain.extract.data)
    match = model.match_genes(source.gene_symbols)

    def on_genes(x, info):
        return torch.where(info.is_special[:, None], x, patch(x))

    out = []
    for cell in cells:
        rows = source.read_rows(cell, cell + 1)
        tokens = model.tokenize(rows.indptr, rows.indices, rows.data, match, seed=0)
        out.append(model.embed(tokens, patches={SITE: on_genes} if patch else None))
    return torch.cat(out).numpy()


def results(result):
    return commit.read_table(result.path / "results")


def test_scaling_by_one_gives_bit_for_bit_the_unsteered_embedding_and_exactly_no_effect(steered):
    cells, unsteered = embeddings(steered.idle, "unsteered")
    at, scaled = embeddings(steered.idle, "scale")
    np.testing.assert_array_equal(scaled.view(np.uint32), unsteered[np.isin(cells, at)].view(np.uint32))
    effect = results(steered.idle).filter(condition="scale")
    assert effect["metric"].to_list() == list(METRICS)
    assert effect.select("effect", "low", "high").to_numpy().tolist() == [[0.0, 0.0, 0.0]] * len(METRICS)
    assert effect.select(f"p_{null}" for null in NULLS).to_numpy().min() == 1.0


def test_ablation_does_change_the_embedding(steered):
    cells, unsteered = embeddings(steered.ablated, "unsteered")
    at, ablated = embeddings(steered.ablated, "ablate")
    assert np.abs(ablated - unsteered[np.isin(cells, at)]).max() > 1e-3


def test_unsteered_embeddings_are_the_models_own(steered, chain):
    cells, stored = embeddings(steered.ablated, "unsteered")
    np.testing.assert_allclose(stored, embed(chain, cells), atol=1e-5)


def test_every_condition_embeds_the_test_cells_and_none_a_select_cell(steered):
    frame = pl.concat([pl.read_parquet(part) for part in (steered.ablated.path / "per_cell").glob("part-*.parquet")])
    split = cells_of(steered.store).select("cell_idx", "split")
    for (condition, _), own in frame.join(split, on="cell_idx").group_by("condition", "draw"):
        wanted = split.filter(pl.col("split").is_in(["train", "test"] if condition == "unsteered" else ["test"]))
        assert sorted(own["cell_idx"]) == wanted["cell_idx"].to_list(), condition


@pytest.mark.parametrize("condition", ["ablate", "ablate, replace", "reconstruction", "random direction"])
def test_a_condition_is_the_dense_formula_applied_to_the_gene_tokens_at_the_saes_site(steered, chain, condition):
    sae = load_sae(Layout(steered.store).latest("saes").path)
    features = list(commit.Run.open(steered.ablated.path / "per_cell").plan["features"])

    def decode(z):
        return sae.decode(SparseCodes.from_dense(z))

    def patch(x):
        z = sae.encode(x).to_dense()
        ablated = z.clone()
        ablated[:, features] = 0
        step = decode(ablated) - decode(z)
        match condition:
            case "ablate":
                return x + step
            case "ablate, replace":
                return decode(ablated)
            case "reconstruction":
                return decode(z)
            case _:
                return x + step.norm(dim=1, keepdim=True) * random_direction(16, seed=2)

    at, stored = embeddings(steered.ablated, condition, draw=2 if condition == "random direction" else 0)
    assert len(at) > 0
    np.testing.assert_allclose(stored, embed(chain, at, patch), atol=2e-5)


@pytest.mark.parametrize(("intervention", "dose"), [("clamp", 2.0), ("add", 0.5), ("scale", 3.0)])
def test_a_dose_is_in_units_of_the_features_99th_percentile_and_a_scale_is_a_factor(
    chain, own_store, without_actors, intervention, dose
):
    options = ABLATE.model_copy(update={"intervention": intervention, "dose": (dose,)})
    found = steer(options, own_store)
    sae = load_sae(Layout(own_store).latest("saes").path)
    table = commit.read_table(Layout(own_store).latest("associations").path / "features")
    features = list(commit.Run.open(found.path / "per_cell").plan["features"])
    unit = torch.tensor([table.filter(feature_id=f)["p99"].item() for f in features], dtype=torch.float32) * dose

    def patch(x):
        z = sae.encode(x).to_dense()
        edited = z.clone()
        edited[:, features] = {"clamp": unit, "add": z[:, features] + unit, "scale": dose * z[:, features]}[
            intervention
        ]
        return x + sae.decode(SparseCodes.from_dense(edited)) - sae.decode(SparseCodes.from_dense(z))

    at, stored = embeddings(found, intervention)
    np.testing.assert_allclose(stored, embed(chain, at, patch), atol=2e-5)


@pytest.fixture
def tables(chain):
    folder = Layout(chain.store).latest("associations").path
    return commit.read_table(folder / "feature_label"), commit.read_table(folder / "features")


def test_features_are_the_living_ones_with_the_smallest_p_on_select_cells(steered, tables):
    labels, features = tables
    dead = {row["feature_id"] for row in features.iter_rows(named=True) if row["dead"]}
    select = [
        (row["p"], row["feature_id"])
        for row in labels.filter(label_kind="cell_type", label="A", split="select").iter_rows(named=True)
        if row["auroc"] > 0.5 and row["feature_id"] not in dead
    ]
    chosen = commit.Run.open(steered.ablated.path / "per_cell").plan["features"]
    assert chosen == [feature for _, feature in sorted(select)[:3]]


def test_what_is_true_on_test_cells_does_not_change_the_choice(tables):
    labels, features = tables
    spoiled = labels.with_columns(
        p=pl.when(split="test").then(1 - pl.col("p")).otherwise("p"),
        auroc=pl.when(split="test").then(1 - pl.col("auroc")).otherwise("auroc"),
    )
    for options in (ABLATE, SteerOptions(kind="cell_type")):
        kinds = ["cell_type"]
        expected = choose_features(labels, features, options, kinds=kinds)
        assert choose_features(spoiled, features, options, kinds=kinds) == expected


def test_without_a_target_the_label_of_the_best_feature_is_taken(tables):
    labels, features = tables
    best = labels.filter(pl.col("auroc") > 0.5, label_kind="cell_type", split="select").sort("p", "feature_id")
    target, _ = choose_features(labels, features, SteerOptions(), kinds=["cell_type"])
    assert target == best["label"][0]


def test_null_features_are_living_matched_in_density_and_never_the_targets(steered, tables):
    _, features = tables
    chosen = tuple(commit.Run.open(steered.ablated.path / "per_cell").plan["features"])
    density = dict(features.select("feature_id", "density").iter_rows())
    nulls = [c for c in make_conditions(ABLATE, chosen, features) if c.name == "random features"]
    assert [c.draw for c in nulls] == [0, 1, 2, 3]
    assert len({c.features for c in nulls}) > 1
    for null in nulls:
        assert len(set(null.features)) == len(chosen)
        assert not set(null.features) & set(chosen)
        for target, pick in zip(chosen, null.features, strict=True):
            others = [f for f, d in density.items() if d > 0 and f not in chosen]
            distance = {f: abs(np.log(density[f]) - np.log(density[target])) for f in others}
            nearer = sum(d < distance[pick] for d in distance.values())
            # the nearest ten, those apart that the other targets took before
            assert nearer < 10 + len(chosen) - 1, (target, pick)


def test_results_hold_every_condition_and_metric_once(steered):
    frame = results(steered.ablated)
    conditions = ["unsteered", "ablate", "ablate, replace", "reconstruction", "random features", "random direction"]
    expected = {(condition, metric) for condition in conditions for metric in METRICS}
    assert frame.height == len(expected)
    assert set(frame.select("condition", "metric").iter_rows()) == expected
    assert set(frame.filter(pl.col("condition").is_in(NULLS))["n_draws"]) == {4}
    assert frame.filter(condition="unsteered")["effect"].to_list() == [0.0] * len(METRICS)
    test = cells_of(steered.store).filter(split="test")
    n_cells = dict(frame.filter(condition="ablate").select("metric", "n_cells").iter_rows())
    assert n_cells["target_votes"] == (test["cell_type"] == "A").sum()
    assert n_cells["other_accuracy"] == (test["cell_type"] != "A").sum()


def test_votes_are_shares_of_the_five_nearest_unsteered_train_cells(steered):
    cells = cells_of(steered.store)
    kind, split = cells["cell_type"].to_list(), cells["split"].to_list()
    at, base = embeddings(steered.ablated, "unsteered")
    train = [i for i, cell in enumerate(at) if split[cell] == "train"]
    at_test, ablated = embeddings(steered.ablated, "ablate")
    votes = []
    for cell, x in zip(at_test, ablated, strict=True):
        if kind[cell] == "A":
            nearest = sorted(train, key=lambda i: float(((base[i].astype(float) - x) ** 2).sum()))[:5]
            votes.append(np.mean([kind[at[i]] == "A" for i in nearest]))
    row = results(steered.ablated).filter(condition="ablate", metric="target_votes")
    assert row["value"].item() == pytest.approx(np.mean(votes))


def test_the_evaluation_is_logged_once_and_attached_to_the_registered_sae(steered, chain):
    tracking = Tracking(Layout(steered.store))
    logged = tracking.client.search_runs([tracking.experiment_id], f"tags.`scsae.run` = '{steered.ablated.run}'")
    assert [run.info.status for run in logged] == ["FINISHED"]
    assert logged[0].data.params["intervention"] == "ablate"
    assert logged[0].data.tags["scsae.sae"] == Layout(steered.store).latest("saes").run
    version = tracking.champion("sae-tiny-layer.1")
    effect = results(steered.ablated).filter(condition="ablate", metric="target_votes")["effect"].item()
    assert logged[0].data.metrics["ablate/target_votes"] == pytest.approx(effect)
    of_model = tracking.client.get_logged_model(version.model_id).metrics
    mine = [m.value for m in of_model if m.key == "ablate/target_votes" and m.run_id == logged[0].info.run_id]
    assert mine == [pytest.approx(effect)]


def test_steering_again_does_nothing_and_logs_nothing(steered, monkeypatch):
    monkeypatch.setattr("pipelines.steer.SHARD_CELLS", 16)
    before = {path: path.stat().st_mtime_ns for path in steered.ablated.path.rglob("*") if path.is_file()}
    again = steer(ABLATE, steered.store)
    assert (again.path, again.done, again.reused) == (steered.ablated.path, 0, 5)
    assert again.facts == steered.ablated.facts
    assert {path: path.stat().st_mtime_ns for path in again.path.rglob("*") if path.is_file()} == before
    tracking = Tracking(Layout(steered.store))
    assert len(tracking.client.search_runs([tracking.experiment_id], f"tags.`scsae.run` = '{again.run}'")) == 1


def test_an_interrupted_steering_resumes_to_the_same_bytes(steered, own_store, without_actors, monkeypatch):
    monkeypatch.setattr("pipelines.steer.SHARD_CELLS", 16)
    original = Steerer.shard

    def dies_at_3(self, number):
        if number == 3:
            raise KeyboardInterrupt
        return original(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Steerer, "shard", dies_at_3)
        with pytest.raises(KeyboardInterrupt):
            steer(ABLATE, own_store)
    resumed = steer(ABLATE, own_store)
    assert (resumed.run, resumed.done, resumed.reused) == (steered.ablated.run, 2, 3)
    for name in ("per_cell", "results"):
        assert (
            commit.Run.open(resumed.path / name).manifest() == commit.Run.open(steered.ablated.path / name).manifest()
        )


def test_through_an_actor_the_stored_embeddings_are_the_same(steered, ray_local, own_store, monkeypatch):
    monkeypatch.setattr("pipelines.steer.SHARD_CELLS", 72)
    found = steer(ABLATE.model_copy(update={"num_actors": 1}), own_store)
    for condition in ("unsteered", "ablate", "random features"):
        cells, here = embeddings(steered.ablated, condition, draw=0)
        at, there = embeddings(found, condition, draw=0)
        assert at == cells
        np.testing.assert_allclose(there, here, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "celltype"}, "--kind was 'celltype'; this data set has cell_type, batch"),
        ({"kind": "donor"}, "--kind was 'donor'; this data set has cell_type, batch"),
        ({"target": "C"}, "--target was 'C'; cell_type among select cells is one of: A, B"),
    ],
)
def test_an_unknown_kind_or_target_lists_what_there_is_and_writes_nothing(chain, change, words):
    with pytest.raises(UsageError, match=words):
        steer(ABLATE.model_copy(update=change), chain.store)
    assert not (chain.store / "steering").exists()


def test_a_target_without_a_test_cell_is_refused_before_anything_is_written(own_store):
    folder = next((own_store / "cells").iterdir())
    cells = ingest.read_cells(folder)
    plan = commit.Run.open(folder).plan
    note = (folder / "source.json").read_text()
    shutil.rmtree(folder)
    only_b = pl.when(split="test").then(pl.lit("B")).otherwise("cell_type")
    commit.write_table(folder, cells.with_columns(cell_type=only_b), plan)
    (folder / "source.json").write_text(note)
    with pytest.raises(UsageError, match="no test cell has cell_type 'A'"):
        steer(ABLATE, own_store)
    assert not (own_store / "steering").exists()


def test_steering_without_associations_says_what_to_run_first(tmp_path):
    with pytest.raises(NotFoundError, match="scsae associate"):
        steer(ABLATE, tmp_path)
    assert not list(tmp_path.iterdir())
