"""Baselines run through every stage as the SAE did, are never a default, and stand beside it in the comparison."""

import io
import json
import re
import shlex
import shutil
from dataclasses import fields, replace

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score
from toy_plans import toy_plan
from typer.testing import CliRunner

from feature_store import FeatureStore
from feature_store.cells import read_cells
from feature_store.codes import CodesRun, load_cell_codes
from feature_store.query.metrics import METRICS
from feature_store.query.runs import RunChain, control_of, newest_run, resolve_run
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from feature_store.storage.plans import RANDOM_MODEL, ActivationsPlan, FusedForward, SAEPlan
from pipelines.baseline import baseline, encode_options, extract_options, train_options
from pipelines.cli import app
from pipelines.compare import SAE, baselines_of, compare_with_baselines, excess_in_words
from pipelines.config import (
    AssociateOptions,
    BaselineOptions,
    CellOptions,
    EncodeOptions,
    ExtractOptions,
    SteerOptions,
    check,
)
from pipelines.errors import UsageError
from pipelines.steering.run import steer
from pipelines.tracking import Tracking
from pipelines.train import train_all
from pipelines.verify import verify_run
from sae_core.errors import ConfigError
from sae_core.sae import load_sae

# the tests of each stage have actors
pytestmark = pytest.mark.usefixtures("module_without_actors")

FITTED = ("neurons", "pca", "random")
EVERY = (*FITTED, "random-model")
K = 4


def runs(store, kind):
    return {info.run for info in Layout(store).runs(kind)}


def written(store):
    """Every file of the store's runs with its time; notes of where data lie are written anew."""
    kinds = ("activations", "saes", "codes", "associations", "comparisons")
    files = (path for kind in kinds for path in (store / kind).rglob("*") if path.name != "model.json")
    return {path: path.stat().st_mtime_ns for path in files if path.is_file()}


@pytest.fixture(scope="module")
def held_against(chain, tmp_path_factory):
    """A copy of the chain's store with its baselines; read it, do not write to it."""
    store = tmp_path_factory.mktemp("baselines") / "store"
    shutil.copytree(chain.store, store)
    return store, baseline(BaselineOptions(kind=EVERY, fit_tokens=1000), store)


@pytest.fixture(scope="module")
def reference(chain):
    layout = Layout(chain.store)
    return RunChain.of(layout, newest_run(layout, "associations").run)


def differing(one, other):
    """Names of the fields in which two plans differ."""
    return {field.name for field in fields(one) if getattr(one, field.name) != getattr(other, field.name)}


def sae_of(results, control):
    return next(r for r in results if r.kind == "saes" and r.facts.get("control") == control)


def test_each_kind_ends_in_associations_of_its_own(held_against):
    store, results = held_against
    kinds = [result.kind for result in results]
    assert kinds == ["saes", "codes", "associations"] * 3 + ["activations", "saes", "codes", "associations"]
    layout = Layout(store)
    made = [result.run for result in results if result.kind == "associations"]
    assert [control_of(layout, "associations", run) for run in made] == list(EVERY)


@pytest.mark.parametrize(("kind", "n_features"), [("neurons", 32), ("random", 48)])
def test_a_baseline_has_the_saes_l0_and_the_figures_of_its_select_tokens(held_against, kind, n_features):
    found = sae_of(held_against[1], kind)
    assert load_sae(found.path).config.n_features == n_features
    assert found.facts["select_l0"] == pytest.approx(K, rel=0.05)
    figures = {name for name, value in found.facts.items() if isinstance(value, float)}
    assert {"select_fvu", "select_recovery", "select_dead_fraction"} <= figures <= set(METRICS)
    assert found.facts["select_tokens"] == json.loads((found.path / "summary.json").read_text())["select_tokens"]


def test_codes_and_tables_of_a_baseline_are_made_as_those_of_the_sae(held_against, reference):
    _, results = held_against
    for result in results:
        if result.kind == "codes":
            plan = commit.Run.open(result.path / "by_cell").plan
            expected = reference.codes.to_json()
            assert all(plan[key] == expected[key] for key in ("dataset", "pooling", "level", "fused"))
        if result.kind == "associations":
            plan = commit.Run.open(result.path / "features").plan
            expected = reference.associations.to_json()
            assert all(plan[key] == expected[key] for key in ("gene_sets", "config"))


@pytest.mark.parametrize("kind", ["activations", "saes", "codes", "associations"])
def test_a_command_that_names_no_run_still_takes_the_saes(held_against, chain, kind):
    store, _ = held_against
    assert newest_run(Layout(store), kind).run == Layout(chain.store).latest(kind).run
    newest = Layout(store).latest(kind).run
    assert resolve_run(Layout(store), kind, newest, option="--it").run == newest


def test_the_store_opens_at_the_sae_and_has_the_comparison_only_for_it(held_against, chain):
    store, results = held_against
    compare_with_baselines(store)
    found = FeatureStore.open(store)
    assert found.lineage.associations == Layout(chain.store).latest("associations").run
    assert found.sql("SELECT count(*) AS n FROM representation")["n"].item() == 5
    other = FeatureStore.open(store, associations=results[2].run)
    assert "comparison" not in other.tables()


def test_making_them_again_does_nothing(held_against):
    store, first = held_against
    compare_with_baselines(store)
    before = written(store)
    again = baseline(BaselineOptions(kind=EVERY, fit_tokens=1000), store)
    assert [(r.kind, r.run, r.done) for r in again] == [(r.kind, r.run, 0) for r in first]
    compare_with_baselines(store)
    assert written(store) == before


def test_a_damaged_baseline_is_fitted_again_to_the_same_bytes(own_store):
    options = BaselineOptions(kind=("pca",), fit_tokens=1000)
    (sae, codes, _) = baseline(options, own_store)
    for name, damage in {"sae.safetensors": lambda data: data[:-1] + b"x", "plan.json": lambda _: b"{"}.items():
        file = sae.path / name
        content = file.read_bytes()
        file.write_bytes(damage(content))
        assert verify_run(sae.run, own_store) == 1
        (again, same, _) = baseline(options, own_store)
        assert again.run == sae.run
        assert file.read_bytes() == content
        assert (same.run, same.done) == (codes.run, 0)


def test_a_random_models_sae_is_trained_as_the_sae_was_on_a_model_of_other_weights(held_against, reference):
    _, results = held_against
    activations, sae = results[-4], results[-3]
    extracted = ActivationsPlan.of(commit.Run.open(activations.path))
    assert differing(extracted, reference.activations) == {"model_digest", "control_of"}
    trained = SAEPlan.of(commit.Run.open(sae.path))
    assert differing(trained, reference.sae) == {"activations", "model_digest", "control_of"}
    assert (extracted.control_of, trained.control_of) == (RANDOM_MODEL, RANDOM_MODEL)
    assert commit.Run.open(activations.path).manifest().rows == reference.activations_run.manifest().rows


def test_a_random_models_sae_is_registered_under_a_name_of_its_own(held_against):
    store, results = held_against
    versions = Tracking.existing(Layout(store)).versions()
    names = {version.tags["scsae.run"]: version.name for version in versions}
    assert names[results[-3].run].startswith("random-model-")
    assert sum(name.startswith("sae-") for name in names.values()) == 1


def test_the_figures_of_the_comparison_are_sklearns_on_the_stored_codes(held_against):
    store, _ = held_against
    found = compare_with_baselines(store)
    runs_of = dict(found.representation.select("representation", "run").iter_rows())
    layout = Layout(store)
    rows = found.comparison.filter((pl.col("statistic") == "auroc") & (pl.col("target_kind") == "cell_type"))
    assert set(rows["representation"]) == {SAE, *EVERY}
    for row in rows.iter_rows(named=True):
        plan = commit.Run.open(layout.associations_dir(runs_of[row["representation"]]) / "features").plan
        cells = read_cells(layout.cells_dir(plan["dataset"]))
        codes = load_cell_codes(CodesRun.open(layout.codes_dir(plan["codes"])), cells["cell_idx"].to_numpy())
        own, dense = (cells["cell_type"] == row["target"]).to_numpy(), codes.toarray()
        # a feature that is not significant on test cells has its figures and no id
        features = range(dense.shape[1]) if row["feature_id"] is None else [row["feature_id"]]
        here = [(cells["split"] == split).to_numpy() for split in ("select", "test")]
        figures = [[roc_auc_score(own[cell], dense[cell, i]) for cell in here] for i in features]
        assert np.isclose(figures, [row["select"], row["test"]]).all(axis=1).any()


def test_the_headline_is_the_excess_over_the_baseline_that_is_best_on_select_cells(held_against):
    found = compare_with_baselines(held_against[0]).comparison
    for _, rows in found.group_by("target_kind", "target", "statistic"):
        own, others = rows.filter(representation=SAE), rows.filter(pl.col("representation") != SAE)
        if own.is_empty() or others.is_empty():
            continue
        (best,) = others.filter(pl.col("best")).iter_rows(named=True)
        assert best["select"] == others["select"].max()
        assert best["excess"] == pytest.approx(own["test"].item() - best["test"])


def test_associations_are_followed_by_the_excess_or_by_the_command_that_makes_baselines(held_against, chain):
    store, results = held_against
    run = Layout(chain.store).latest("associations").run
    assert f"scsae baseline --associations {run}" in excess_in_words(chain.store, run)
    assert "mean excess over the best baseline (neurons, pca, random, random-model)" in excess_in_words(store, run)
    assert "this is a control (neurons)" in excess_in_words(store, results[2].run)


def test_a_baseline_is_steered_like_an_sae(held_against, tmp_path):
    store = shutil.copytree(held_against[0], tmp_path / "own")
    associations = next(r for r in held_against[1] if r.kind == "associations")
    found = steer(SteerOptions(associations=associations.run, n_features=(2,), n_nulls=2, target="A"), store)
    results = commit.read_table(found.path / "results")
    assert commit.Run.open(found.path / "results").plan["sae"] == sae_of(held_against[1], "neurons").run
    assert np.isfinite(results["value"].to_numpy()).all()


def test_what_was_read_in_another_way_is_no_baseline(own_store, chain):
    from pipelines.associate import associate
    from pipelines.encode import encode

    layout = Layout(own_store)
    baseline(BaselineOptions(kind=("pca",), fit_tokens=1000), own_store)
    by_mean = associate(AssociateOptions(codes=encode(EncodeOptions(pooling="mean"), own_store).run), own_store)
    assert baselines_of(layout, RunChain.of(layout, Layout(chain.store).latest("associations").run)).keys() == {"pca"}
    assert not baselines_of(layout, RunChain.of(layout, by_mean.run))
    with pytest.raises(UsageError, match=rf"scsae baseline --associations {by_mean.run}"):
        compare_with_baselines(own_store, by_mean.run)


def test_a_control_is_not_compared_and_has_no_baselines(held_against):
    store, results = held_against
    for act in (compare_with_baselines, lambda s, run: baseline(BaselineOptions(associations=run), s)):
        with pytest.raises(UsageError, match="a control itself"):
            act(store, results[2].run)


def test_other_gene_sets_than_the_saes_are_refused_before_anything_is_written(chain, tmp_path):
    gmt = tmp_path / "own.gmt"
    gmt.write_text("set\t\tGENE1\n")
    before = written(chain.store)
    with pytest.raises(UsageError, match=r"--gmt: own; associations/.*leave --gmt out"):
        baseline(BaselineOptions(gmt=(gmt,)), chain.store)
    assert written(chain.store) == before


def test_the_printed_hint_makes_baselines_with_the_gene_sets_of_the_associations_without_their_file(
    own_store, tmp_path
):
    from pipelines.associate import associate

    gmt = tmp_path / "own.gmt"
    gmt.write_text("mine\tsome\tGENE1\tGENE2\nabsent\tnone\tNOTHERE\n")
    made = associate(AssociateOptions(gmt=(gmt,)), own_store)
    gmt.unlink()
    (command,) = re.findall(r"`scsae ([^`]*)`", excess_in_words(own_store, made.run))
    done = CliRunner().invoke(app, [*shlex.split(command), "--kind", "random", "--fit-tokens", "1000"])
    assert done.exit_code == 0, done.output
    layout = Layout(own_store)
    (of_baseline,) = baselines_of(layout, RunChain.of(layout, made.run)).values()
    tables = [commit.read_table(layout.associations_dir(run) / "gene_sets") for run in (made.run, of_baseline)]
    assert tables[0].equals(tables[1])
    assert tables[0].select("gene_set", "n_shared").rows() == [("mine", 2), ("absent", 0)]


def test_more_active_features_than_directions_are_refused_before_anything_is_written(reference, own_store):
    from pipelines.associate import associate
    from pipelines.encode import encode

    options = train_options(reference, reference.sae.activations).model_copy(update={"k": (40,), "n_steps": 2})
    (wide,) = train_all(options, own_store)
    associate(AssociateOptions(codes=encode(EncodeOptions(sae=wide.run), own_store).run), own_store)
    known = runs(own_store, "saes")
    with pytest.raises(ConfigError, match=r"n_features is 32"):
        baseline(BaselineOptions(kind=("neurons",)), own_store)
    assert runs(own_store, "saes") == known


def test_options_of_the_stages_are_recalled_from_the_plans(chain, reference):
    layout = Layout(chain.store)
    recalled = extract_options(layout, reference, BaselineOptions(num_cpus=2))
    # the data set is there, so its columns and its panel are not named again
    columns = {name: ExtractOptions.model_fields[name].default for name in CellOptions.model_fields}
    assert recalled == chain.extract.model_copy(
        update={
            **columns,
            "random_init": True,
            "layer": ("layer.1",),
            "num_cpus": 2,
            "matrix": "X",
            "min_matched_share": 0,
        }
    )
    again = train_options(reference, "run")
    named = ("arch", "k", "n_features", "n_steps", "batch_size", "seed", "num_workers")
    assert [getattr(again, name) for name in named] == [getattr(chain.train, name) for name in named]


def test_the_penalty_on_alike_rows_is_recalled_and_is_none_in_an_older_plan(reference):
    def recalled(sae: dict[str, object]) -> float:
        chain = replace(reference, sae=replace(reference.sae, sae=sae))
        return train_options(chain, "run").orthogonality_coefficient

    config = dict(reference.sae.sae)
    assert recalled(config | {"orthogonality_coefficient": 0.5}) == 0.5
    del config["orthogonality_coefficient"]
    assert recalled(config) == 0


def test_a_fused_encoding_of_other_cells_is_recalled_with_its_data(chain, reference):
    layout, plan = Layout(chain.store), reference.codes
    fused = toy_plan(FusedForward, tokens_per_cell=5, model_digest="m")
    cut = replace(plan.cut, panel_cells=9)
    mine = replace(reference, codes=replace(plan, fused=fused, cut=cut, pooling="mean"))
    same = EncodeOptions(sae="s", pooling="mean", fused=True, tokens_per_cell=5, shard_cells=9)
    assert encode_options(layout, mine, "s", BaselineOptions()) == same
    assert encode_options(layout, reference, "s", BaselineOptions()) == EncodeOptions(sae="s")


def test_extraction_of_an_ordinary_model_has_no_control_in_its_plan(reference):
    assert reference.activations.control_of is None
    assert not ExtractOptions(data="x.h5ad").random_init


def test_recovery_and_error_are_measured_on_the_cells_and_tokens_of_the_sae(held_against, reference):
    found = compare_with_baselines(held_against[0]).representation
    assert found["representation"].to_list() == [SAE, *sorted(EVERY)]
    assert found["fvu"].null_count() == found["recovery"].null_count() == 0
    own = found.filter(representation=SAE)
    assert own["fvu"].item() < found.filter(representation="random")["fvu"].item()
    assert np.isfinite(found["l0"].to_numpy()).all()


@pytest.mark.parametrize(("form", "read"), [("csv", pl.read_csv), ("json", pl.read_json), ("parquet", pl.read_parquet)])
def test_the_command_writes_the_whole_comparison_in_any_form_and_its_summary_as_a_table(held_against, form, read):
    store = str(held_against[0])
    answer = CliRunner().invoke(app, ["compare", "--store", store, "--format", form])
    assert answer.exit_code == 0, answer.output
    table = compare_with_baselines(held_against[0]).comparison
    assert read(io.BytesIO(answer.stdout_bytes)).shape == table.shape
    shown = CliRunner().invoke(app, ["compare", "--store", store]).output
    assert all(name in shown for name in (SAE, *EVERY, "the excess over the best baseline"))


def test_an_unknown_kind_is_refused_with_the_kinds(chain):
    with pytest.raises(UsageError, match=r"kind was 'umap'.*'neurons', 'pca', 'ica', 'random' or 'random-model'"):
        check(BaselineOptions, {"kind": ["umap"]}, "scsae baseline")
