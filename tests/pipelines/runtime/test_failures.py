"""The cause of a failure is found inside the wrappers of Ray; one that can be mended is one line with the command."""

import errno
import os

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import ControllerError

from feature_store.errors import InputError
from pipelines.errors import ON_PURPOSE, RunFailedError, exit_code
from pipelines.runtime.failures import explained, root_cause
from sae_core.errors import CheckpointError, TrainingError

TOLD = 'Traceback (most recent call last):\n  File "x.py", line 1, in shard\n\x1b[36mValueError\x1b[0m: no'


def of_actor(cause):
    """What `ray.get` raises: an instance of RayTaskError and of the cause's class at once."""
    return RayTaskError("shard", TOLD, cause, proctitle="ray::A", pid=1, ip="0").as_instanceof_cause()


def of_training(*causes):
    return WorkerGroupError("several lines", {i: UserExceptionWithTraceback(one, TOLD) for i, one in enumerate(causes)})


@pytest.mark.parametrize(
    "wrap",
    [
        of_actor,
        of_training,
        lambda cause: of_training(RuntimeError("connection closed by peer"), cause),
        lambda cause: ControllerError(of_training(cause)),
        lambda cause: of_actor(of_actor(cause)),
        lambda cause: from_(RuntimeError("outer"), of_training(cause)),
    ],
)
@pytest.mark.parametrize("cause", [CheckpointError("weights"), InputError("nan"), TrainingError("loss")])
def test_an_error_raised_on_purpose_is_found_behind_every_wrapper_and_is_not_the_wrapper(wrap, cause):
    found = root_cause(wrap(cause))
    assert found is cause
    assert "\x1b" not in str(found)


def from_(error, cause):
    error.__cause__ = cause
    return error


def test_an_unexpected_error_keeps_the_traceback_of_its_actor_in_plain_text():
    cause = ZeroDivisionError("no")
    found = root_cause(of_actor(cause))
    assert found is cause
    assert explained(found) is found
    (note,) = found.__notes__
    assert 'File "x.py"' in note
    assert "\x1b" not in note
    assert root_cause(of_actor(cause)).__notes__ == [note], "it is noted once"


def test_an_error_without_a_wrapper_is_itself():
    error = ZeroDivisionError()
    assert root_cause(error) is error


class SqlError(Exception):
    """Stands for the errors of libraries that have a base of their own."""


SqlError.__module__ = "sqlalchemy.exc"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "--num-actors"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore"), "--batch-tokens"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "--num-actors"),
        (RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors"), "--num-gpus 0"),
        (OSError(errno.ENOSPC, "No space left on device", "part"), "free space"),
        (OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"), "free space"),
        (SqlError("(sqlite3.OperationalError) database or disk is full"), "free space"),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "part-00001"), "part-00001"),
        (ActorDiedError(), "Ray"),
        (OutOfMemoryError("Task was killed due to the node running low on memory.\nMemory on the node"), "memory"),
    ],
)
def test_a_failure_of_a_library_that_can_be_mended_is_one_line_with_the_next_command(error, words):
    found = explained(root_cause(of_actor(error) if not isinstance(error, ActorDiedError) else error))
    assert isinstance(found, RunFailedError)
    assert words in str(found)
    assert "run the same command again" in str(found)
    assert "\n" not in str(found)
    assert exit_code(found) == 1


def test_a_fault_of_the_program_is_not_explained_away():
    for error in (KeyError("CUDA error"), RuntimeError("size mismatch"), ValueError("out of memory")):
        assert explained(error) is error
        assert not isinstance(error, ON_PURPOSE)
