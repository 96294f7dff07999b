"""Training: the loop resumes bit for bit, under Ray Train or without, and what is registered gives the same codes."""

import hashlib
import importlib.metadata
import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ranks import on_two_ranks

from feature_store.activations import ActivationReader
from feature_store.errors import IntegrityError, NotFoundError
from feature_store.query.metrics import METRICS
from feature_store.storage import commit
from feature_store.storage.layout import MANIFEST, Layout
from pipelines.config import Recipe, TrainOptions, check
from pipelines.config.train import Arch
from pipelines.errors import UsageError
from pipelines.runtime.threads import torch_threads
from pipelines.tracking import Tracking, promote
from pipelines.tracking.provenance import origin_of
from pipelines.train import train, train_all
from pipelines.training_loop import SAEJob, TrainJob, fit, held_out
from sae_core.errors import CheckpointError, ConfigError, TrainingError
from sae_core.sae import ARCHITECTURES, evaluate, load_sae


@pytest.fixture
def job_in(chain, tmp_path):
    """Make a job on the chain's activations whose folder is new."""
    layout = Layout(chain.store)
    plan = commit.Run.open(layout.latest("saes").path).plan

    def make(name, **sae):
        mine = {**plan, "sae": {**plan["sae"], **sae}}
        run = commit.Run.create(tmp_path / name, {key: mine[key] for key in mine if key != "format_version"})
        return TrainJob(
            activations=str(layout.latest("activations").path),
            store=str(chain.store),
            dataset=plan["dataset"],
            saes=(SAEJob(folder=str(run.path), sae=mine["sae"], train=mine["train"]),),
            checkpoint_steps=20,
            recovery_cells=4,
            device="cpu",
            n_threads=1,
        )

    return make


def folder_of(job):
    (sae,) = job.saes
    return commit.Path(sae.folder)


def checkpoints_of(job):
    return sorted(path.name for path in (folder_of(job) / "checkpoints").iterdir())


def files_of(job):
    return {marker.shard: marker.sha256 for marker in commit.Run.open(folder_of(job)).manifest().shards}


def interrupt(job):
    """Fit until step 50 and stop there as Ctrl-C does."""

    def stop_at_50(metrics):
        if metrics["step"] >= 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(job, report=stop_at_50)


def test_an_interrupted_run_ends_in_the_same_bytes_as_an_undisturbed_one(job_in):
    calm, broken = job_in("calm"), job_in("broken")
    fit(calm)
    interrupt(broken)
    fit(broken)
    assert files_of(broken) == files_of(calm)


def test_a_torn_newest_checkpoint_is_named_and_passed_over_for_the_one_before(job_in, capsys):
    calm, broken = job_in("calm"), job_in("broken")
    fit(calm)
    interrupt(broken)
    newest = sorted((folder_of(broken) / "checkpoints").iterdir())[-1]
    (newest / "trainer.json").write_text("{")
    fit(broken)
    assert newest.name in capsys.readouterr().err
    assert files_of(broken) == files_of(calm)


def test_two_checkpoints_are_kept(job_in):
    job = job_in("run")
    fit(job)
    assert len(checkpoints_of(job)) == 2


def test_reported_figures_are_those_of_the_saved_sae_on_select_tokens(chain):
    layout = Layout(chain.store)
    run = layout.latest("saes").path
    figures = json.loads((run / "summary.json").read_text())
    reader = ActivationReader(commit.Run.open(layout.latest("activations").path))
    dataset = commit.Run.open(run).plan["dataset"]
    split = commit.read_table(layout.cells_dir(dataset))["split"].to_numpy()
    tokens = held_out(reader, split == "select", seed=0)
    again = evaluate(load_sae(run), tokens.split(100))
    assert figures["select_fvu"] == pytest.approx(again.fvu)
    assert figures["select_l0"] == pytest.approx(again.l0)
    assert figures["select_l0"] == pytest.approx(4, rel=0.05)
    assert figures["select_tokens"] == again.n_tokens == len(tokens)
    reported = evaluate(load_sae(run), held_out(reader, split == "test", seed=0).split(100))
    assert figures["test_fvu"] == pytest.approx(reported.fvu)


def test_training_reads_no_token_outside_the_train_cells(chain, job_in, monkeypatch):
    from feature_store.activations import TokenStream

    seen = []
    original = TokenStream.__init__

    def spy(self, *args, **options):
        seen.append(options["keep_cells"])
        original(self, *args, **options)

    monkeypatch.setattr(TokenStream, "__init__", spy)
    fit(job_in("run"))
    layout = Layout(chain.store)
    split = commit.read_table(layout.cells_dir(commit.Run.open(layout.latest("saes").path).plan["dataset"]))["split"]
    np.testing.assert_array_equal(seen[0], split.to_numpy() == "train")


def test_training_again_does_nothing_and_registers_nothing_twice(chain):
    again = train(chain.train, chain.store)
    assert (again.done, again.reused) == (0, 60)
    assert len(Tracking(Layout(chain.store)).versions()) == 1


def test_the_registered_sae_is_champion_and_carries_its_lineage(chain):
    layout = Layout(chain.store)
    version = Tracking(layout).champion("sae-tiny-layer.1")
    run = commit.Run.open(layout.latest("saes").path)
    assert version.aliases == ("champion",)
    assert version.tags["scsae.run"] == run.path.name
    assert version.tags["scsae.manifest_sha256"] == run.manifest().sha
    assert version.tags["scsae.activations"] == layout.latest("activations").run
    assert version.metrics["select_fvu"] == pytest.approx(
        json.loads((run.path / "summary.json").read_text())["select_fvu"]
    )


X = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
LOAD = """
import sys, numpy, mlflow
mlflow.set_tracking_uri(sys.argv[1]); mlflow.set_registry_uri(sys.argv[1])
x = numpy.load(sys.argv[2])
numpy.save(sys.argv[3], mlflow.pyfunc.load_model("models:/sae-tiny-layer.1@champion").predict(x))
"""


def codes_of_the_champion(uri, folder):
    np.save(folder / "x.npy", X.numpy())
    command = [sys.executable, "-c", LOAD, uri, str(folder / "x.npy"), str(folder / "z.npy")]
    subprocess.run(command, check=True, capture_output=True)
    return np.load(folder / "z.npy").tobytes()


def codes_of(run):
    return load_sae(run).encode(X).to_dense().numpy().tobytes()


@pytest.mark.slow
def test_the_champion_loaded_in_a_fresh_process_gives_the_same_codes_bit_for_bit(chain, tmp_path):
    layout = Layout(chain.store)
    assert codes_of_the_champion(Tracking(layout).uri, tmp_path) == codes_of(layout.latest("saes").path)


def test_a_version_leads_back_to_activations_data_model_and_code_and_says_what_is_gone(chain, own_store):
    layout = Layout(own_store)
    version = Tracking(layout).champion("sae-tiny-layer.1")
    plan = commit.Run.open(layout.latest("saes").path).plan
    facts = origin_of(layout, version)
    activations = commit.Run.open(layout.latest("activations").path)
    unchanged = "in this store, unchanged"
    assert [facts[part]["state"] for part in ("sae", "activations", "data set")] == [unchanged] * 3
    assert facts["activations"]["manifest_sha256"] == activations.manifest().sha
    assert facts["data set"]["id"] == plan["dataset"]
    data = commit.Path(chain.extract.data[0])
    assert facts["data set"][f"sha256 of {data.name}"] == hashlib.sha256(data.read_bytes()).hexdigest()
    assert facts["model"] == {"name": "tiny", "digest": plan["model_digest"], "place": chain.extract.model}
    assert facts["code"]["version"] == importlib.metadata.version("scsae")
    shutil.rmtree(activations.path)
    assert origin_of(layout, version)["activations"]["state"] == "not in this store (IntegrityError)"


def test_a_run_without_test_cells_has_no_figure_of_them(chain, own_store, monkeypatch, without_actors):
    from feature_store.cells import TEST, TRAIN, read_split_numbers

    def without_test(folder):
        split = read_split_numbers(folder)
        split[split == TEST] = TRAIN
        return split

    monkeypatch.setattr("pipelines.training_loop.read_split_numbers", without_test)
    facts = train(chain.train.model_copy(update={"seed": 5, "n_steps": 3}), own_store).facts
    assert "`test` cell" in facts["test_fvu"]
    assert isinstance(facts["select_fvu"], float)


def test_training_in_this_process_leaves_its_threads_as_they_were(chain, own_store, without_actors, monkeypatch):
    import torch

    from pipelines import training_loop

    normaliser, during = training_loop.fit_normaliser, []
    monkeypatch.setattr(
        training_loop, "fit_normaliser", lambda *a, **k: during.append(torch.get_num_threads()) or normaliser(*a, **k)
    )
    with torch_threads(2):
        train(chain.train.model_copy(update={"seed": 8, "n_steps": 3, "num_cpus": 1}), own_store)
        assert torch.get_num_threads() == 2
    assert during == [1]


def test_every_figure_of_a_training_is_in_the_registry_of_metrics(chain):
    folder = Layout(chain.store).latest("saes").path
    summary = json.loads((folder / "summary.json").read_text())
    history = json.loads((folder / "history.json").read_text())
    written = {name for name, value in summary.items() if isinstance(value, int | float)}
    written |= {name for row in history for name in row} - {"step"}
    assert {"select_fvu", "l0"} <= written <= set(METRICS)


def test_broken_test_tokens_cost_their_figure_alone_and_the_reason_is_kept_everywhere(
    chain, own_store, monkeypatch, without_actors
):
    from pipelines import training_loop

    original = training_loop.held_out

    def broken(reader, keep_cells, *, seed, split="select"):
        if split == "test":
            raise IntegrityError("part-00003 of activations is damaged")
        return original(reader, keep_cells, seed=seed, split=split)

    monkeypatch.setattr(training_loop, "held_out", broken)
    done = train(chain.train.model_copy(update={"seed": 6, "n_steps": 3}), own_store)
    reason = {"test_fvu": "part-00003 of activations is damaged"}
    summary = json.loads((done.path / "summary.json").read_text())
    assert "test_fvu" not in summary
    assert reason.items() <= summary["missing"].items()
    assert reason["test_fvu"] in done.facts["test_fvu"]
    tracking = Tracking(Layout(own_store))
    version = tracking.of_run(done.run)
    assert version.missing == summary["missing"]
    assert json.loads(tracking.client.get_run(version.mlflow_run).data.tags["scsae.missing"]) == summary["missing"]


def test_what_is_registered_is_the_autoencoder_without_its_checkpoints(chain):
    import mlflow

    tracking = Tracking(Layout(chain.store))
    version = tracking.of_run(Layout(chain.store).latest("saes").run)
    folder = commit.Path(mlflow.artifacts.download_artifacts(f"models:/{version.model_id}", tracking_uri=tracking.uri))
    held = {path.name for path in folder.rglob("*") if path.is_file()}
    assert {"sae.safetensors", "config.json"} <= held
    assert not {"trainer.safetensors", "plan.json", "history.json"} & held
    assert not list(folder.rglob("*.pkl"))


@pytest.mark.slow
def test_ray_train_with_a_worker_gives_the_bytes_of_the_plain_loop_and_gives_ctrl_c_back(ray_local, chain, tmp_path):
    from pipelines.extract import extract

    extract(chain.extract, tmp_path)
    handler = signal.getsignal(signal.SIGINT)
    run = train(chain.train.model_copy(update={"num_workers": 1}), tmp_path)
    mine = commit.Run.open(run.path).manifest()
    assert mine == commit.Run.open(Layout(chain.store).latest("saes").path).manifest()
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_value_that_is_not_finite_stops_the_run_by_name_and_keeps_the_checkpoint(
    ray_local, chain, job_in, monkeypatch
):
    from feature_store.activations import TokenStream

    original = TokenStream.__iter__

    def spoiled(self):
        for n, batch in enumerate(original(self)):
            yield batch * np.nan if n == 45 else batch

    monkeypatch.setattr(TokenStream, "__iter__", spoiled)
    job = job_in("run")
    with pytest.raises(TrainingError, match="step 46"):
        fit(job)
    assert checkpoints_of(job)[-1] == "step-00000040"


@pytest.mark.parametrize("change", [{"k": (500,)}, {"n_features": 3}])
def test_a_k_that_does_not_fit_is_refused_and_nothing_is_written(ray_local, chain, change):
    before = Layout(chain.store).runs("saes")
    with pytest.raises(ConfigError, match="k"):
        train(chain.train.model_copy(update=change), chain.store)
    assert Layout(chain.store).runs("saes") == before


@pytest.fixture(scope="module")
def all_architectures(chain, tmp_path_factory):
    """A copy of the chain's store, to train each architecture in."""
    store = tmp_path_factory.mktemp("architectures") / "store"
    shutil.copytree(chain.store, store)
    return store


@pytest.mark.parametrize("arch", get_args(Arch))
def test_each_architecture_is_trained_saved_and_registered(ray_local, chain, all_architectures, arch):
    options = chain.train.model_copy(update={"arch": (arch,), "l1_coefficient": (0.3,)})
    result = train(options, all_architectures)
    sae, plan = load_sae(result.path), commit.Run.open(result.path).plan
    assert plan["sae"]["arch"] == sae.config.arch == arch
    assert plan["sae"]["l1_coefficient"] == 0.3
    assert (result.path.name, result.facts["select_tokens"] > 0) == (result.run, True)
    assert 0 < result.facts["select_fvu"] < 1
    assert result.facts["registered"].startswith("sae-tiny-layer.1 ")
    assert train(options, all_architectures).done == 0


def test_the_architectures_of_the_command_line_are_those_of_the_package():
    assert set(get_args(Arch)) == set(ARCHITECTURES)


def test_training_without_activations_says_what_to_run_first(tmp_path):
    with pytest.raises(NotFoundError, match="scsae extract"):
        train(TrainOptions(), tmp_path)


def test_an_unknown_run_lists_those_that_there_are(chain):
    with pytest.raises(NotFoundError, match=Layout(chain.store).latest("activations").run):
        train(chain.train.model_copy(update={"activations": "zzz"}), chain.store)


@pytest.mark.slow
def test_a_promoted_version_gives_the_codes_of_its_sae_in_a_fresh_process_and_a_worse_one_is_refused(
    ray_local, chain, tmp_path
):
    from pipelines.extract import extract

    extract(chain.extract, tmp_path)
    train(chain.train.model_copy(update={"n_steps": 2}), tmp_path)
    better = train(chain.train, tmp_path)
    tracking = Tracking(Layout(tmp_path))
    assert tracking.champion("sae-tiny-layer.1").version == 1
    done = promote(tracking, "sae-tiny-layer.1", 2)
    assert (done.metric, done.value) == ("test_fvu", better.facts["test_fvu"])
    assert codes_of_the_champion(tracking.uri, tmp_path) == codes_of(better.path)
    with pytest.raises(UsageError, match="test_fvu"):
        promote(tracking, "sae-tiny-layer.1", 1)
    assert tracking.champion("sae-tiny-layer.1").version == 2


def test_what_a_crash_kept_from_a_registered_sae_is_made_up_for(own_store, chain):
    tracking = Tracking(Layout(own_store))
    version = tracking.champion("sae-tiny-layer.1")
    tracking.client.update_run(version.mlflow_run, status="RUNNING")
    tracking.client.delete_registered_model_alias(version.name, "champion")
    train(chain.train, own_store)
    assert tracking.versions() == [version]
    assert tracking.find(version.tags["scsae.run"]) == version.mlflow_run


def test_options_of_the_core_reach_it_and_are_logged(chain, own_store, without_actors):
    options = chain.train.model_copy(
        update={
            "arch": ("matryoshka",),
            "groups": (0.25, 0.75),
            "orthogonality_coefficient": 0.5,
            "encoder_precision": "bf16",
            "warmup_fraction": 0.2,
            "decay_fraction": 0.5,
            "dead_window_tokens": 500,
            "n_steps": 10,
        }
    )
    plan = commit.Run.open(train(options, own_store).path).plan
    assert (plan["sae"]["groups"], plan["sae"]["orthogonality_coefficient"]) == ([0.25, 0.75], 0.5)
    schedule = {"encoder_precision": "bf16", "warmup_fraction": 0.2, "decay_fraction": 0.5, "dead_window_tokens": 500}
    assert schedule.items() <= plan["train"].items()
    tracking = Tracking(Layout(own_store))
    version = max(tracking.versions(), key=lambda found: found.version)
    logged = tracking.client.get_run(version.mlflow_run).data.params
    assert (logged["encoder_precision"], logged["groups"], logged["warmup_fraction"]) == ("bf16", "[0.25, 0.75]", "0.2")


def test_a_precision_that_is_not_used_is_said_and_kept_with_the_figures(
    chain, own_store, monkeypatch, capsys, without_actors
):
    import torch

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    short = {"n_steps": 10, "arch": ("topk",)}
    for precision in ("bf16", "int8"):
        result = train(chain.train.model_copy(update={**short, "encoder_precision": precision}), own_store)
        said = f"encoder_precision was {precision}, but features are ranked in f32"
        assert capsys.readouterr().err.count(said) == 1
        assert said in result.facts["ranking"]
    assert "ranking" not in train(chain.train.model_copy(update=short), own_store).facts


def test_what_the_trainer_finds_is_said_once_and_kept_with_the_figures(
    chain, own_store, monkeypatch, capsys, without_actors
):
    from sae_core.sae import DeadFeatureRisk, Trainer

    monkeypatch.setattr(
        Trainer, "dead_feature_risks", lambda self: [DeadFeatureRisk("high_gamma", 12.5, "the mean is long")]
    )
    result = train(chain.train.model_copy(update={"seed": 3, "n_steps": 110}), own_store)
    said = capsys.readouterr().err
    assert said.count("the mean is long") == 1
    assert result.facts["high_gamma"] == "step 50: the mean is long"
    summary = json.loads((result.path / "summary.json").read_text())
    assert summary["findings"] == [
        {"kind": "high_gamma", "step": 50, "value": 12.5, "message": "the mean is long"},
    ]
    assert Tracking(Layout(own_store)).of_run(result.run).tags["scsae.findings"] == "high_gamma"


def test_findings_survive_an_interruption(job_in, monkeypatch):
    from sae_core.sae import DeadFeatureRisk, Trainer

    def dead_feature_risks(self):
        return [DeadFeatureRisk("dead_growth", 0.5, "dead")] if self.n_steps_done <= 50 else []

    monkeypatch.setattr("pipelines.training_loop.REPORT_STEPS", 10)
    monkeypatch.setattr(Trainer, "dead_feature_risks", dead_feature_risks)
    job = job_in("run")
    interrupt(job)
    fit(job)
    assert json.loads((folder_of(job) / "summary.json").read_text())["findings"][0]["step"] == 10


def test_a_checkpoint_of_another_configuration_is_refused_by_its_fields_and_left_alone(job_in):
    mine, other = job_in("mine"), job_in("other", k=3)
    interrupt(other)
    shutil.copytree(folder_of(other) / "checkpoints", folder_of(mine) / "checkpoints")
    with pytest.raises(CheckpointError, match=r"k \(4 here, 3 saved\)"):
        fit(mine)
    assert checkpoints_of(mine) == checkpoints_of(other)


def test_a_part_that_goes_missing_stops_the_run_by_name_and_keeps_the_checkpoint(job_in, own_store):
    job = job_in("run")
    interrupt(job)
    kept = checkpoints_of(job)
    activations = Layout(own_store).latest("activations").path
    part = sorted(activations.glob("part-*.parquet"))[1]
    moved = part.rename(part.with_suffix(".away"))
    elsewhere = replace(job, activations=str(activations), store=str(own_store))
    with pytest.raises(IntegrityError, match=part.name):
        fit(elsewhere)
    assert checkpoints_of(job) == kept
    moved.rename(part)
    fit(elsewhere)
    assert (folder_of(job) / MANIFEST).is_file()


def test_held_out_values_that_are_not_finite_are_told_before_anything_is_committed(job_in, monkeypatch):
    from pipelines import training_loop

    original = training_loop.sample_tokens

    def spoiled(*args, n_tokens, **options):
        for block in original(*args, n_tokens=n_tokens, **options):
            yield block * np.nan if n_tokens == training_loop.HELD_OUT_TOKENS else block

    monkeypatch.setattr(training_loop, "sample_tokens", spoiled)
    job = job_in("run")
    with pytest.raises(TrainingError, match=r"`select`.*float32"):
        fit(job)
    assert not (folder_of(job) / "sae.safetensors").exists()
    assert checkpoints_of(job)[-1] == "step-00000040"


TWO_RANKS = """
import json
from pipelines.training_loop import SAEJob, TrainJob, fit
def job_of(text):
    job = json.loads(text)
    return TrainJob(**{**job, "saes": tuple(SAEJob(**sae) for sae in job["saes"])})
calm, broken = map(job_of, sys.argv[1:])
def stop_at_50(metrics):
    if metrics["step"] >= 50: raise KeyboardInterrupt
fit(calm, communicator=ranks)
try:
    fit(broken, report=stop_at_50, communicator=ranks)
except KeyboardInterrupt:
    fit(broken, communicator=ranks)
else:
    raise SystemExit("it was not interrupted")
"""


@pytest.mark.slow
def test_two_ranks_resume_to_the_bytes_of_an_undisturbed_run(job_in, tmp_path):
    calm, broken = job_in("calm"), job_in("broken")
    texts = [json.dumps(asdict(job)) for job in (calm, broken)]
    on_two_ranks(TWO_RANKS, *texts, meet=tmp_path / "meet")
    assert files_of(broken) == files_of(calm)


@pytest.mark.slow
def test_two_workers_of_ray_train_give_one_sae_that_is_another_run_than_one_workers(ray_local, chain, own_store):
    alone = Layout(own_store).latest("saes").run
    result = train(chain.train.model_copy(update={"num_workers": 2}), own_store)
    assert result.run != alone
    assert 0 < result.facts["select_fvu"] < 1
    assert result.facts["select_l0"] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"num_workers": 3}, "multiple of 3"), ({"num_workers": 64}, "--shard-cells")],
)
def test_workers_that_cannot_share_are_refused_and_nothing_is_written(chain, change, words):
    before = Layout(chain.store).runs("saes")
    with pytest.raises(UsageError, match=words):
        train(chain.train.model_copy(update=change), chain.store)
    assert Layout(chain.store).runs("saes") == before


def test_a_sweep_gives_each_sae_the_bytes_that_it_has_alone_and_does_only_what_is_missing(
    chain, own_store, without_actors
):
    options = chain.train.model_copy(update={"seed": 5, "n_steps": 20, "checkpoint_steps": 7})
    swept = {"arch": ("batchtopk", "gated"), "k": (3, 4)}
    results = train_all(options.model_copy(update=swept), own_store)
    made = {result.run: commit.Run.open(result.path).manifest() for result in results}
    assert (len(made), [result.done for result in results]) == (4, [20] * 4)
    shutil.rmtree(results[2].path)
    alone = train(options.model_copy(update={"arch": ("gated",), "k": (3,)}), own_store)
    assert (alone.run, alone.done) == (results[2].run, 20)
    assert commit.Run.open(alone.path).manifest() == made[alone.run]
    shutil.rmtree(results[3].path)
    again = train_all(options.model_copy(update=swept), own_store)
    assert [result.done for result in again] == [0, 0, 0, 20]
    assert {result.run: commit.Run.open(result.path).manifest() for result in again} == made


def test_a_sweep_resumes_from_the_newest_checkpoint_that_all_have(job_in):
    calm = [job_in("a"), job_in("b", k=3)]
    for job in calm:
        fit(job)
    both = [job_in("c"), job_in("d", k=3)]
    job = replace(both[0], saes=both[0].saes + both[1].saes)
    interrupt(job)
    shutil.rmtree(folder_of(both[1]) / "checkpoints" / "step-00000040")
    fit(job)
    assert [files_of(each)[0] for each in both] == [files_of(each)[0] for each in calm]
    assert [files_of(each)[3] for each in both] == [files_of(each)[3] for each in calm]


def test_an_sae_that_diverges_leaves_the_others_of_a_sweep_to_finish(job_in, monkeypatch):
    from sae_core.sae import Trainer

    original = Trainer.step

    def step(self, x):
        if self.sae.config.k == 3 and self.n_steps_done == 45:
            raise TrainingError("the loss of step 46 is nan")
        return original(self, x)

    monkeypatch.setattr(Trainer, "step", step)
    both = [job_in("good"), job_in("bad", k=3)]
    with pytest.raises(TrainingError, match=r"1 of 2 .*bad: .*step 46"):
        fit(replace(both[0], saes=both[0].saes + both[1].saes))
    assert (folder_of(both[0]) / MANIFEST).is_file()
    assert not (folder_of(both[1]) / MANIFEST).is_file()
    assert checkpoints_of(both[1])[-1] == "step-00000040"


def test_one_sae_cannot_be_several(chain):
    with pytest.raises(UsageError, match=r"'k': \(3, 4\)"):
        train(chain.train.model_copy(update={"k": (3, 4)}), chain.store)


COMMAND = "--n-features 48 --k 4 --n-steps 60 --batch-size 128 --checkpoint-steps 20 --num-workers 0"


@pytest.fixture
def command(monkeypatch, capsys):
    """Run `scsae` in this process; exit code, and what it said on stderr."""
    from pipelines.cli import main

    def run(line, store):
        monkeypatch.setattr(sys, "argv", ["scsae", *line.split(), "--store", str(store)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return ended.value.code, said

    return run


def test_a_value_that_is_not_finite_in_a_part_ends_with_code_1_and_what_to_do(ray_local, own_store, command):
    run = commit.Run.open(Layout(own_store).latest("activations").path)
    part = run.part(2)
    table = pq.read_table(part)
    bad = np.frombuffer(table["act"][3].as_py(), np.float32).copy()
    bad[1] = np.nan
    values = [*table["act"].to_pylist()]
    values[3] = bad.tobytes()
    column = pa.array(values, table.schema.field("act").type)
    marker = run.manifest().shards[2]
    for file in (part, part.with_suffix(".json"), run.path / "MANIFEST.json"):
        file.unlink()

    def write(path):
        pq.write_table(table.set_column(3, table.schema.field("act"), column), path, compression="none")
        return table.num_rows

    run.commit_shard(2, write, start=marker.start, stop=marker.stop)
    run.finalize()
    code, said = command(f"train {COMMAND} --seed 9", own_store)
    assert code == 1
    assert "float32" in said


def test_a_missing_part_ends_with_code_1_and_its_name(ray_local, own_store, command):
    part = commit.Run.open(Layout(own_store).latest("activations").path).part(2)
    part.unlink()
    code, said = command(f"train {COMMAND} --seed 9", own_store)
    assert code == 1
    assert part.name in said
    assert "scsae extract" in said


def test_a_checkpoint_of_another_configuration_ends_with_code_1_and_the_field(ray_local, own_store, command, job_in):
    other = job_in("other", k=3)
    interrupt(other)
    trained = Layout(own_store).latest("saes").path
    plan = (trained / "plan.json").read_text()
    shutil.rmtree(trained)
    trained.mkdir()
    (trained / "plan.json").write_text(plan)
    shutil.copytree(folder_of(other) / "checkpoints", trained / "checkpoints")
    code, said = command(f"train {COMMAND}", own_store)
    assert code == 1, said
    assert "k (4 here, 3 saved)" in said
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == checkpoints_of(other)


@pytest.mark.parametrize(
    ("k", "words"),
    [("2.5", "k was '2.5': give a whole number"), ("0", "k was '?0'?: give 1 or more"), ("49", "k = 49 is not")],
)
def test_a_wrong_k_ends_with_code_2_and_nothing_is_written(chain, command, k, words):
    before = Layout(chain.store).runs("saes")
    code, said = command(f"train --n-features 48 --k {k}", chain.store)
    assert code == 2
    assert re.search(words, said)
    assert Layout(chain.store).runs("saes") == before


def test_a_worker_that_fits_on_no_node_is_refused_instead_of_waited_for(ray_local, own_store):
    with pytest.raises(UsageError, match=r"3 CPUs"):
        train(TrainOptions(n_features=48, k=(4,), num_cpus=3), own_store)


def test_workers_that_there_is_no_room_for_yet_are_told(ray_local, chain, capsys):
    from pipelines.train import _say_if_waiting

    _say_if_waiting(chain.train.model_copy(update={"num_workers": 5}))
    assert "room for 2 of 5 workers" in capsys.readouterr().err
    _say_if_waiting(chain.train.model_copy(update={"num_workers": 2}))
    assert capsys.readouterr().err == ""


def test_a_recipe_with_a_sweep_is_refused_as_it_goes_on_from_one_sae():
    with pytest.raises(UsageError, match=r"train\.k .*\[16, 32\]"):
        check(Recipe, {"train": {"k": [16, 32]}, "encode": {}}, "recipe")


@pytest.mark.parametrize("given", [8, "8", [8], ["8"]])
def test_one_value_of_a_sweep_needs_no_list(given):
    assert check(TrainOptions, {"k": given}, "scsae train").k == (8,)
