"""Progress of a stage on stderr: a live bar on a terminal, a line every few seconds elsewhere.

Results go to stdout as tables; what is said here can be thrown away.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_S = 5.0
PATIENCE_S = 2.0
"""What takes no longer is not shown."""


class Ticker(Protocol):
    """What a stage reports to."""

    def __call__(self, completed: int, note: str = "") -> None:
        """Say that `completed` units are done in all; `note` is a short text such as a rate."""


def stderr_console() -> Console:
    """Return the console for progress and errors."""
    return Console(stderr=True, highlight=False)


@contextlib.contextmanager
def ticking(title: str, total: int, unit: str) -> Iterator[Ticker]:
    """Show `title` with `total` units of work while the block runs."""
    console = stderr_console()
    if console.is_terminal:
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(f"{unit} {{task.fields[note]}}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=total, note="")
            yield lambda completed, note="": bar.update(task, completed=completed, note=note)
        return
    started = last = time.monotonic()
    shown = 0

    def line(completed: int, note: str = "") -> None:
        nonlocal last, shown
        now = time.monotonic()
        if completed > shown and (completed >= total or now - last >= LINE_EVERY_S):
            last, shown = now, completed
            left = (now - started) / completed * (total - completed)
            times = f"{now - started:.0f} s" + (f", {left:.0f} s left" if completed < total else "")
            console.print(f"{title:<12} {completed}/{total} {unit} {note} {times}", soft_wrap=True)

    yield line


@contextlib.contextmanager
def patiently(title: str, total: int, unit: str) -> Iterator[Ticker]:
    """Show progress as `ticking` does once the block has run for PATIENCE_S, and nothing of a shorter one."""
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        shown: Ticker | None = None

        def late(completed: int, note: str = "") -> None:
            nonlocal shown
            if shown is None and time.monotonic() - started > PATIENCE_S:
                shown = stack.enter_context(ticking(title, total, unit))
            if shown is not None:
                shown(completed, note)

        yield late
