"""Training: the loop resumes bit for bit, under Ray Train or without, and what is registered gives the same codes."""

import json
import shutil
import signal
import subprocess
import sys
from typing import get_args

import numpy as np
import pytest
import torch

from feature_store import commit
from feature_store.activations import ActivationReader
from feature_store.errors import NotFoundError
from feature_store.layout import Layout
from pipelines.config import TrainOptions
from pipelines.tracking import Tracking
from pipelines.train import TrainJob, fit, held_out, train
from sae_core.errors import ConfigError, TrainingError
from sae_core.sae import ARCHITECTURES, evaluate, load_sae

pytestmark = pytest.mark.ray


@pytest.fixture
def job_in(chain, tmp_path):
    """Make a job on the chain's activations whose folder is new."""
    layout = Layout(chain.store)
    plan = commit.Run.open(layout.latest("saes").path).plan

    def make(name):
        run = commit.Run.create(tmp_path / name, {key: plan[key] for key in plan if key != "format_version"})
        return TrainJob(
            activations=str(layout.latest("activations").path),
            cells=str(layout.cells_dir(plan["dataset"])),
            folder=str(run.path),
            sae=plan["sae"],
            train=plan["train"],
            checkpoint_steps=20,
            device="cpu",
            n_threads=1,
        )

    return make


def files_of(job):
    return {marker.shard: marker.sha256 for marker in commit.Run.open(job.folder).manifest().shards}


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


def test_a_torn_newest_checkpoint_is_passed_over_for_the_one_before(job_in):
    calm, broken = job_in("calm"), job_in("broken")
    fit(calm)
    interrupt(broken)
    newest = sorted((commit.Path(broken.folder) / "checkpoints").iterdir())[-1]
    (newest / "trainer.json").write_text("{")
    fit(broken)
    assert files_of(broken) == files_of(calm)


def test_two_checkpoints_are_kept(job_in):
    job = job_in("run")
    fit(job)
    assert len(list((commit.Path(job.folder) / "checkpoints").iterdir())) == 2


def test_reported_figures_are_those_of_the_saved_sae_on_select_tokens(chain):
    layout = Layout(chain.store)
    run = layout.latest("saes").path
    figures = json.loads((run / "summary.json").read_text())
    reader = ActivationReader(commit.Run.open(layout.latest("activations").path))
    dataset = commit.Run.open(run).plan["dataset"]
    split = commit.read_table(layout.cells_dir(dataset))["split"].to_numpy()
    tokens = held_out(reader, split == "select")
    again = evaluate(load_sae(run), tokens.split(100))
    assert figures["select_fvu"] == pytest.approx(again.fvu)
    assert figures["select_l0"] == pytest.approx(again.l0)
    assert figures["select_l0"] == pytest.approx(4, rel=0.05)
    assert figures["select_tokens"] == again.n_tokens == len(tokens)


def test_training_reads_no_token_outside_the_train_cells(chain, job_in, monkeypatch):
    from feature_store.stream import TokenStream

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


LOAD = """
import sys, numpy, mlflow
mlflow.set_tracking_uri(sys.argv[1]); mlflow.set_registry_uri(sys.argv[1])
x = numpy.load(sys.argv[2])
numpy.save(sys.argv[3], mlflow.pyfunc.load_model("models:/sae-tiny-layer.1@champion").predict(x))
"""


def test_the_champion_loaded_in_a_fresh_process_gives_the_same_codes_bit_for_bit(chain, tmp_path):
    layout = Layout(chain.store)
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "x.npy", x.numpy())
    uri = Tracking(layout).uri
    command = [sys.executable, "-c", LOAD, uri, str(tmp_path / "x.npy"), str(tmp_path / "z.npy")]
    subprocess.run(command, check=True, capture_output=True)
    expected = load_sae(layout.latest("saes").path).encode(x).to_dense().numpy()
    np.testing.assert_array_equal(np.load(tmp_path / "z.npy"), expected)


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
    from feature_store.stream import TokenStream

    original = TokenStream.__iter__

    def spoiled(self):
        for n, batch in enumerate(original(self)):
            yield batch * np.nan if n == 45 else batch

    monkeypatch.setattr(TokenStream, "__iter__", spoiled)
    job = job_in("run")
    with pytest.raises(TrainingError, match="step 46"):
        fit(job)
    assert sorted(path.name for path in (commit.Path(job.folder) / "checkpoints").iterdir())[-1] == "step-00000040"


@pytest.mark.parametrize("change", [{"k": 500}, {"n_features": 3}])
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


@pytest.mark.parametrize("arch", get_args(TrainOptions.model_fields["arch"].annotation))
def test_each_architecture_is_trained_saved_and_registered(ray_local, chain, all_architectures, arch):
    options = chain.train.model_copy(update={"arch": arch, "l1_coefficient": 0.3})
    result = train(options, all_architectures)
    sae, plan = load_sae(result.path), commit.Run.open(result.path).plan
    assert plan["sae"]["arch"] == sae.config.arch == arch
    assert plan["sae"]["l1_coefficient"] == 0.3
    assert (result.path.name, result.facts["select_tokens"] > 0) == (result.run, True)
    assert 0 < result.facts["select_fvu"] < 1
    assert result.facts["registered"].startswith("sae-tiny-layer.1 ")
    assert train(options, all_architectures).done == 0


def test_the_architectures_of_the_command_line_are_those_of_the_package():
    assert set(get_args(TrainOptions.model_fields["arch"].annotation)) == set(ARCHITECTURES)


def test_training_without_activations_says_what_to_run_first(tmp_path):
    with pytest.raises(NotFoundError, match="scsae extract"):
        train(TrainOptions(), tmp_path)


def test_an_unknown_run_lists_those_that_there_are(chain):
    with pytest.raises(NotFoundError, match=Layout(chain.store).latest("activations").run):
        train(chain.train.model_copy(update={"run": "zzz"}), chain.store)


def test_promotion_is_refused_to_a_worse_version(ray_local, chain, tmp_path):
    from pipelines.errors import UsageError
    from pipelines.extract import extract

    extract(chain.extract, tmp_path)
    train(chain.train, tmp_path)
    train(chain.train.model_copy(update={"n_steps": 2}), tmp_path)
    tracking = Tracking(Layout(tmp_path))
    with pytest.raises(UsageError, match="select_fvu"):
        tracking.promote("sae-tiny-layer.1", 2)
    assert tracking.champion("sae-tiny-layer.1").version == 1
    assert tracking.promote("sae-tiny-layer.1", 1).aliases == ("champion",)
