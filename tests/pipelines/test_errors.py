"""Exit codes follow the error trees, and exit code 2 says that nothing was written."""

import pytest

from feature_store import errors as store_errors
from pipelines.errors import RunFailedError, UsageError, exit_code
from sae_core import errors as core_errors


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("x"), 2),
        (store_errors.InputError("x"), 2),
        (store_errors.NotFoundError("x"), 2),
        (store_errors.QueryError("x"), 2),
        (store_errors.PlanMismatchError("x"), 2),
        (core_errors.ConfigError("x"), 2),
        (core_errors.VocabularyError("x"), 2),
        (core_errors.CheckpointError("x"), 2),
        (RunFailedError("x"), 1),
        (core_errors.TrainingError("x"), 1),
        (store_errors.IntegrityError("x"), 1),
        (store_errors.IncompleteRunError("x"), 1),
        (store_errors.StoreWriteError("x"), 1),
        (store_errors.BusyError("x"), 1),
        (ZeroDivisionError("x"), 1),
    ],
)
def test_input_errors_exit_2_and_run_errors_exit_1(error, code):
    assert exit_code(error) == code


def test_an_error_of_the_input_that_comes_after_a_write_exits_1():
    assert exit_code(UsageError("x"), has_written=True) == 1
