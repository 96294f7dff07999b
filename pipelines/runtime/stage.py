"""What all stages share: the result of a stage, and a clock."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from feature_store.query.html_table import html_table


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

    def _repr_html_(self) -> str:
        return html_table(f"{self.kind}/{self.run}", self._rows().items())

    def _rows(self) -> Mapping[str, Any]:
        """What a notebook shows of the result, by name."""
        return {
            "folder": self.path,
            "computed now": self.done,
            "already there": self.reused,
            "seconds": f"{self.seconds:.1f}",
            **self.facts,
        }


class StageResults(list[StageResult]):
    """The results of a call that makes several runs: a list, which a notebook shows as tables."""

    def _repr_html_(self) -> str:
        return "".join(result._repr_html_() for result in self)


class Clock:
    """Wall time since it was made, in seconds."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the clock was made."""
        return time.monotonic() - self._started
