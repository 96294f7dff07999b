"""What the stages that measure features in the running model share: a run of draws in shards, then its tables.

A shard is a few features, in the order of the plan (`features_a_shard`). The run is a folder with the table `draws` and
those that are made of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from feature_store.storage import commit
from feature_store.storage.plans import Plan
from pipelines.config.options import ActorOptions
from pipelines.runtime.actor_pool import do_shards
from pipelines.steering.context import SteeringPaths

FEATURES_A_SHARD, SHARDS_OF_FEW = 8, 16


def features_a_shard(n_features: int) -> int:
    """How many features are measured together: FEATURES_A_SHARD, and of few features as many as make SHARDS_OF_FEW.

    Those of a shard share the reading of their cells; a feature alone can use one actor only.
    """
    return min(FEATURES_A_SHARD, max(1, -(-n_features // SHARDS_OF_FEW)))


@dataclass(frozen=True, kw_only=True)
class FeaturesJob:
    """What an actor needs to measure any shard, as plain values.

    Attributes:
        paths: model, data and SAE.
        run: the folder of the run of draws.
        codes: the folder of the codes.
        features: the measured features.
        cells, n_nulls, seed: of the plan.
    """

    paths: SteeringPaths
    run: str
    codes: str
    features: tuple[int, ...]
    cells: int
    n_nulls: int
    seed: int


def measure_features(
    worker: type,
    job: Callable[[str], Any],
    write: Callable[[commit.Run, int], None],
    *,
    folder: Path,
    plan: Plan,
    features: Sequence[int],
    tables: Sequence[str],
    options: ActorOptions,
    address: str | None,
) -> tuple[int, int]:
    """Measure the shards and write the tables that are not there; return how many were made now, and were there.

    Args:
        worker: the body of an actor, made from a job; its method `shard(number)` measures and commits a shard.
        job: makes the job from the folder of the draws; called before anything is written, and may refuse.
        write: writes the tables, from the finished draws and the number of their parts.
        folder: of the run.
        plan: of the run.
        features: the features that are measured.
        tables: names of the tables that are made of the draws.
        options: those of the actors.
        address: of the cluster; None starts Ray here.
    """
    n_shards = -(-len(features) // features_a_shard(len(features)))
    missing = [name for name in tables if not commit.is_intact(folder / name)]
    pending: list[int] = []
    if missing:
        made = job(str((folder / "draws").resolve()))
        run = commit.Run.create(folder / "draws", plan.table("draws", n_shards=n_shards))
        with commit.exclusive(folder):
            if pending := run.pending():
                do_shards(worker, made, pending, options, title=plan.stage, note=_done, address=address)
            run.finalize()
            write(run, n_shards)
    n_done = len(pending) + len(missing)
    return n_done, n_shards + len(tables) - n_done


def commit_shard(
    run: commit.Run, number: int, features: Sequence[int], measure: Callable[[tuple[int, ...]], pl.DataFrame]
) -> dict[str, int]:
    """Commit what `measure` finds of the features of a shard, unless it is committed; return their number."""
    size = features_a_shard(len(features))
    first = number * size
    own = tuple(features[first : first + size])
    if not run.committed(number):
        frame = measure(own)
        run.commit_shard(number, lambda path: commit.write_frame(path, frame), start=first, stop=first + len(own))
    return {"features": len(own)}


def median(values: pl.Series) -> float | None:
    """The median of the values that are known; None if none is."""
    known = values.drop_nulls().to_numpy()
    return float(np.median(known)) if len(known) else None


def _done(total: Mapping[str, int], seconds: float) -> str:
    return f"{total['features']} features, {total['features'] / max(seconds, 1e-9):.2f} a second"
