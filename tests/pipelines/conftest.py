"""A store with every stage run on the tiny data."""

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

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
def chain(tmp_path_factory, ray_local, extract_options, train_options) -> Chain:
    """Every stage run once on the tiny data; read it, do not write to it."""
    from pipelines.associate import associate
    from pipelines.encode import encode
    from pipelines.extract import extract
    from pipelines.train import train

    store = tmp_path_factory.mktemp("chain") / "store"
    extract(extract_options, store)
    train(train_options, store)
    encode(EncodeOptions(), store)
    associate(AssociateOptions(), store)
    return Chain(store=store, extract=extract_options, train=train_options)


@pytest.fixture
def own_store(chain, tmp_path) -> Path:
    """A copy of the chain's store, to write to."""
    return Path(shutil.copytree(chain.store, tmp_path / "own"))


@pytest.fixture(scope="session")
def shards_here():
    """`do_shards` without Ray: every shard in this process, in order, as an actor would do it."""

    def do_shards(worker, work, shards, *_args, **_options):
        body, total = worker(work), Counter()
        for shard in shards:
            total.update(body.shard(shard))
        return total

    return do_shards


@pytest.fixture
def without_actors(monkeypatch, shards_here):
    """Start no actor in any stage."""
    for stage in ("extract", "encode", "associate", "steering.stage"):
        monkeypatch.setattr(f"pipelines.{stage}.do_shards", shards_here)
