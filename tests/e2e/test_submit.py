"""`scsae submit` on a Ray head of its own: the job's outcome is the exit code, and the same recipe is one job."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

from feature_store.layout import Layout

pytestmark = pytest.mark.ray

LIST_JOBS = """
import sys
from ray.job_submission import JobSubmissionClient
for job in sorted(JobSubmissionClient(sys.argv[1]).list_jobs(), key=lambda job: job.start_time):
    print(job.submission_id, job.status.value)
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True, kw_only=True)
class Head:
    """A Ray head with a dashboard on the loopback, and the environment of whoever talks to it."""

    address: str
    environment: dict[str, str]

    def jobs(self):
        """Submission id and status of every job, oldest first."""
        return [line.split() for line in self.python("-c", LIST_JOBS, self.address).stdout.splitlines()]

    def python(self, *arguments):
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=180)


@pytest.fixture(scope="module")
def head():
    # careful: sockets lie below this folder and their paths may have 107 characters
    folder = Path(tempfile.mkdtemp(prefix="scsae", dir="/tmp"))
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SCSAE_", "MLFLOW_"))}
    scripts = Path(sys.executable).parent
    environment = {
        **kept,
        "HOME": str(folder),
        "PATH": f"{scripts}{os.pathsep}{kept['PATH']}",
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    dashboard, agent = free_port(), free_port()
    options = f"--head --block --node-ip-address 127.0.0.1 --port {free_port()} --dashboard-agent-listen-port {agent}"
    options += " --num-cpus 2 --object-store-memory 100000000"
    options += (
        f" --include-dashboard true --dashboard-host 127.0.0.1 --dashboard-port {dashboard} --temp-dir {folder}/r"
    )
    # `ray stop` would stop every Ray on this machine: a blocking head is ended by its own process instead
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(
            [scripts / "ray", "start", *options.split()],
            env=environment,
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        for url in (f"{address}/api/version", f"http://127.0.0.1:{agent}/api/local_raylet_healthz"):
            wait_for(url, process, folder / "head.log")
        yield Head(address=address, environment=environment)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(url, process, log):
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"the Ray head did not come up: {log.read_text()[-2000:]}")


@dataclass(frozen=True, kw_only=True)
class Story:
    """One recipe submitted three times: before its data are there, then with them, then once more."""

    store: Path
    failed: subprocess.CompletedProcess
    done: subprocess.CompletedProcess
    again: subprocess.CompletedProcess
    jobs: list[list[str]]
    times: tuple[dict[Path, int], dict[Path, int]]


@pytest.fixture(scope="module")
def story(head, tmp_path_factory, tiny_data, tiny_model):
    folder = tmp_path_factory.mktemp("submit")
    store, data, recipe = folder / "store", folder / "cells.h5ad", folder / "recipe.yaml"
    # an apostrophe and a dollar sign: the recipe travels through a shell
    recipe.write_text(
        f"# the lab's cells, $HOME\nextract: {{data: {data}, model: {tiny_model}, layer: [1], shard_cells: 36}}\n"
    )

    def submit():
        return head.python("-m", "pipelines.cli", "submit", recipe, "--address", head.address, "--store", store)

    failed = submit()
    shutil.copyfile(tiny_data, data)
    done = submit()
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    again = submit()
    after = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    return Story(store=store, failed=failed, done=done, again=again, jobs=head.jobs(), times=(before, after))


def test_a_job_that_fails_gives_exit_code_1_and_its_own_message(story):
    assert story.failed.returncode == 1, story.failed.stderr
    assert "no file" in story.failed.stdout
    assert "FAILED" in story.failed.stderr
    assert "submit it again to resume" in story.failed.stderr
    assert "Traceback" not in story.failed.stderr


def test_submitted_again_the_failed_recipe_runs_as_a_new_job_to_exit_code_0_with_its_log_followed(story):
    assert story.done.returncode == 0, story.done.stdout + story.done.stderr
    run = Layout(story.store).latest("activations")
    assert f"activations/{run.run}" in story.done.stdout
    assert "extract      2/2 shards" in story.done.stdout


def test_submitted_after_success_the_same_recipe_starts_no_other_job(story):
    assert story.again.returncode == 0
    assert story.again.stdout == story.done.stdout
    assert [status for _, status in story.jobs] == ["FAILED", "SUCCEEDED"]
    first, second = (name for name, _ in story.jobs)
    assert second == f"{first}-1"
    assert story.times[0] == story.times[1]
