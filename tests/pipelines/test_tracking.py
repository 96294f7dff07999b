"""MLflow: each store has its own database, unless the user named a server; a store run has one run there."""

import subprocess
import sys

import pytest

from feature_store.errors import NotFoundError, StoreWriteError
from feature_store.storage.layout import Layout
from pipelines.errors import RunFailedError, UsageError
from pipelines.tracking import Tracking


@pytest.fixture(autouse=True)
def unnamed(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)


@pytest.fixture(scope="module")
def tracking(tmp_path_factory):
    """A store to log into; each test takes its own names of runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return Tracking(Layout(tmp_path_factory.mktemp("tracking")))


def log(tracking, run, *, k=4):
    with tracking.run(run, params={"k": k}, tags={}) as mlflow_run:
        tracking.log_metrics(mlflow_run, {"fvu": 0.25})


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_server_that_the_environment_names_is_used(tmp_path, monkeypatch):
    uri = f"sqlite:///{tmp_path / 'team.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    log(Tracking(Layout(tmp_path / "one")), "a")
    assert Tracking.existing(Layout(tmp_path / "two")).find("a") is not None
    assert not (tmp_path / "one").exists()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert Tracking(Layout(tmp_path / "one")).find("a") is None


def test_control_characters_of_parameters_and_tags_are_logged_as_visible_text(tracking):
    with tracking.run("hostile", params={"label": "T\x1b[31m"}, tags={"scsae.question": "a\u202e -> b\n"}) as found:
        pass
    logged = tracking.client.get_run(found).data
    assert logged.params["label"] == r"T\x1b[31m"
    assert logged.tags["scsae.question"] == r"a\u202e -> b\n"


def test_a_run_that_failed_does_not_count_as_logged(tracking):
    with pytest.raises(ZeroDivisionError), tracking.run("failed", params={}, tags={}):
        raise ZeroDivisionError
    assert tracking.find("failed") is None


@pytest.mark.parametrize("left", ["RUNNING", "FAILED"])
def test_what_a_crash_left_is_taken_up_and_nothing_is_in_it_twice(tracking, left):
    log(tracking, left)
    first = tracking.find(left)
    tracking.client.update_run(first, status=left)
    # the code that takes it up may differ from what crashed, and a parameter cannot be changed
    log(tracking, left, k=5)
    assert [(run.info.run_id, run.info.status) for run in tracking.logged(left)] == [(first, "FINISHED")]
    assert [m.value for m in tracking.client.get_metric_history(first, "fvu")] == [0.25]
    assert tracking.client.get_run(first).data.params == {"k": "4"}


def test_a_value_that_is_not_finite_is_left_out(tracking):
    with tracking.run("finite", params={}, tags={}) as run:
        tracking.log_metrics(run, {"fvu": float("nan"), "l0": 3.0})
    assert tracking.client.get_run(run).data.metrics == {"l0": 3.0}


LOG = """
import sys
from feature_store.storage.layout import Layout
from pipelines.tracking import Tracking
print("imported", flush=True)
sys.stdin.readline()
tracking = Tracking(Layout(sys.argv[1]))
with tracking.exclusive():
    if tracking.find("a") is None:
        with tracking.run("a", params={"k": 4}, tags={}) as run:
            tracking.log_metrics(run, {"fvu": 0.25})
"""


@pytest.mark.slow
def test_two_drivers_that_open_a_fresh_store_at_once_log_one_run(tmp_path):
    command = [sys.executable, "-c", LOG, str(tmp_path / "store")]
    drivers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for driver in drivers:
        driver.stdout.readline()
    for driver in drivers:
        driver.communicate("go\n", timeout=240)
    assert [driver.returncode for driver in drivers] == [0, 0]
    assert [run.info.status for run in Tracking(Layout(tmp_path / "store")).logged("a")] == ["FINISHED"]


def test_reading_the_registry_of_an_empty_store_makes_nothing(tmp_path):
    with pytest.raises(NotFoundError, match="scsae train"):
        Tracking.existing(Layout(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_a_database_that_cannot_be_written_is_read_and_its_error_is_clear(tracking, monkeypatch, tmp_path):
    log(tracking, "written")
    database = tracking.layout.mlflow_dir / "mlflow.db"
    # MLflow makes a folder of this name where it is
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///file:{database}?mode=ro&uri=true")
    reading = Tracking.existing(tracking.layout)
    assert reading.find("written") is not None
    with (
        pytest.raises(StoreWriteError, match=r"mode=ro.*MLFLOW_TRACKING_URI"),
        reading.exclusive(),
    ):
        log(reading, "refused")
    with pytest.raises(StoreWriteError, match="mode=ro"):
        reading.check_writable()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "mlflow").write_text("a file")
    with pytest.raises(StoreWriteError, match="mlflow"):
        Tracking(Layout(tmp_path))


def test_a_server_that_does_not_answer_is_named_and_the_command_can_be_repeated(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(RunFailedError, match=r"http://127\.0\.0\.1:9.*MLFLOW_TRACKING_URI"):
        Tracking(Layout(tmp_path))


def test_an_address_that_mlflow_does_not_know_is_an_error_of_the_input(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "htp://team")
    with pytest.raises(UsageError, match="htp://team"):
        Tracking(Layout(tmp_path))
