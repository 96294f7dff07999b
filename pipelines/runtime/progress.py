"""The progress of a stage on stderr: a live bar on a terminal, elsewhere a line every few seconds.

Results go to stdout as tables, so that stderr can be discarded.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipelines.runtime.visible import visible

LINE_INTERVAL_S = 5.0
SHOW_AFTER_S = 2.0
"""Work that takes less than this shows no progress bar."""


class ProgressCallback(Protocol):
    """The function that a stage calls to report its progress."""

    def __call__(self, completed: int, note: str = "") -> None:
        """Report that `completed` units are done in total; `note` is a short text such as a rate."""


class PlainConsole(Console):
    """A console that prints a text as it is: without markup such as [bold], and with its control characters visible."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print texts, each on one line, and other objects of rich."""
        super().print(*(visible(one) if isinstance(one, str) else one for one in objects), **options)


def stderr_console() -> PlainConsole:
    """Return the console for progress, warnings and errors."""
    return PlainConsole(stderr=True)


@contextlib.contextmanager
def progress_bar(title: str, total: int, unit: str) -> Iterator[ProgressCallback]:
    """Show a progress bar of `total` units of work while the block runs; yield the function to report to."""
    console = stderr_console()
    if console.is_terminal:
        columns = (
            TextColumn("{task.description:<12}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(f"{unit} {{task.fields[note]}}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(visible(title), total=total, note="")
            yield lambda completed, note="": bar.update(task, completed=completed, note=visible(note))
        return
    started = last = time.monotonic()
    shown = 0

    def line(completed: int, note: str = "") -> None:
        nonlocal last, shown
        now = time.monotonic()
        if completed > shown and (completed >= total or now - last >= LINE_INTERVAL_S):
            last, shown = now, completed
            left = (now - started) / completed * (total - completed)
            times = f"{now - started:.0f} s" + (f", {left:.0f} s left" if completed < total else "")
            console.print(f"{title:<12} {completed}/{total} {unit} {note} {times}", soft_wrap=True)

    yield line


@contextlib.contextmanager
def delayed_progress_bar(title: str, total: int, unit: str) -> Iterator[ProgressCallback]:
    """Show a progress bar as `progress_bar` does, but only once the block has run for SHOW_AFTER_S."""
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        shown: ProgressCallback | None = None

        def late(completed: int, note: str = "") -> None:
            nonlocal shown
            if shown is None and time.monotonic() - started > SHOW_AFTER_S:
                shown = stack.enter_context(progress_bar(title, total, unit))
            if shown is not None:
                shown(completed, note)

        yield late
