"""`scsae submit` on a Ray head of its own: the job's outcome is the exit code, and the same recipe is one job.

One head for all: a first story of one recipe (its data missing, then there, then asked for again), and a second one of
a job that is stopped, submitted again by two at once over bad connections, and left by a third.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from feature_store.storage.layout import Layout
from pipelines.runtime.job_log import LOG_INTERVAL_S

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LIST_JOBS = """
import sys
from ray.job_submission import JobSubmissionClient
for job in sorted(JobSubmissionClient(sys.argv[1]).list_jobs(), key=lambda job: job.start_time):
    print(job.submission_id, job.status.value, (job.runtime_env or {}).get("env_vars", {}).get("SCSAE_NOTE", ""))
"""
STOP_JOB = "import sys; from ray.job_submission import JobSubmissionClient as C; C(sys.argv[1]).stop_job(sys.argv[2])"


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

    def submit(self, recipe, store, *, address=None, options=()):
        """A running `scsae submit`."""
        command = [sys.executable, "-m", "pipelines.cli", "submit", recipe, "--store", store, *options]
        return subprocess.Popen(
            [*map(str, command), "--address", address or self.address],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def ended(process):
    """The finished process with its output."""
    stdout, stderr = process.communicate(timeout=180)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def said(process, words):
    """Read a running process's stderr up to the line with these words; what was read."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if words in line:
            return "".join(lines)
    pytest.fail(f"{words!r} was never said: {''.join(lines)}")


class BadConnection:
    """A proxy before a dashboard: it drops everything once, or lets no websocket through; it notes what was asked."""

    def __init__(self, address, *, drops=False, websockets=True):
        self.target = ("127.0.0.1", int(address.rpartition(":")[2]))
        self.drops, self.websockets = drops, websockets
        self.asked, self.asked_at = [], []
        self.open = []
        self.away = threading.Event()
        self.server = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self.handle, args=[self.server.accept()[0]], daemon=True).start()

    def handle(self, client):
        with contextlib.suppress(OSError), client, socket.create_connection(self.target) as dashboard:
            request = b"" if self.away.is_set() else client.recv(65536)
            self.asked.append(request.partition(b" HTTP")[0].decode())
            self.asked_at.append(time.monotonic())
            if self.away.is_set() or (b"/logs/tail" in request and not self.websockets):
                client.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n" if request else b"")
                return
            dashboard.sendall(request)
            self.open += [client, dashboard]
            threading.Thread(target=pump, args=[client, dashboard], daemon=True).start()
            n_pieces = pump(dashboard, client, 2 if self.drops and b"/logs/tail" in request else None)
            if n_pieces is not None:
                self.drops = False
                self.away.set()
                # careful: closing alone leaves the connection open for the thread that reads from it
                client.shutdown(socket.SHUT_RDWR)
                threading.Timer(2.5, self.away.clear).start()

    def times_of(self, end):
        """When addresses with this end were asked for, in seconds."""
        return [at for line, at in zip(self.asked, self.asked_at, strict=True) if line.endswith(end)]

    def close(self):
        for end in (self.server, *self.open):
            end.close()


def pump(source, target, n_pieces=None):
    """Copy until the end; after `n_pieces`, if given, stop in the middle and return their number."""
    with contextlib.suppress(OSError):
        n_done = 0
        while data := source.recv(65536):
            target.sendall(data)
            n_done += 1
            if n_done == n_pieces:
                return n_done
        target.shutdown(socket.SHUT_WR)
    return None


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


# the recipe travels through a shell: whatever it holds is text
AWKWARD = """# the lab's "cells", $HOME `touch {folder}/owned` $(touch {folder}/owned) \\n %s %d
# <<'RECIPE'
# RECIPE
"""


@pytest.fixture(scope="module")
def story(head, tmp_path_factory, tiny_data, tiny_model):
    folder = tmp_path_factory.mktemp("submit")
    store, data, recipe = folder / "store", folder / "cells.h5ad", folder / "recipe.yaml"
    body = f"extract: {{data: {data}, model: {tiny_model}, layer: [1], shard_cells: 36}}\n"
    # a line that ended the here-document of an earlier version, inside a block of text that YAML leaves alone
    recipe.write_text(AWKWARD.format(folder=folder) + body + "store: >\n  /nowhere/RECIPE\n")

    def submit(*options):
        return ended(head.submit(recipe, store, options=options))

    failed = submit()
    shutil.copyfile(tiny_data, data)
    done = submit()
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    again = submit()
    after = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    return Story(store=store, failed=failed, done=done, again=again, jobs=head.jobs(), times=(before, after))


def test_a_job_whose_input_is_wrong_gives_its_own_message_and_its_exit_code_2(story):
    assert story.failed.returncode == 2, story.failed.stderr
    assert "no file" in story.failed.stdout
    assert "FAILED with exit code 2" in story.failed.stderr
    assert "Traceback" not in story.failed.stderr


def test_submitted_again_the_failed_recipe_runs_as_a_new_job_to_exit_code_0_with_its_log_followed(story):
    assert story.done.returncode == 0, story.done.stdout + story.done.stderr
    run = Layout(story.store).latest("activations")
    assert f"activations/{run.run}" in story.done.stdout
    assert "extract      2/2 shards" in story.done.stdout


def test_submitted_after_success_the_same_recipe_starts_no_other_job(story):
    assert story.again.returncode == 0
    assert story.again.stdout == story.done.stdout
    assert [job[1] for job in story.jobs] == ["FAILED", "SUCCEEDED"]
    first, second = (job[0] for job in story.jobs)
    assert second == f"{first}-1"
    assert story.times[0] == story.times[1]


def test_a_recipe_s_text_is_never_run_by_the_shell_it_travels_through(story):
    assert not (story.store.parent / "owned").exists()


@dataclass(frozen=True, kw_only=True)
class Crowd:
    """A recipe that was stopped, then submitted by two at once, one of whom is cut off and one has no websocket."""

    stopped: subprocess.CompletedProcess
    cut_off: subprocess.CompletedProcess
    no_websocket: subprocess.CompletedProcess
    left: subprocess.CompletedProcess
    not_waiting: subprocess.CompletedProcess
    asked: dict[str, list[str]]
    fetched_at: list[float]
    """When the whole log was fetched for the one without a websocket."""
    jobs: list[list[str]]


@pytest.fixture(scope="module")
def crowd(head, story, tmp_path_factory, tiny_data, tiny_model):
    folder = tmp_path_factory.mktemp("crowd")
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"extract: {{data: {tiny_data}, model: {tiny_model}, layer: [1, 2], shard_cells: 12}}\n")
    options = ("--env", "SCSAE_NOTE=noted")
    stopped = head.submit(recipe, folder / "store", options=options)
    job = said(stopped, "submitted").split()[0]
    head.python("-c", STOP_JOB, head.address, job)
    stopped = ended(stopped)
    proxies = {
        "cut_off": BadConnection(head.address, drops=True),
        "plain": BadConnection(head.address, websockets=False),
    }
    try:
        both = [head.submit(recipe, folder / "store", address=p.address, options=options) for p in proxies.values()]
        heard = [said(process, f"{job}-1") for process in both]
        leaving = head.submit(recipe, folder / "store", options=options)
        said(leaving, "following it")
        time.sleep(1)
        leaving.send_signal(signal.SIGINT)
        not_waiting = ended(head.submit(recipe, folder / "store", options=(*options, "--no-wait")))
        cut_off, plain = (ended(process) for process in both)
        cut_off.stderr, plain.stderr = heard[0] + cut_off.stderr, heard[1] + plain.stderr
    finally:
        for proxy in proxies.values():
            proxy.close()
    return Crowd(
        stopped=stopped,
        cut_off=cut_off,
        no_websocket=plain,
        left=ended(leaving),
        not_waiting=not_waiting,
        asked={name: proxy.asked for name, proxy in proxies.items()},
        fetched_at=proxies["plain"].times_of("/logs"),
        jobs=[line for line in head.jobs() if line[0].startswith(job)],
    )


class TestCrowd:
    """Several who submit one recipe, through connections that break; these take longer than the story above."""

    def test_a_job_that_was_stopped_gives_exit_code_1_and_how_to_resume(self, crowd):
        assert crowd.stopped.returncode == 1, crowd.stopped.stderr
        assert "STOPPED" in crowd.stopped.stderr
        assert "submit it again to resume" in crowd.stopped.stderr

    def test_two_who_submit_the_same_recipe_at_once_share_one_job(self, crowd):
        assert [job[1] for job in crowd.jobs] == ["STOPPED", "SUCCEEDED"]
        assert crowd.cut_off.returncode == crowd.no_websocket.returncode == 0, crowd.cut_off.stderr
        took = [stderr for stderr in (crowd.cut_off.stderr, crowd.no_websocket.stderr) if "-1 submitted\n" in stderr]
        assert len(took) == 1

    def test_after_a_dropped_connection_the_log_goes_on_where_it_stopped(self, crowd):
        assert "trying again in" in crowd.cut_off.stderr
        assert sum("/logs/tail" in line for line in crowd.asked["cut_off"]) == 2
        assert crowd.cut_off.stdout == crowd.no_websocket.stdout
        # how many shards were left to report depends on when the first job was stopped
        assert re.search(r"next: scsae train --store \S+crowd\S*\s*$", crowd.cut_off.stdout)

    def test_a_log_that_streams_is_never_fetched_whole_and_one_that_cannot_is_fetched_seldom(self, crowd):
        assert not [line for line in crowd.asked["cut_off"] if line.endswith("/logs")]
        # however long the job takes, LOG_INTERVAL_S lie between two that are not the last, at the end of the job
        assert crowd.fetched_at
        assert all(later - earlier >= LOG_INTERVAL_S for earlier, later in pairwise(crowd.fetched_at[:-1]))

    def test_ctrl_c_leaves_the_job_running_and_says_how_to_follow_and_how_to_stop_it(self, crowd):
        assert crowd.left.returncode == 1
        assert "ray job stop --address http://127.0.0.1" in crowd.left.stderr
        assert "Traceback" not in crowd.left.stderr

    def test_no_wait_prints_the_id_of_the_job_and_nothing_else(self, crowd):
        assert crowd.not_waiting.returncode == 0
        assert crowd.not_waiting.stdout.splitlines() == [crowd.jobs[-1][0]]

    def test_variables_reach_the_job(self, crowd):
        assert [job[2] for job in crowd.jobs] == ["noted", "noted"]
