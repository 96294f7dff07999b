"""A command of scsae as a process that is killed again and again, and what it committed.

Killed are processes of the command under test only: they carry an environment variable of their own.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

KINDS = {"actor": "ray::ShardActor", "raylet": "raylet/raylet", "head": "gcs_server", "driver": "pipelines.cli"}
LOST_WORDS = (
    "the Ray session was lost: .* what is committed stays, run the same command again to resume",
    "Ray did not start on this machine .* run the same command again",
    "Failed to connect to GCS within 60 seconds",  # Ray's own, where its head is gone before the first actor is there
)
LOST = (1, "|".join(LOST_WORDS))
ENDS: dict[str, tuple[int, str | None]] = {
    "raylet": LOST,
    "head": LOST,
    "driver": (-signal.SIGKILL, None),
    "interrupt": (1, "interrupted; the same command resumes"),
    "terminate": (1, "interrupted; the same command resumes"),
}
"""Exit code and last words of a command by what was done to it; the death of an actor does not end it."""
GRACE_S = 240
MARK = "SCSAE_TEST_RUN"


class KilledCommand:
    """A command as a process, the parts that it committed below `tables`, and all processes that belong to it.

    `before`: statements of Python that the driver runs first.
    """

    def __init__(
        self, command: Sequence[str], store: Path, home: Path, *, tables: Sequence[str], before: str = ""
    ) -> None:
        self.store, self.mark, self.tables = store, uuid.uuid4().hex, tables
        self.committed: dict[Path, list[tuple[int, int]]] = {}
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SCSAE_"))}
        self.environment = {**kept, "HOME": str(home), "OMP_NUM_THREADS": "1", MARK: self.mark}
        self.command, self.before = [*command, "--store", str(store)], before
        self.driver: Any = None
        self.log = store.parent / f"{self.mark}.log"

    def start(self) -> None:
        """Start the command, in a process group of its own, to which Ctrl-C goes as from a terminal."""
        main = f"{self.before}\nfrom pipelines.cli.app import main\nmain()"
        self.log = self.store.parent / f"{uuid.uuid4().hex}.log"
        with self.log.open("w") as log:
            self.driver = subprocess.Popen(
                [sys.executable, "-c", main, *self.command],
                env=self.environment,
                stdout=log,
                stderr=log,
                process_group=0,
            )

    @property
    def alive(self) -> bool:
        """Whether the driver runs."""
        return self.driver is not None and self.driver.poll() is None

    def look(self) -> int:
        """Note the file of every part when it is first seen committed; return how many are."""
        for table in self.tables:
            for marker in self.store.glob(f"{table}/part-*.json"):
                if marker not in self.committed:
                    self.committed[marker] = identities(marker)
        return len(self.committed)

    def processes(self, kind: str = "") -> list[int]:
        """Ids of the processes of this command; those whose command line holds the words of `kind`."""
        found = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                ours = folder.name.isdigit() and f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes()
                if ours and KINDS.get(kind, "").encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
        return sorted(found)

    def go_on_until(self, n_committed: int) -> None:
        """Let it work, started again if it ended, until so many more parts are committed."""
        if not self.alive:
            self.start()
        goal, deadline = self.look() + n_committed, time.monotonic() + 240
        while self.look() < goal:
            assert self.alive, f"over before the next kill, which would show nothing: {self.log.read_text()[-2000:]}"
            assert time.monotonic() < deadline, "nothing is committed any more"
            time.sleep(0.02)

    def strike(self, kind: str, rng: np.random.Generator) -> None:
        """Kill a process of the kind; the command goes on, or ends as it should."""
        if kind == "interrupt":
            os.killpg(self.driver.pid, signal.SIGINT)
        elif kind == "terminate":
            self.driver.terminate()
        else:
            deadline = time.monotonic() + GRACE_S
            while not (victims := self.processes(kind)):
                assert time.monotonic() < deadline, f"there is no {kind}"
                time.sleep(0.05)
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(rng.choice(victims)), signal.SIGKILL)
        if kind in ENDS:
            code, words = ENDS[kind]
            assert self.driver.wait(timeout=GRACE_S) == code, self.log.read_text()[-2000:]
            assert "Traceback" not in self.log.read_text()
            if words is not None:
                assert matches(words, self.log.read_text()), self.log.read_text()[-2000:]

    def finish(self) -> str:
        """Run to the end; return the log."""
        if not self.alive:
            self.start()
        while self.alive:
            self.look()
            time.sleep(0.05)
        assert self.driver.returncode == 0, self.log.read_text()[-2000:]
        return self.log.read_text()

    def assert_written_once(self) -> None:
        """What was seen committed is the same file still, nothing is half written, and no process is left."""
        self.look()
        now = {marker: identities(marker) for marker in self.committed}
        assert now == self.committed, "a committed part was written again"
        assert list(self.store.rglob(".tmp-*")) == []
        deadline = time.monotonic() + GRACE_S
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert left == []

    def end(self) -> None:
        """Kill what is left."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def matches(words: str, text: str) -> bool:
    """Whether the pattern is in the text, wherever its lines were broken."""
    return re.search(words, " ".join(text.split())) is not None


def identities(marker: Path) -> list[tuple[int, int]]:
    """Inode and time of a marker and of its part."""
    found = [path.stat() for path in (marker, marker.with_suffix(".parquet"))]
    return [(one.st_ino, one.st_mtime_ns) for one in found]
