"""The progress of a stage on stderr: a live bar on a terminal, elsewhere a line every few seconds.

Nothing that takes longer than SHOW_AFTER_S is silent: work that can be counted has a bar, and all other work says what
it does (`activity`). Where there is no terminal, both say so again every QUIET_S, whether or not there is progress.

Results go to stdout as tables, so that stderr can be discarded.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pipelines.runtime.visible import visible

LINE_INTERVAL_S = 5.0
SHOW_AFTER_S = 2.0
"""Work that takes less than this shows no progress bar and says nothing."""
QUIET_S = 15.0
"""The longest time without a line where there is no terminal."""


class ProgressCallback(Protocol):
    """The function that a stage calls to report its progress."""

    def __call__(self, completed: int, note: str = "") -> None:
        """Report that `completed` units are done in total; `note` is a short text such as a rate."""


class PlainConsole(Console):
    """A console that prints a text as it is: without markup such as [bold], and with its control characters visible."""

    def __init__(self, **options: Any) -> None:
        # in a notebook, rich would show each line of progress as an output of the cell, which is kept
        super().__init__(highlight=False, markup=False, emoji=False, force_jupyter=False, **options)

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
    lines = _Lines(console, title, total, unit)
    with repeated(lines.repeat, first_s=QUIET_S, every_s=QUIET_S):
        yield lines.report


class _Lines:
    """The progress of a bar where there is no terminal."""

    def __init__(self, console: PlainConsole, title: str, total: int, unit: str) -> None:
        self._console, self._title, self._total, self._unit = console, title, total, unit
        self._started = self._last = time.monotonic()
        self._completed = self._shown = 0
        self._note = ""

    def report(self, completed: int, note: str = "") -> None:
        """Take the progress, and print a line if the last one is long ago, or if all is done."""
        is_news = (completed, note) != (self._completed, self._note)
        self._completed, self._note = completed, note
        is_end = completed >= self._total > self._shown
        if is_end or (is_news and time.monotonic() - self._last >= LINE_INTERVAL_S):
            self._print()

    def repeat(self) -> None:
        """Print a line if there was none for QUIET_S."""
        if time.monotonic() - self._last >= QUIET_S:
            self._print()

    def _print(self) -> None:
        now = time.monotonic()
        self._last, self._shown = now, self._completed
        times = f"{now - self._started:.0f} s"
        if 0 < self._completed < self._total:
            times += f", {(now - self._started) / self._completed * (self._total - self._completed):.0f} s left"
        parts = (f"{self._title:<12}", f"{self._completed}/{self._total}", self._unit, self._note, times)
        self._console.print(" ".join(part for part in parts if part), soft_wrap=True)


@contextlib.contextmanager
def activity(title: str, what: str, *, first_s: float | None = None) -> Iterator[None]:
    """Say what is done while the block runs, from `first_s` (SHOW_AFTER_S) on; for work that cannot be counted.

    >>> with activity("steer", "computes the metrics"):
    ...     evaluate()
    """
    console = stderr_console()
    if console.is_terminal:
        columns = (TextColumn("{task.description:<12}", markup=False), SpinnerColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as shown:
            shown.add_task(visible(f"{title:<12} {what}"), total=None)
            yield
        return
    started = time.monotonic()

    def line() -> None:
        console.print(f"{title:<12} {what}, {time.monotonic() - started:.0f} s", soft_wrap=True)

    with repeated(line, first_s=SHOW_AFTER_S if first_s is None else first_s, every_s=QUIET_S):
        yield


@contextlib.contextmanager
def repeated(call: Callable[[], None], *, first_s: float, every_s: float) -> Iterator[None]:
    """Call `call` in a thread after `first_s` seconds, and again every `every_s`, while the block runs."""
    stopped = threading.Event()

    def repeat() -> None:
        wait = first_s
        while not stopped.wait(wait):
            call()
            wait = every_s

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


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
