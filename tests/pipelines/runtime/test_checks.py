"""Every stage checks its store, its cluster and its tracking server before it reads or computes anything."""

import pytest

from feature_store.errors import StoreWriteError
from feature_store.storage import filesystem
from feature_store.storage.layout import Layout
from pipelines.associate import associate_all
from pipelines.baseline import baseline
from pipelines.config import (
    AssociateOptions,
    BaselineOptions,
    EncodeOptions,
    ExtractOptions,
    MatchOptions,
    Recipe,
    SteerOptions,
    TrainOptions,
)
from pipelines.encode import encode
from pipelines.errors import RunFailedError, UsageError
from pipelines.extract import extract
from pipelines.match import match
from pipelines.recipe import run_recipe
from pipelines.runtime.checks import warn_of_few_draws
from pipelines.steering.run import steer
from pipelines.train import train_all

STAGES = {
    "extract": lambda *place, **where: extract(ExtractOptions(data="absent.h5ad", layer=("1",)), *place, **where),
    "train": lambda *place, **where: train_all(TrainOptions(), *place, **where),
    "encode": lambda *place, **where: encode(EncodeOptions(), *place, **where),
    "associate": lambda *place, **where: associate_all(AssociateOptions(), *place, **where),
    "baseline": lambda *place, **where: baseline(BaselineOptions(), *place, **where),
    "steer": lambda *place, **where: steer(SteerOptions(kind="batch"), *place, **where),
    "recipe": lambda *place, **where: run_recipe(Recipe(train=TrainOptions()), *place, **where),
}


@pytest.mark.parametrize(
    "stage", [*STAGES.values(), lambda *place: match(MatchOptions(), *place)], ids=[*STAGES, "match"]
)
def test_a_store_that_cannot_be_written_is_refused_before_any_work(tmp_path, stage):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StoreWriteError, match="file"):
        stage(tmp_path / "file" / "store")


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_an_address_without_a_cluster_is_refused_before_any_work(tmp_path, monkeypatch, stage):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(UsageError, match=r"127\.0\.0\.1:1"):
        stage(tmp_path / "store", address="127.0.0.1:1")
    assert not list(tmp_path.iterdir())


def test_the_check_of_a_store_leaves_nothing_behind(tmp_path):
    for folder in (tmp_path, tmp_path / "new" / "store"):
        filesystem.check_writable(folder)
    assert not list(tmp_path.iterdir())


def test_a_tracking_server_that_does_not_answer_is_refused_before_a_training_begins(chain, own_store, monkeypatch):
    before = {info.run for info in Layout(own_store).runs("saes")}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(RunFailedError, match=r"127\.0\.0\.1:9.*MLFLOW_TRACKING_URI"):
        train_all(chain.train.model_copy(update={"seed": 77}), own_store)
    assert {info.run for info in Layout(own_store).runs("saes")} == before


def test_gene_sets_that_cannot_be_read_stop_a_recipe_before_its_first_stage(tmp_path):
    recipe = Recipe(
        extract=ExtractOptions(data="absent.h5ad", layer=("1",)), associate=AssociateOptions(gmt=(tmp_path / "no.gmt",))
    )
    with pytest.raises(Exception, match=r"no\.gmt"):
        run_recipe(recipe, tmp_path / "store")
    assert not list(tmp_path.iterdir())


def test_a_warning_before_work_says_that_p_cannot_be_small_and_with_how_many_draws_it_can(capsys):
    warn_of_few_draws(18, "draws of each null", enough="--n-nulls 19 is the fewest that allow it")
    said = capsys.readouterr()
    assert "with 18 draws of each null, p is 0.053 at best" in said.err
    assert "--n-nulls 19" in said.err
    warn_of_few_draws(19, "draws of each null", enough="")
    after = capsys.readouterr()
    assert said.out == after.out == after.err == ""
