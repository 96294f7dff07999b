"""`scsae submit`: a recipe as a Ray job, over the Jobs API.

The recipe's content, the store and the variables given are the idempotency key: submitting the same again while it
runs, or after it succeeded, follows the job that is there; after a failure it starts the next attempt, which resumes.
The job runs `scsae run` on the head node, so the cluster's image holds scsae and the store is on storage that every
node sees. Hence the rule for paths: those of a submitted recipe are the cluster's, absolute or URIs; a relative one is
refused.

The log comes over one websocket, each character once; after a dropped connection it is taken up where it stopped. Where
no websocket gets through (some proxies), it is fetched whole, but only every LOG_EVERY_S seconds. Ctrl-C ends the
following, not the job.
"""

import asyncio
import hashlib
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from feature_store.storage.layout import run_id
from pipelines.config import DEFAULT_STORE, Recipe, load_recipe
from pipelines.errors import RunFailedError, UsageError
from pipelines.runtime.progress import stderr_console

POLL_S = 1.0
LOG_EVERY_S = 30.0
QUIET_S = 30.0
"""A log this long without a line: ask whether the dashboard is still there and the job still runs."""
SILENT_S = 600.0
"""A log this long without a line: connect anew, as what lies between drops idle connections without a word."""
RETRY_S = 600.0
"""How long a dashboard that went away is waited for."""
LONGEST_PAUSE_S = 30.0
MAX_EARLY_ENDS = 3
"""So many streams may end before their job does; then the log is fetched instead."""
NOT_FOUND = 127
"""Exit code of a shell that does not know the command."""
_LOCATIONS = ("data", "model", "gmt")
_ANYWHERE = re.compile(r"/|[A-Za-z][A-Za-z0-9+.-]+://")


def submit_recipe(recipe: Path, *, store: str | None, address: str, env: Sequence[str] = (), wait: bool = True) -> int:
    """Submit, follow the log to stdout, and return 0 once the job succeeded.

    Args:
        recipe: YAML file on this machine; its text travels.
        store: the store as the cluster's nodes see it; None takes the recipe's.
        address: of the head's dashboard.
        env: NAME=VALUE for the job's processes, or NAME for the value it has here. Anybody who sees the dashboard sees
            them: no secrets.
        wait: False prints the job's id and returns.

    Raises:
        UsageError: the recipe, a path in it or a variable is wrong, no Ray dashboard answers at `address`, or the job
            itself ended so (exit code 2).
        RunFailedError: the job failed, was stopped, or can no longer be followed; submitting again resumes it.
    """
    checked = load_recipe(recipe)
    target = str(store or checked.store or DEFAULT_STORE)
    refuse_relative(checked, target)
    variables = parse_env(env)
    client = _connect(address)
    text = recipe.read_text()
    job = _start(client, job_id(text, target, variables), entrypoint(text, target), variables)
    if not wait:
        sys.stdout.write(f"{job}\n")
        return 0
    try:
        info = _Follower(client, job).follow()
    except KeyboardInterrupt:
        _say(
            f"{job} goes on without you: the same command follows it, `ray job stop --address {address} {job}` ends it"
        )
        return 1
    return _outcome(job, info)


def refuse_relative(recipe: Recipe, store: str) -> None:
    """Raise UsageError for a path that the head would look for in a folder of its own."""
    for name, text in (("store", store), *_locations(recipe)):
        if not _ANYWHERE.match(text):
            raise UsageError(
                f"{name} was {text!r}, a relative path, and a submitted recipe runs on another machine; give the "
                f"absolute path or the URI that every node of the cluster sees (here: {Path(text).resolve()})"
            )


def _locations(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Every path of the recipe's stages, by the name of its key."""
    for stage in type(recipe).model_fields:
        options = getattr(recipe, stage)
        for one in options if isinstance(options, tuple) else (options,):
            for key in _LOCATIONS:
                given = getattr(one, key, None)
                for value in given if isinstance(given, tuple) else (given,):
                    if value is not None and value != "mini":
                        yield f"{stage}.{key}", str(value)


def parse_env(env: Sequence[str]) -> dict[str, str]:
    """Variables by name, of NAME=VALUE or of NAME where it is set here; UsageError for anything else."""
    found = {}
    for given in env:
        name, equals, value = given.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UsageError(f"--env was {given!r}; write NAME=VALUE, or NAME to pass on the value it has here")
        if not equals and name not in os.environ:
            raise UsageError(f"--env was {given!r}, and {name} is not set here; set it or write {name}=VALUE")
        found[name] = value if equals else os.environ[name]
    return found


def job_id(recipe: str, store: str, env: Mapping[str, str]) -> str:
    """The job's name: a hash of all that it is given."""
    content: dict[str, Any] = {"recipe": hashlib.sha256(recipe.encode()).hexdigest(), "store": store}
    return f"scsae-{run_id(content | ({'env': dict(env)} if env else {}))}"


def entrypoint(recipe: str, store: str) -> str:
    """The job's shell command. The recipe travels inside it, quoted: no file has to be there on the head."""
    return f"printf %s {shlex.quote(recipe)} | scsae run /dev/stdin --store {shlex.quote(store)}"


def _connect(address: str) -> Any:
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise UsageError(
            f"no Ray dashboard answers at {address} ({error}); give the head's, e.g. http://HEAD:8265"
        ) from None


def _start(client: Any, job: str, command: str, env: Mapping[str, str]) -> str:
    """Start the job unless a job of this content is running or done; return the id of the job to follow."""
    from ray.job_submission import JobStatus

    earlier = {info.submission_id: info.status for info in client.list_jobs()}
    attempt, name = 0, job
    while name in earlier:
        if earlier[name] not in (JobStatus.FAILED, JobStatus.STOPPED):
            _say(f"{name} is there already ({earlier[name].value}); following it")
            return name
        attempt += 1
        name = f"{job}-{attempt}"
    try:
        client.submit_job(entrypoint=command, submission_id=name, runtime_env={"env_vars": dict(env)} if env else {})
    except (RuntimeError, OSError) as error:
        # careful: another submission of the same content won the race; a duplicate id is refused with HTTP 500
        if name not in {info.submission_id for info in client.list_jobs()}:
            raise RunFailedError(f"the cluster did not take the job ({error}); submit it again") from error
        _say(f"{name} was submitted by somebody else just now; following it")
    else:
        _say(f"{name} submitted")
    return name


class _SilentError(Exception):
    """Nothing came for so long that the connection is taken for dead."""


class _Follower:
    """Writes the log of one job to stdout, each character once, over as many connections as it takes."""

    def __init__(self, client: Any, job: str) -> None:
        self._client = client
        self._job = job
        self._n_written = 0
        self._streams = True
        self._n_early_ends = 0
        self._fetched_at = self._alive_at = time.monotonic()

    def follow(self) -> Any:
        """Return the job's details once it ended. RunFailedError if the dashboard stays away for RETRY_S."""
        while True:
            try:
                if self._streams:
                    asyncio.run(self._stream())
                info = self._ask()
                self._n_early_ends += 1
                self._streams = self._streams and self._n_early_ends < MAX_EARLY_ENDS
                if info.status.is_terminal() or time.monotonic() - self._fetched_at > LOG_EVERY_S:
                    self._fetch()
                if info.status.is_terminal():
                    return info
                time.sleep(POLL_S)
            except _SilentError:
                continue
            except Exception as error:
                if not _is_dropped(error):
                    raise
                self._pause(error)

    async def _stream(self) -> None:
        """Write the log as it comes, until the dashboard ends the stream, as it does when the job is over."""
        import aiohttp

        messages = self._client.tail_job_logs(self._job)
        n_seen = 0
        try:
            while (chunk := await self._next(messages)) is not None:
                self._write(chunk[max(self._n_written - n_seen, 0) :])
                n_seen += len(chunk)
                self._alive_at = time.monotonic()
        except aiohttp.WSServerHandshakeError as error:
            if error.status >= 500:
                raise
            self._streams = False
        finally:
            await messages.aclose()

    async def _next(self, messages: Any) -> str | None:
        """The next piece of the log, None at its end. A connection that died without a word is found out by asking."""
        coming = asyncio.ensure_future(anext(messages, None))
        started = time.monotonic()
        try:
            while not (await asyncio.wait({coming}, timeout=QUIET_S))[0]:
                info = await asyncio.to_thread(self._ask)
                # of a job that is over, the rest is fetched
                self._streams = not info.status.is_terminal()
                if not self._streams or time.monotonic() - started > SILENT_S:
                    raise _SilentError
            piece: str | None = coming.result()
            return piece
        finally:
            coming.cancel()
            # careful: a generator that is still running cannot be closed
            await asyncio.wait({coming})

    def _ask(self) -> Any:
        """Details of the job, from a dashboard that is thereby known to be alive."""
        try:
            info = self._client.get_job_info(self._job)
        except RuntimeError as error:
            if "status code 404" not in str(error):
                raise
            raise RunFailedError(
                f"the cluster no longer knows {self._job}: its head was restarted; submit it again to resume"
            ) from None
        self._alive_at = time.monotonic()
        return info

    def _fetch(self) -> None:
        """Where nothing streams: the whole log, of which the new end is written."""
        if not self._streams:
            log = self._client.get_job_logs(self._job)
            self._write(log[self._n_written :])
            self._fetched_at = time.monotonic()

    def _write(self, text: str) -> None:
        self._n_written += len(text)
        sys.stdout.write(text)
        sys.stdout.flush()

    def _pause(self, error: Exception) -> None:
        """Wait for a dashboard that went away: as long again as it has been away, until RETRY_S."""
        away = time.monotonic() - self._alive_at
        if away > RETRY_S:
            raise RunFailedError(
                f"the dashboard has not answered for {away:.0f} s ({error}); {self._job} may go on: submit it again to "
                "follow or resume it"
            ) from error
        pause = min(max(away, POLL_S), LONGEST_PAUSE_S)
        _say(f"the connection to the dashboard dropped ({error}); trying again in {pause:.0f} s, the job goes on")
        time.sleep(pause)


def _is_dropped(error: Exception) -> bool:
    """Whether an error is of the connection (a dashboard that restarts, a proxy between), not of the job."""
    import aiohttp

    if isinstance(error, (OSError, aiohttp.ClientError)):
        return True
    return isinstance(error, RuntimeError) and bool(re.search(r"WebSocket|status code 5\d\d", str(error)))


def _outcome(job: str, info: Any) -> int:
    """0 for a job that succeeded; the error that has its exit code for any other."""
    from ray.job_submission import JobStatus

    if info.status == JobStatus.SUCCEEDED:
        return 0
    code = info.driver_exit_code
    if code == 2:
        raise UsageError(f"{job} {info.status.value} with exit code 2: the recipe or its input is wrong, see the log")
    if code == NOT_FOUND:
        raise UsageError(
            f"{job} {info.status.value}: the head has no command `scsae`; install it in the cluster's image"
        )
    # the message of a job that ran repeats the end of its log, which is on the screen already
    why = info.message if code is None else f"exit code {code}"
    raise RunFailedError(f"{job} {info.status.value}: {why}; submit it again to resume")


def _say(text: str) -> None:
    stderr_console().print(text, style="yellow", markup=False, soft_wrap=True)
