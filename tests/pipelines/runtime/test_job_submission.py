"""What `scsae submit` decides without a cluster: a job's name and command, paths, variables, how a log is followed."""

import asyncio
import shlex
import subprocess
from types import SimpleNamespace

import pytest
from ray.job_submission import JobStatus

from pipelines.config import Recipe
from pipelines.errors import RunFailedError, UsageError
from pipelines.runtime import job_log, job_submission

AWKWARD = [
    "",
    "it's",
    '"quoted"',
    "$HOME `id` $(id)",
    "a\\nb \\\\ %s",
    "RECIPE\n<<'RECIPE'",
    "é\t\r\n\n",
    "-n",
    "'\"'\"'",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_any_recipe_reaches_the_job_s_standard_input_byte_for_byte(text, tmp_path):
    fake = tmp_path / "scsae"
    fake.write_text('#!/bin/sh\ncat "$2"; printf "|%s" "$@"\n')
    fake.chmod(0o755)
    command = job_submission.entrypoint(text, "/a store/it's")
    done = subprocess.run(
        ["sh", "-c", command], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, check=True
    )
    assert done.stdout.decode() == f"{text}|run|/dev/stdin|--store|/a store/it's"


def test_the_job_s_exit_code_is_that_of_scsae_and_not_of_the_shell_before_it(tmp_path):
    fake = tmp_path / "scsae"
    fake.write_text("#!/bin/sh\nexit 2\n")
    fake.chmod(0o755)
    command = ["sh", "-c", job_submission.entrypoint("x" * 100_000, "/store")]
    assert subprocess.run(command, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=False).returncode == 2
    assert shlex.split(job_submission.entrypoint("x", "/s"))[-2:] == ["--store", "/s"]


def test_a_job_is_named_by_recipe_store_and_variables():
    names = {
        job_submission.job_id("a", "/s", {}),
        job_submission.job_id("b", "/s", {}),
        job_submission.job_id("a", "/t", {}),
        job_submission.job_id("a", "/s", {"X": "1"}),
    }
    assert len(names) == 4
    assert job_submission.job_id("a", "/s", {}) in names


ABSOLUTE = {
    "extract": {"data": "/shared/a.h5ad", "model": "mini", "layer": ["1"]},
    "associate": {"gmt": ["/shared/c.gmt"]},
}


def test_absolute_paths_uris_and_the_model_in_the_box_are_accepted():
    job_submission.refuse_relative(Recipe(**ABSOLUTE), "/shared/store")
    job_submission.refuse_relative(Recipe(), "s3://bucket/store")
    job_submission.refuse_relative(Recipe(extract={"data": "/a.h5ad", "genes": "hvg:1200"}), "/shared/store")


@pytest.mark.parametrize(
    ("recipe", "store", "named"),
    [
        (Recipe(), "scsae-store", "store was 'scsae-store'"),
        (Recipe(extract={"data": "a.h5ad"}), "/s", r"extract\.data was 'a\.h5ad'"),
        (Recipe(extract={"data": "/a.h5ad", "model": "./m"}), "/s", r"extract\.model was './m'"),
        (Recipe(extract={"data": "~/a.h5ad"}), "/s", r"extract\.data was '~/a\.h5ad'"),
        (Recipe(extract={"data": "/a.h5ad", "genes": "g.txt"}), "/s", r"extract\.genes was 'g\.txt'"),
        (Recipe(associate={"gmt": ["/a.gmt", "b.gmt"]}), "/s", r"associate\.gmt was 'b\.gmt'"),
    ],
)
def test_a_relative_path_is_refused_by_name_since_the_head_has_another_working_folder(recipe, store, named):
    with pytest.raises(UsageError, match=named):
        job_submission.refuse_relative(recipe, store)


def test_variables_are_given_by_value_or_taken_from_here(monkeypatch):
    monkeypatch.setenv("SCSAE_DATA", "/data")
    assert job_submission.parse_env(["A=1=2", "SCSAE_DATA", "EMPTY="]) == {
        "A": "1=2",
        "SCSAE_DATA": "/data",
        "EMPTY": "",
    }


@pytest.mark.parametrize("given", ["1A=x", "=x", "A B=1", "SCSAE_NOT_SET"])
def test_a_variable_that_is_none_is_refused(given, monkeypatch):
    monkeypatch.delenv("SCSAE_NOT_SET", raising=False)
    with pytest.raises(UsageError, match="--env was"):
        job_submission.parse_env([given])


class Dashboard:
    """A client whose log and job do what the test says: pieces of the log, None for silence, or an error to raise."""

    def __init__(self, streams, statuses, log=""):
        self.streams, self.statuses, self.log = list(streams), list(statuses), log
        self.n_fetched = 0

    async def tail_job_logs(self, job):
        for piece in self.streams.pop(0) if len(self.streams) > 1 else self.streams[0]:
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                await asyncio.sleep(60)
            yield piece

    def get_job_info(self, job):
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        if isinstance(status, Exception):
            raise status
        return SimpleNamespace(status=status)

    def get_job_logs(self, job):
        self.n_fetched += 1
        return self.log


@pytest.fixture
def quick(monkeypatch):
    for name, seconds in {
        "POLL_S": 0.01,
        "QUIET_S": 0.05,
        "SILENT_S": 0.2,
        "RETRY_S": 0.3,
        "LONGEST_PAUSE_S": 0.05,
    }.items():
        monkeypatch.setattr(job_log, name, seconds)


def follow(dashboard):
    return job_log.JobLog(dashboard, "scsae-1").follow()


GONE = RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
BROKEN = RuntimeError("Request failed with status code 502: Bad Gateway.")


def test_a_log_cut_in_the_middle_of_a_line_is_written_once(quick, capsys):
    dashboard = Dashboard([["one\ntw", GONE], ["one\n", "two\nthree\n"]], [JobStatus.SUCCEEDED])
    follow(dashboard)
    assert capsys.readouterr().out == "one\ntwo\nthree\n"
    assert dashboard.n_fetched == 0


def test_a_dashboard_that_comes_back_is_followed_again_and_said_to_have_been_away(quick, capsys):
    follow(Dashboard([["one\n"], ["one\n", "two\n"]], [BROKEN, ConnectionError("refused"), JobStatus.SUCCEEDED]))
    shown = capsys.readouterr()
    assert shown.out == "one\ntwo\n"
    assert "502" in shown.err


def test_a_dashboard_that_stays_away_is_given_up_with_what_to_do(quick, capsys):
    with pytest.raises(RunFailedError, match=r"scsae-1.*submit it again"):
        follow(Dashboard([["one\n", GONE], [ConnectionError("refused")]], [JobStatus.RUNNING]))


def test_a_connection_that_died_without_a_word_is_replaced_while_the_job_runs(quick, capsys):
    statuses = [JobStatus.RUNNING] * 8 + [JobStatus.SUCCEEDED]
    dashboard = Dashboard([["one\n", None], ["one\n", "two\n"]], statuses, log="one\ntwo\n")
    follow(dashboard)
    assert capsys.readouterr().out == "one\ntwo\n"


def test_the_rest_of_a_finished_job_s_log_is_fetched_where_its_stream_fell_silent(quick, capsys):
    dashboard = Dashboard([["one\n", None]], [JobStatus.SUCCEEDED], log="one\ntwo\n")
    follow(dashboard)
    assert capsys.readouterr().out == "one\ntwo\n"
    assert dashboard.n_fetched == 1


def test_streams_that_end_before_their_job_are_given_up_for_the_whole_log(quick, capsys):
    dashboard = Dashboard([["one\n"]] * 3, [JobStatus.RUNNING] * 20 + [JobStatus.FAILED], log="one\ntwo\n")
    assert follow(dashboard).status == JobStatus.FAILED
    assert capsys.readouterr().out == "one\ntwo\n"
    assert dashboard.n_fetched == 1


def test_a_job_that_a_restarted_head_has_forgotten_is_said_to_be_resumable(quick):
    with pytest.raises(RunFailedError, match=r"scsae-1.*submit it again"):
        follow(Dashboard([["one\n"]], [RuntimeError("Request failed with status code 404: no such job")]))


def test_an_error_that_is_not_of_the_connection_is_not_retried(quick):
    with pytest.raises(ZeroDivisionError):
        follow(Dashboard([[ZeroDivisionError()]], [JobStatus.RUNNING]))


@pytest.mark.parametrize(
    ("status", "code", "error", "words"),
    [
        (JobStatus.FAILED, 2, UsageError, "exit code 2"),
        (JobStatus.FAILED, 127, UsageError, "no command `scsae`"),
        (JobStatus.FAILED, 1, RunFailedError, "exit code 1.*submit it again"),
        (JobStatus.FAILED, -9, RunFailedError, "exit code -9"),
        (JobStatus.FAILED, None, RunFailedError, "the supervisor died"),
        (JobStatus.STOPPED, None, RunFailedError, "STOPPED"),
    ],
)
def test_a_job_s_end_is_the_error_that_has_its_exit_code(status, code, error, words):
    info = SimpleNamespace(status=status, driver_exit_code=code, message="the supervisor died")
    with pytest.raises(error, match=words):
        job_submission._outcome("scsae-1", info)
    assert job_submission._outcome("scsae-1", SimpleNamespace(status=JobStatus.SUCCEEDED)) == 0
