"""What a command takes: time, CPU seconds of its processes by role, memory of the driver and of one actor, and disk.

Processes are found by an environment variable, because Ray's daemonise. /proc is read every LOOK_S seconds, so the last
LOOK_S of each process are missing. CPU seconds are user plus system. The memory of a process is its peak resident set
(VmHWM), which counts libraries and Ray's shared object store in each process, and the largest of its proportional sets
(PSS), which divides shared pages among the processes that have them. Both are read every MEMORY_S seconds; one actor's
figure is the largest of all actors.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

MARK = "SCSAE_BENCH_RUN"
LOOK_S, MEMORY_S = 0.2, 1.0
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Process:
    """One process of a command, as last seen."""

    role: str
    cpu_s: float = 0.0
    peak_rss_mb: float = 0.0
    peak_pss_mb: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What a command took; MB are 10^6 bytes."""

    wall_s: float
    cpu_s: float
    driver_cpu_s: float
    actors_cpu_s: float
    ray_cpu_s: float
    driver_rss_mb: float
    driver_pss_mb: float
    actor_rss_mb: float
    actor_pss_mb: float
    n_actors: int
    output: str = field(repr=False, default="")

    def as_dict(self) -> dict[str, Any]:
        """The figures, rounded, without the output."""
        return {k: round(v, 2) for k, v in asdict(self).items() if k != "output"}


class Watch:
    """The processes that carry a mark in their environment, from the start of a command to its end."""

    def __init__(self, mark: str) -> None:
        self.mark = f"{MARK}={mark}".encode()
        self.processes: dict[tuple[str, str], Process] = {}
        self._foreign: set[tuple[str, str]] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        n = 0
        while not self._over.wait(LOOK_S):
            self.look(with_memory=n % round(MEMORY_S / LOOK_S) == 0)
            n += 1

    def look(self, *, with_memory: bool) -> None:
        """Read /proc once."""
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    self._read(folder, with_memory)
                except (OSError, ValueError, IndexError, StopIteration):  # it has ended
                    continue

    def _read(self, folder: Path, with_memory: bool) -> None:
        stat = (folder / "stat").read_text().rpartition(")")[2].split()
        # careful: an environment is empty between fork and exec, so a process is not foreign until it has one
        key = (folder.name, stat[19])
        if key in self._foreign:
            return
        environment = (folder / "environ").read_bytes()
        if self.mark not in environment:
            if environment:
                self._foreign.add(key)
            return
        process = self.processes.setdefault(key, Process("other"))
        process.role = self._role(process.role, (folder / "cmdline").read_bytes())
        process.cpu_s = (int(stat[11]) + int(stat[12])) / TICKS
        if with_memory and process.role in ("driver", "actor"):
            process.peak_rss_mb = max(process.peak_rss_mb, _size_mb(folder / "status", "VmHWM:"))
            process.peak_pss_mb = max(process.peak_pss_mb, _size_mb(folder / "smaps_rollup", "Pss:"))

    @staticmethod
    def _role(known: str, command: bytes) -> str:
        if known in ("driver", "actor"):
            return known
        if command.startswith(b"ray::ShardActor") or (command.startswith(b"ray::") and b"Train" in command):
            return "actor"
        if b"pipelines.cli" in command or b"--scale-driver" in command:
            return "driver"
        return "ray" if b"ray" in command else known


def _size_mb(path: Path, name: str) -> float:
    """A size in one of the tables of /proc."""
    line = next(line for line in path.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6


def run(command: Sequence[str], *, checkout: Path | None = None, home: Path, **environment: str) -> Taken:
    """Run a command to its end. SystemExit with its output if it fails. `checkout`: folder whose code it runs."""
    mark = uuid.uuid4().hex
    extra = {
        MARK: mark,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "POLARS_MAX_THREADS": "1",
        "HOME": str(home),
    }
    if checkout is not None:
        extra["PYTHONPATH"] = str(checkout)
    start = time.perf_counter()
    with Watch(mark) as watch:
        done = subprocess.run(
            list(command),
            env={**os.environ, **extra, **environment},
            cwd=checkout,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        wall = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode}: {' '.join(command)}\n{done.stdout}")
    return taken(watch, wall, done.stdout)


def taken(watch: Watch, wall_s: float, output: str = "") -> Taken:
    """The sums and peaks of what was watched."""
    found = watch.processes.values()

    def cpu(*roles: str) -> float:
        return sum(process.cpu_s for process in found if process.role in roles)

    def peak(role: str, name: str) -> float:
        return max((getattr(process, name) for process in found if process.role == role), default=0.0)

    return Taken(
        wall_s=wall_s,
        cpu_s=sum(process.cpu_s for process in found),
        driver_cpu_s=cpu("driver"),
        actors_cpu_s=cpu("actor"),
        ray_cpu_s=cpu("ray", "other"),
        driver_rss_mb=peak("driver", "peak_rss_mb"),
        driver_pss_mb=peak("driver", "peak_pss_mb"),
        actor_rss_mb=peak("actor", "peak_rss_mb"),
        actor_pss_mb=peak("actor", "peak_pss_mb"),
        n_actors=sum(process.role == "actor" for process in found),
        output=output,
    )


def scsae(*arguments: object) -> list[str]:
    """The command line of scsae with this interpreter."""
    return [sys.executable, "-m", "pipelines.cli", *map(str, arguments)]


def bytes_by_folder(root: Path, *, depth: int = 2) -> dict[str, int]:
    """Bytes of the files below each folder, named relative to `root`; the id of a run is left out of the names.

    codes/RUN/by_cell/... counts as codes/by_cell, so that stores of several sizes compare.
    """
    found: dict[str, int] = {}
    for path in root.rglob("*"):
        if path.is_file():
            parts = path.relative_to(root).parts[:-1]
            name = "/".join([*parts[:1], *parts[2 : depth + 1]]) or "."
            found[name] = found.get(name, 0) + path.stat().st_size
    return dict(sorted(found.items()))
