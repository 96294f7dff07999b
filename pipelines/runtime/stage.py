"""What all stages share: the result of a stage, a clock, and the run that a stage starts from."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from feature_store.errors import NotFoundError
from feature_store.query.runs import newest_run
from feature_store.storage.layout import Layout, RunInfo

FORMAT_VERSION = 3
"""Part of every run id: raised when the content of a run changes for the same options."""
RANDOM_MODEL = "random-model"
"""The control that a foundation model with random weights is."""


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """The outcome of one call of a stage.

    Attributes:
        kind: kind of run, as its folder in the store is named.
        run: run id.
        path: folder of the run.
        done: units of work (shards, steps, tables) computed by this call.
        reused: units that an earlier call had committed.
        seconds: wall time of this call.
        facts: further numbers to show, by name.
    """

    kind: str
    run: str
    path: Path
    done: int
    reused: int
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)


class Clock:
    """Wall time since it was made, in seconds."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the clock was made."""
        return time.monotonic() - self._started


def parent_run(layout: Layout, kind: str, run: str | None, *, option: str = "--run") -> RunInfo:
    """Return the run of `kind` whose id starts with `run`, or the newest complete one that is no control if it is None.

    Raises:
        NotFoundError: there is none; the message names the command that makes one.
    """
    if run is None:
        return newest_run(layout, kind)
    layout.latest(kind)
    known = [info for info in layout.runs(kind) if info.complete]
    matches = [info for info in known if info.run.startswith(run)]
    if len(matches) != 1:
        raise NotFoundError(
            f"{option} was {run!r}, which names {len(matches) or 'none'} of the complete {kind} runs in {layout.root}: "
            f"{', '.join(info.run for info in known)}"
        )
    return matches[0]
