"""The errors of `pipelines`, and the exit code of every error.

PipelineError
├── UsageError      a command, recipe or option is wrong; nothing was written
└── RunFailedError  a run failed or was interrupted; the same command resumes it

Exit codes: 0 the command has finished; 1 a run failed and can be resumed; 2 the input or the options are wrong, and
nothing was written.
"""

from feature_store import errors as store_errors
from sae_core import errors as core_errors


class PipelineError(Exception):
    """The base of all errors that `pipelines` raises on purpose."""


class UsageError(PipelineError, ValueError):
    """A command, recipe or option is wrong; nothing was written."""


class RunFailedError(PipelineError, RuntimeError):
    """A run failed or was interrupted; the same command resumes it."""


ON_PURPOSE = (PipelineError, store_errors.StoreError, core_errors.SaeCoreError)
"""The bases of all errors raised on purpose; the user sees their message without a traceback."""

_RUN_FAILED = (
    RunFailedError,
    store_errors.IntegrityError,
    store_errors.IncompleteRunError,
    store_errors.StoreWriteError,
    store_errors.BusyError,
    core_errors.TrainingError,
)


def exit_code(error: BaseException) -> int:
    """Return 1 for an error of a run that can be resumed and for an unexpected error, 2 for an error of the input."""
    return 1 if isinstance(error, _RUN_FAILED) or not isinstance(error, ON_PURPOSE) else 2


def root_cause(error: BaseException) -> BaseException:
    """Return the error raised on purpose inside the wrappers of Ray, or `error` itself if there is none."""
    seen: list[BaseException | None] = [error]
    while seen and (current := seen.pop()) is not None:
        if isinstance(current, ON_PURPOSE):
            return current
        failures = getattr(current, "worker_failures", None)
        if isinstance(failures, dict):
            seen.extend(failures.values())
        seen.extend((getattr(current, "cause", None), current.__cause__))
        seen = [e for e in seen if isinstance(e, BaseException)]
    return error
