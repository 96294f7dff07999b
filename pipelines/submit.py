"""`scsae submit`: a recipe as a Ray job, over the Jobs API.

The recipe's content is the idempotency key: submitting the same recipe for the same store while it runs, or after it
succeeded, follows the job that is there. The job runs `scsae run` on the head node, so the cluster's image holds scsae
and the store is on storage that every node sees.
"""

import hashlib
import shlex
import sys
import time
from pathlib import Path

from feature_store.layout import run_id
from pipelines.config import DEFAULT_STORE, load_recipe
from pipelines.errors import RunFailedError, UsageError

POLL_S = 1.0


def submit_recipe(recipe: Path, *, store: Path | None, address: str) -> int:
    """Submit, follow the log to stdout, and return the job's exit code (0 succeeded, 1 anything else).

    Raises:
        UsageError: the recipe is wrong, or no Ray dashboard answers at `address`.
    """
    checked = load_recipe(recipe)
    from ray.job_submission import JobStatus, JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"no Ray dashboard answers at {address} ({error}); give the head's, e.g. http://HEAD:8265"
        ) from None
    text = recipe.read_text()
    target = (store or checked.store or DEFAULT_STORE).resolve()
    job = f"scsae-{run_id({'recipe': hashlib.sha256(text.encode()).hexdigest(), 'store': str(target)})}"
    job = _start(client, job, text, target)
    followed = 0
    while True:
        status = client.get_job_status(job)
        log = client.get_job_logs(job)
        sys.stdout.write(log[followed:])
        sys.stdout.flush()
        followed = len(log)
        if status.is_terminal():
            break
        time.sleep(POLL_S)
    if status == JobStatus.SUCCEEDED:
        return 0
    raise RunFailedError(f"job {job} ended as {status}: {client.get_job_info(job).message}; submit it again to resume")


def _start(client: "object", job: str, recipe: str, store: Path) -> str:
    """Start the job unless a job of this content is running or done; return the id of the job to follow."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    assert isinstance(client, JobSubmissionClient)
    earlier = {info.submission_id: info.status for info in client.list_jobs()}
    attempt, name = 0, job
    while name in earlier:
        if earlier[name] not in (JobStatus.FAILED, JobStatus.STOPPED):
            return name
        attempt += 1
        name = f"{job}-{attempt}"
    command = f"scsae run /dev/stdin --store {shlex.quote(str(store))} <<'RECIPE'\n{recipe}\nRECIPE"
    try:
        return str(client.submit_job(entrypoint=command, submission_id=name))
    except RuntimeError as error:
        # careful: another submission of the same content won the race; a duplicate id is refused with HTTP 500
        if name in {info.submission_id for info in client.list_jobs()}:
            return name
        raise RunFailedError(f"the cluster did not take the job ({error}); submit it again") from error
