"""MLflow: each store has its own database, unless the user named a server."""

import pytest

from feature_store.errors import NotFoundError
from feature_store.layout import Layout
from pipelines.tracking import Tracking


@pytest.fixture(autouse=True)
def unnamed(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)


def log(tracking, run):
    with tracking.run(run, params={"k": 4}, tags={}) as mlflow_run:
        tracking.log_metrics(mlflow_run, {"fvu": 0.25})


def test_two_stores_in_one_process_keep_their_runs_apart(tmp_path):
    one, two = Tracking(Layout(tmp_path / "one")), Tracking(Layout(tmp_path / "two"))
    log(one, "a")
    log(two, "b")
    for store, found, absent in (("one", "a", "b"), ("two", "b", "a")):
        tracking = Tracking(Layout(tmp_path / store))
        assert tracking.uri == f"sqlite:///{(tmp_path / store).resolve()}/mlflow/mlflow.db"
        run = tracking.client.get_run(tracking.find(found))
        assert (run.data.params, run.data.metrics) == ({"k": "4"}, {"fvu": 0.25})
        assert tracking.find(absent) is None


def test_the_server_that_the_environment_names_is_used(tmp_path, monkeypatch):
    uri = f"sqlite:///{tmp_path / 'team.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    log(Tracking(Layout(tmp_path / "one")), "a")
    assert Tracking.existing(Layout(tmp_path / "two")).find("a") is not None
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert Tracking(Layout(tmp_path / "one")).find("a") is None


def test_a_run_that_failed_does_not_count_as_logged(tmp_path):
    tracking = Tracking(Layout(tmp_path))
    with pytest.raises(ZeroDivisionError), tracking.run("a", params={}, tags={}):
        raise ZeroDivisionError
    assert tracking.find("a") is None


def test_reading_the_registry_of_an_empty_store_makes_nothing(tmp_path):
    with pytest.raises(NotFoundError, match="scsae train"):
        Tracking.existing(Layout(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
