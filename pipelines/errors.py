"""The errors of `pipelines`, and the exit code of every error.

PipelineError
├── UsageError      a command, recipe or option is wrong; nothing was written
└── RunFailedError  a run failed or was interrupted; the same command resumes it

Exit codes: 0 the command has finished; 1 a run failed and can be resumed; 2 the input or the options are wrong, and
nothing was written. An error of the input that is found only after something was written has exit code 1 as well.
"""

from feature_store import errors as store_errors
from feature_store.credentials import WithoutCredentials
from sae_core import errors as core_errors


class PipelineError(WithoutCredentials):
    """The base of all errors that `pipelines` raises on purpose; its message holds no credentials of an address."""


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


def exit_code(error: BaseException, *, has_written: bool = False) -> int:
    """Return 2 for an error of the input if nothing was written, else 1: a failed run or an unexpected error."""
    is_of_input = isinstance(error, ON_PURPOSE) and not isinstance(error, _RUN_FAILED)
    return 2 if is_of_input and not has_written else 1
