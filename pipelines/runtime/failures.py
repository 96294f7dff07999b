"""The cause of a failure: the error inside the wrappers of Ray, and the one line that a user needs.

Ray wraps what an actor or a training worker raises: in RayTaskError, whose instances are also instances of the class of
their cause and whose text is a traceback with colour codes; in WorkerGroupError, one for each worker; or in
ControllerError.
`root_cause` is the only place that unwraps them. `explained` turns the errors of libraries that a user can mend (no
memory, no space on the disk, a GPU that failed) into errors of this package with the next command.
"""

import errno
import re
from collections.abc import Iterator

from pipelines.errors import ON_PURPOSE, RunFailedError

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_NO_MEMORY = re.compile(
    r"out of memory|low on memory|can't allocate memory|not enough memory|ALLOC_FAILED|Unable to allocate", re.I
)
_NO_SPACE = re.compile(r"No space left on device|disk is full|Disk quota exceeded|File too large", re.I)
_GPU = re.compile(r"CUDA error|CUDA driver|cuDNN error|CUBLAS_STATUS|NCCL error|No CUDA GPUs", re.I)
_NO_SPACE_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
RESUME = "run the same command again: what is committed is kept"


def root_cause(error: BaseException) -> BaseException:
    """Return the error inside the wrappers of Ray: one raised on purpose if there is any, else the first.

    An error that was not expected carries the traceback of its actor as a note, because Ray sends an error without it.
    """
    inner = list(_unwrapped(error, set()))
    on_purpose = (one for one in inner if isinstance(one, ON_PURPOSE))
    return next(on_purpose, inner[0] if inner else error)


def explained(error: BaseException) -> BaseException:
    """Return a RunFailedError with the next command for an error of a library that a user can mend, else `error`."""
    text = _first_line(str(error)) or type(error).__name__
    if isinstance(error, ON_PURPOSE):
        return error
    if isinstance(error, MemoryError) or (_is_of_library(error) and _NO_MEMORY.search(text)):
        return RunFailedError(
            f"memory ran out ({text}); start fewer actors on a node (--num-actors) or give smaller batches "
            f"(--batch-tokens, --batch-size), then {RESUME}"
        )
    if getattr(error, "errno", None) in _NO_SPACE_CODES or (_is_of_library(error) and _NO_SPACE.search(str(error))):
        return RunFailedError(f"the disk is full ({text}); free space on it, then {RESUME}")
    if isinstance(error, OSError):
        return RunFailedError(f"a file or connection failed ({type(error).__name__}: {text}); mend it, then {RESUME}")
    if _is_of_library(error) and _GPU.search(text):
        return RunFailedError(f"the GPU failed ({text}); {RESUME}, or without a GPU: --num-gpus 0")
    if _is_of_ray(error):
        return RunFailedError(f"Ray failed ({_last_line(str(error))}); {RESUME}")
    return error


def without_colours(text: str) -> str:
    """Return the text without the colour codes of a terminal, which Ray puts into its tracebacks."""
    return _ANSI.sub("", text)


def _unwrapped(error: BaseException, seen: set[int]) -> Iterator[BaseException]:
    """Yield the errors inside `error`, or itself if it is no wrapper."""
    if id(error) in seen:
        return
    seen.add(id(error))
    if not _is_of_ray(error):
        if isinstance(error, ON_PURPOSE) or error.__cause__ is None:
            yield error
            return
        within = list(_unwrapped(error.__cause__, seen))
        yield from (one for one in within if isinstance(one, ON_PURPOSE))
        yield error
        return
    within = [inner for wrapped in _wrapped(error) for inner in _unwrapped(wrapped, seen)]
    for inner in within:
        if not isinstance(inner, ON_PURPOSE) and not getattr(inner, "__notes__", None):
            # the text of these wrappers is the traceback
            inner.add_note(f"inside the actor:\n{without_colours(str(error)).strip()}")
    yield from within or [error]


def _wrapped(error: BaseException) -> list[BaseException]:
    failures = getattr(error, "worker_failures", None)
    found = [*failures.values()] if isinstance(failures, dict) else []
    # careful: instances of RayTaskError hand on every unknown attribute to their cause
    found += [getattr(error, name, None) for name in ("cause", "controller_failure", "_base_exc")]
    found.append(error.__cause__)
    return [one for one in found if isinstance(one, BaseException)]


def _is_of_ray(error: BaseException) -> bool:
    """Return whether an error is one of Ray's own, without importing Ray."""
    return any(cls.__module__.partition(".")[0] == "ray" for cls in type(error).__mro__)


def _is_of_library(error: BaseException) -> bool:
    """Return whether a class of error is one that libraries raise for a failed allocation, device or write."""
    bases = (RuntimeError, OSError, MemoryError)
    return isinstance(error, bases) or type(error).__module__.partition(".")[0] not in ("builtins", "pipelines")


def _first_line(text: str) -> str:
    return next((line.strip() for line in without_colours(text).splitlines() if line.strip()), "")


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(without_colours(text).splitlines()) if line.strip()), "")
