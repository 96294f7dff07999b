"""A store with every stage run on the tiny data."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest
from in_process import replace_actors

from pipelines.config import AssociateOptions, EncodeOptions, ExtractOptions, TrainOptions


@dataclass(frozen=True, kw_only=True)
class Chain:
    """A store with every stage up to the associations, and the options that made it."""

    store: Path
    extract: ExtractOptions
    train: TrainOptions


@pytest.fixture(scope="session")
def extract_options(tiny_data, tiny_model) -> ExtractOptions:
    """Extraction of layer 1 in shards of 16 cells, exact in f32."""
    return ExtractOptions(
        data=tiny_data,
        model=str(tiny_model),
        layer=("1",),
        donor="donor",
        batch="batch",
        cell_type="type",
        shard_cells=16,
        dtype="f32",
    )


@pytest.fixture(scope="session")
def train_options() -> TrainOptions:
    """A few steps of a small SAE, without a worker process."""
    return TrainOptions(n_features=48, k=4, n_steps=60, batch_size=128, checkpoint_steps=20, num_workers=0, num_cpus=1)


@pytest.fixture(scope="session")
def chain(tmp_path_factory, shards_here, extract_options, train_options) -> Chain:
    """Every stage run once on the tiny data, without actors; read it, do not write to it."""
    from pipelines.associate import associate
    from pipelines.encode import encode
    from pipelines.extract import extract
    from pipelines.train import train

    store = tmp_path_factory.mktemp("chain") / "store"
    with pytest.MonkeyPatch.context() as patch:
        replace_actors(patch, shards_here)
        extract(extract_options, store)
        train(train_options, store)
        encode(EncodeOptions(), store)
        associate(AssociateOptions(), store)
    return Chain(store=store, extract=extract_options, train=train_options)


@pytest.fixture
def own_store(chain, tmp_path) -> Path:
    """A copy of the chain's store, to write to."""
    return Path(shutil.copytree(chain.store, tmp_path / "own"))


MARK = "SCSAE_TEST_RUN"


class Killable:
    """`scsae` as a process of its own, and all processes that belong to it: they carry a variable of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark, self.driver = folder, uuid.uuid4().hex, None
        self.log, home = folder / "log", folder / "home"
        home.mkdir()
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SCSAE_", "MLFLOW_"))}
        self.environment = {**kept, "HOME": str(home), "OMP_NUM_THREADS": "1", MARK: self.mark}

    def start(self, *arguments: str, first: str) -> None:
        """Run `scsae` with these arguments after some lines of Python."""
        code = f"{first}\nfrom pipelines.cli import main\nmain()"
        with self.log.open("w") as out:
            self.driver = subprocess.Popen(
                [sys.executable, "-c", code, *arguments], env=self.environment, stdout=out, stderr=out
            )

    def wait_until(self, is_there) -> None:
        """Let it work until something is there."""
        deadline = time.monotonic() + 200
        while not is_there():
            assert self.driver.poll() is None, f"over before the kill, which would show nothing: {self.said}"
            assert time.monotonic() < deadline, self.said
            time.sleep(0.01)

    @property
    def said(self) -> str:
        """Its last words."""
        return self.log.read_text()[-2000:]

    def processes(self, words: bytes = b"") -> list[int]:
        """Ids of its processes; those whose command holds the words."""
        found = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                ours = folder.name.isdigit() and f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes()
                if ours and words in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
        return found

    def kill(self) -> None:
        """Kill the driver; what it started ends by itself."""
        self.driver.kill()
        self.driver.wait()
        deadline = time.monotonic() + 100
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert self.processes() == []

    def end(self) -> None:
        """Kill what is left."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


@pytest.fixture
def killable(tmp_path):
    """A `Killable`, of which nothing is left after the test."""
    made = Killable(tmp_path)
    yield made
    made.end()
