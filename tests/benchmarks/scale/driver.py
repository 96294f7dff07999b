"""What the driver of a large codes run costs, in seconds and memory: start, shards, end and resume. Markdown on stdout.

    python tests/benchmarks/scale/driver.py [--shards 4000] [--actors 2] [--folder DIR]
    python tests/benchmarks/scale/driver.py --s3 [--shards 300] [--latency-ms 25]
    python tests/benchmarks/scale/driver.py --wait

The tables are those of a codes run, and the actors do nothing but commit a tiny part of each table. Steps:
  start: plan all tables and list what is pending (nothing is there);
  shards: hand out all shards to Ray actors; a part and a marker of each table are written for each shard;
  end: read the markers and write the manifests;
  again: the same command on the finished run, start and end;
  half: the start of a run of which every other shard is committed, and the end once the others are there too.
The first three share a process, `again` has its own, and so have both steps of `half`. Memory is the peak resident set
of the driver (VmHWM) above what it had after its imports. CPU seconds are the driver's own. --s3 keeps the store in an
emulation of S3 (moto) in a process of its own, which handles one request at a time and waits --latency-ms before each,
as a store that is far away does.
--wait measures `ray.wait` for the shards in flight of many actors, of which one is done.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_store.storage import filesystem
from feature_store.storage.commit import Run
from feature_store.storage.layout import MANIFEST, as_path, entry_of, marker_name, needed_tables
from pipelines.config import ActorOptions
from pipelines.runtime.actor_pool import do_shards
from pipelines.runtime.cluster import ray_session

if TYPE_CHECKING:
    from collections.abc import Iterator

TABLES = tuple(needed_tables("codes"))
PART_BYTES = 1000
BUCKET = "driver"


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step took: seconds, CPU seconds of the driver, and MB (10^6 bytes) above its imports."""

    name: str
    wall_s: float
    cpu_s: float
    memory_mb: float


class TinyParts:
    """A worker that commits a part of PART_BYTES to each table."""

    def __init__(self, folder: str) -> None:
        self.runs = [Run.open(as_path(folder) / table) for table in TABLES]

    def shard(self, number: int) -> dict[str, int]:
        """Commit the parts of one shard."""
        data = number.to_bytes(8, "little") * (PART_BYTES // 8)
        for run in self.runs:
            run.commit_shard(number, lambda path: path.write_bytes(data), start=number, stop=number + 1)
        return {"parts": len(self.runs)}


class Meter:
    """Times the steps of this process."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._memory = memory_mb("VmRSS")

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Note what the block takes."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.steps.append(
            Step(
                name=name,
                wall_s=time.perf_counter() - wall,
                cpu_s=time.process_time() - cpu,
                memory_mb=memory_mb("VmHWM") - self._memory,
            )
        )


def memory_mb(field: str) -> float:
    """A memory figure of this process in /proc/self/status."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024 / 1e6


def create(folder: Path, n_shards: int) -> list[Run]:
    """Make or reopen the tables."""
    return [Run.create(folder / table, {"n_shards": n_shards, "table": table}) for table in TABLES]


def start(folder: Path, n_shards: int) -> tuple[list[Run], list[int]]:
    """Do what a stage does before it starts actors; return the tables and the pending shards."""
    runs = create(folder, n_shards)
    return runs, sorted({shard for run in runs for shard in run.pending()})


def take(phase: str, folder: Path, n_shards: int, n_actors: int) -> list[Step]:
    """Run the steps of one process and return what they took."""
    meter = Meter()
    if phase == "make":
        with meter.step("start"):
            runs, pending = start(folder, n_shards)
        assert pending == list(range(n_shards))
        with meter.step("shards"):
            options = ActorOptions(num_actors=n_actors)
            do_shards(TinyParts, str(folder), pending, options, title="driver", note=lambda *_: "")
        with meter.step("end"):
            for run in runs:
                run.finalize()
    elif phase == "again":
        with meter.step("again"):
            runs, pending = start(folder, n_shards)
            for run in runs:
                run.finalize()
        assert pending == []
    else:
        aside = undo(create(folder, n_shards))
        with meter.step("half: start"):
            runs, pending = start(folder, n_shards)
        assert pending == list(range(1, n_shards, 2))
        filesystem.read_many(folder, lambda path: path.write_bytes(aside[path]), list(aside))
        with meter.step("half: end"):
            for run in runs:
                run.finalize()
    return meter.steps


def undo(runs: list[Run]) -> dict[Path, bytes]:
    """Take the manifests away, and the markers of every other shard, which are returned."""
    aside = {}
    for run in runs:
        for path in (run.path / MANIFEST, entry_of(run.path)):
            if path is not None:
                filesystem.remove_file(path)
        paths = [run.path / marker_name(shard) for shard in range(1, run.n_shards, 2)]
        aside |= dict(zip(paths, filesystem.read_many(run.path, filesystem.read_bytes, paths), strict=True))
        filesystem.read_many(run.path, filesystem.remove_file, paths)
    return aside


def in_a_process(phase: str, folder: str, options: argparse.Namespace) -> list[Step]:
    """Run the steps of one phase in a process of its own."""
    command = [sys.executable, __file__, "--phase", phase, "--folder", folder]
    command += ["--shards", str(options.shards), "--actors", str(options.actors)]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [Step(**step) for step in json.loads(found.stdout.splitlines()[-1])]


def serve(port: int, latency_s: float) -> None:
    """Serve an emulation of S3, one request at a time, each `latency_s` after it came."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *_: Any) -> None:
            """Say nothing."""

    app, lock = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def one_at_a_time(environ: Any, respond: Any) -> list[bytes]:
        time.sleep(latency_s)
        with lock:
            return [b"".join(app(environ, respond))]

    make_server("127.0.0.1", port, one_at_a_time, threaded=True, request_handler=Quiet).serve_forever()


@contextlib.contextmanager
def emulated_s3(latency_ms: float) -> Iterator[str]:
    """Yield the URI of an empty bucket of an emulation, with its address in the environment."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, __file__, "--serve", str(port), "--latency-ms", str(latency_ms)])
    try:
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "emulated",
            "AWS_SECRET_ACCESS_KEY": "emulated",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        wait_for(port)
        import s3fs

        s3fs.S3FileSystem().call_s3("create_bucket", Bucket=BUCKET)
        yield f"s3://{BUCKET}/store"
    finally:
        server.terminate()
        server.wait()


def wait_for(port: int) -> None:
    """Return once something listens at a port of this machine."""
    import socket

    for _ in range(600):
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        time.sleep(0.1)
    raise TimeoutError(f"nothing listens at port {port}")


def measure(options: argparse.Namespace) -> None:
    """Run all phases and print a table."""
    with contextlib.ExitStack() as stack:
        if options.s3:
            root = stack.enter_context(emulated_s3(options.latency_ms))
        else:
            root = stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder))
        steps = [
            step for phase in ("make", "again", "half") for step in in_a_process(phase, f"{root}/codes/run", options)
        ]
        if not options.s3:
            shutil.rmtree(Path(root) / "codes")
    print(f"{options.shards} shards of {len(TABLES)} tables, {options.actors} actors\n")
    print("| | s | ms a shard | CPU s of the driver | ms a shard | MB |\n|---|---|---|---|---|---|")
    for step in steps:
        each, cpu = (1e3 * seconds / options.shards for seconds in (step.wall_s, step.cpu_s))
        print(f"| {step.name} | {step.wall_s:.2f} | {each:.3f} | {step.cpu_s:.2f} | {cpu:.3f} | {step.memory_mb:.0f} |")


def measure_wait() -> None:
    """Print the milliseconds of one `ray.wait` by the number of shards in flight."""
    import ray

    @ray.remote(num_cpus=0)
    class Sleeper:
        def sleep(self) -> None:
            time.sleep(1e6)

        def nothing(self) -> None:
            """Return at once."""

    with ray_session():
        busy, free = Sleeper.remote(), Sleeper.remote()
        ray.get(free.nothing.remote())
        print("| shards in flight | ms of ray.wait | with a call that ends |\n|---|---|---|")
        refs = [busy.sleep.remote() for _ in range(1024)]
        for n in (16, 64, 256, 512, 1024):
            waiting = refs[:n]
            none = milliseconds(partial(ray.wait, waiting, num_returns=1, timeout=0))
            one = milliseconds(partial(lambda some: ray.get(ray.wait([*some, free.nothing.remote()])[0]), waiting))
            print(f"| {n} | {none:.2f} | {one:.2f} |")


def milliseconds(work: Any, repeats: int = 50) -> float:
    """The mean milliseconds of a call."""
    begin = time.perf_counter()
    for _ in range(repeats):
        work()
    return 1e3 * (time.perf_counter() - begin) / repeats


def main() -> None:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=4000)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--folder")
    parser.add_argument("--s3", action="store_true")
    parser.add_argument("--latency-ms", type=float, default=25.0)
    parser.add_argument("--wait", action="store_true")
    parser.add_argument("--phase", help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.latency_ms / 1e3)
    elif options.phase:
        steps = take(options.phase, as_path(options.folder), options.shards, options.actors)
        print(json.dumps([asdict(step) for step in steps]))
    elif options.wait:
        measure_wait()
    else:
        measure(options)


if __name__ == "__main__":
    main()
