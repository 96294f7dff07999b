"""`scsae submit`: run a recipe as a Ray job through Ray's Jobs API.

The name of the job is a hash of the recipe's text, the store and the variables. Submitting the same again while the job
runs, or after it succeeded, follows that job; after a failure it starts another attempt, which resumes the runs. The
job runs `scsae run` on the head node. The image of the cluster must therefore contain scsae, the store must be on
storage that every node sees, and the paths of a submitted recipe must be absolute or URIs: relative paths are refused.
Ctrl-C ends the command, not the job.
"""

import hashlib
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from feature_store.storage.hashing import run_id
from pipelines.config import DEFAULT_STORE, VARIABLE, Recipe, load_recipe, recipe_text
from pipelines.config.vectors import OBSM
from pipelines.errors import RunFailedError, UsageError
from pipelines.runtime.job_log import JobLog, print_notice

NOT_FOUND = 127
"""Exit code of a shell that does not find the command."""
_LOCATIONS = ("data", "obs", "model", "vectors", "genes", "folder", "gmt")
_ANYWHERE = re.compile(r"/|[A-Za-z][A-Za-z0-9+.-]+://")


def submit_recipe(recipe: Path, *, store: str | None, address: str, env: Sequence[str] = (), wait: bool = True) -> int:
    """Submit a recipe, write the log of its job to stdout, and return 0 when the job has succeeded.

    Args:
        recipe: YAML file on this machine; its text is sent with the job.
        store: root of the store as the nodes of the cluster see it; None takes the one of the recipe.
        address: address of the dashboard of the head.
        env: NAME=VALUE for the processes of the job, or NAME to pass on its value on this machine. Everybody who can
            open the dashboard can read the values, so they must not be secrets.
        wait: False prints the id of the job and returns at once.

    Raises:
        UsageError: the recipe, a path in it or a variable is wrong, no Ray dashboard answers at `address`, or the job
            itself ended with exit code 2.
        RunFailedError: the job failed, was stopped, or can no longer be followed; submitting it again resumes it.
    """
    checked = load_recipe(recipe)
    target = str(store or checked.store or DEFAULT_STORE)
    refuse_relative(checked, target)
    variables = parse_env(env)
    client = _connect(address)
    text = recipe_text(recipe)
    job = _start(client, job_id(text, target, variables), entrypoint(text, target), variables)
    if not wait:
        sys.stdout.write(f"{job}\n")
        return 0
    try:
        info = JobLog(client, job).follow()
    except KeyboardInterrupt:
        print_notice(
            f"{job} is still running: the same command follows it, `ray job stop --address {address} {job}` ends it"
        )
        return 1
    return _outcome(job, info)


def refuse_relative(recipe: Recipe, store: str) -> None:
    """Raise UsageError for a relative path, which the head would look up in another working folder."""
    for name, text in (("store", store), *_locations(recipe)):
        if not _ANYWHERE.match(text):
            raise UsageError(
                f"{name} was {text!r}, a relative path, but a submitted recipe runs on another machine; give an "
                f"absolute path or a URI that every node of the cluster sees (here it is {Path(text).resolve()})"
            )


def _locations(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield every path in the stages of the recipe with the name of its key."""
    for stage in type(recipe).model_fields:
        options = getattr(recipe, stage)
        for one in options if isinstance(options, tuple) else (options,):
            for name, value in getattr(one, "model_options", {}).items():
                # careful: which options are paths only the family knows, so all that have a slash count as such
                if "/" in value:
                    yield f"{stage.replace('_', '-')}.model_option {name}", value
            for key in _LOCATIONS:
                given = getattr(one, key, None)
                for value in given if isinstance(given, tuple) else (given,):
                    if value is not None and value != "mini" and not str(value).startswith((OBSM, VARIABLE)):
                        yield f"{stage.replace('_', '-')}.{key}", str(value)


def parse_env(env: Sequence[str]) -> dict[str, str]:
    """Return the variables given as NAME=VALUE, or as NAME if it is set here; UsageError for anything else."""
    found = {}
    for given in env:
        name, equals, value = given.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UsageError(f"--env was {given!r}; write NAME=VALUE, or NAME to pass on its value on this machine")
        if not equals and name not in os.environ:
            raise UsageError(
                f"--env was {given!r}, but {name} is not set on this machine; set it or write {name}=VALUE"
            )
        found[name] = value if equals else os.environ[name]
    return found


def job_id(recipe: str, store: str, env: Mapping[str, str]) -> str:
    """Return the name of a job: a hash of the recipe, the store and the variables."""
    content: dict[str, Any] = {"recipe": hashlib.sha256(recipe.encode()).hexdigest(), "store": store}
    return f"scsae-{run_id(content | ({'env': dict(env)} if env else {}))}"


def entrypoint(recipe: str, store: str) -> str:
    """Return the shell command of the job. It holds the quoted text of the recipe, so the head needs no file."""
    return f"printf %s {shlex.quote(recipe)} | scsae run /dev/stdin --store {shlex.quote(store)}"


def _connect(address: str) -> Any:
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise UsageError(
            f"no Ray dashboard answers at {address} ({error}); give the address of the head, e.g. http://HEAD:8265"
        ) from None


def _start(client: Any, job: str, command: str, env: Mapping[str, str]) -> str:
    """Start the job unless a job of this name is running or has succeeded; return the id of the job to follow."""
    from ray.job_submission import JobStatus

    earlier = {info.submission_id: info.status for info in client.list_jobs()}
    attempt, name = 0, job
    while name in earlier:
        if earlier[name] not in (JobStatus.FAILED, JobStatus.STOPPED):
            print_notice(f"{name} exists already ({earlier[name].value}); following it")
            return name
        attempt += 1
        name = f"{job}-{attempt}"
    try:
        client.submit_job(entrypoint=command, submission_id=name, runtime_env={"env_vars": dict(env)} if env else {})
    except (RuntimeError, OSError) as error:
        # careful: Ray refuses a duplicate id with HTTP 500, as when two commands submit the same job
        if name not in {info.submission_id for info in client.list_jobs()}:
            raise RunFailedError(f"the cluster did not accept the job ({error}); submit it again") from error
        print_notice(f"{name} was submitted by another command just now; following it")
    else:
        print_notice(f"{name} submitted")
    return name


def _outcome(job: str, info: Any) -> int:
    """Return 0 for a job that succeeded; raise the error with the exit code of the job for any other."""
    from ray.job_submission import JobStatus

    if info.status == JobStatus.SUCCEEDED:
        return 0
    code = info.driver_exit_code
    if code == 2:
        raise UsageError(
            f"{job} {info.status.value} with exit code 2: the recipe or its input is wrong; the log says what"
        )
    if code == NOT_FOUND:
        raise UsageError(
            f"{job} {info.status.value}: the head has no command `scsae`; install it in the cluster's image"
        )
    # the message of a job that has run repeats the end of its log, which was printed already
    why = info.message if code is None else f"exit code {code}"
    raise RunFailedError(f"{job} {info.status.value}: {why}; submit it again to resume")
