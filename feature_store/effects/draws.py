"""A table of draws: what was measured of features, and of their null draws, beside each other, part by part.

A row is a feature, a group (such as the intervention) and a target (such as a gene); it has the column `effect` and,
for each null, an array of its draws. The parts are read several times (`pool_nulls`), so that memory is that of a part.
p of a row is the largest p of its nulls, and the row names that null with its mean, its standard deviation and z. q is
over all rows and groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from feature_store.associations.multiple_testing import q_lookup
from feature_store.effects.nulls import PRIOR, EffectBlock, PooledNull, pool_nulls
from feature_store.storage import commit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_SCORES = ("null_mean", "null_sd", "z", "p")


@dataclass(frozen=True, kw_only=True)
class Draws:
    """A finished table of draws.

    Attributes:
        run: its parts; the rows of a part are sorted by feature_id, group and target.
        group: the column that tells the groups apart; each has nulls of its own.
        groups: its values.
        target: the column of whole numbers that says what was measured: a gene, or a feature of another SAE.
        nulls: the columns of the null draws.
        prior: draws that the variance of all features counts as in that of a feature's own.
        n_targets: the largest target and one.
    """

    run: commit.Run
    group: str
    groups: tuple[str, ...]
    target: str
    nulls: tuple[str, ...]
    prior: float = PRIOR
    n_targets: int = field(init=False)

    def __post_init__(self) -> None:
        """Count the targets."""
        last = [int(part[self.target].max()) for part in self.parts() if part.height]  # type: ignore[arg-type]
        object.__setattr__(self, "n_targets", max(last, default=-1) + 1)

    def parts(self) -> Iterator[pl.DataFrame]:
        """The rows, part by part."""
        for path in self.run.checked_parts():
            yield commit.read_part(path)

    def write_scored(
        self, folder: Path, plan: dict[str, Any], finish: Callable[[pl.DataFrame], pl.DataFrame]
    ) -> commit.Run:
        """Write a table of all rows with null, null_mean, null_sd, z, p, p_NULL for each null, and q.

        `finish` makes the rows of a part those of the table, which has as many parts as the draws.
        """
        pooled = self._pooled()
        q_of = q_lookup([self._scored(part, pooled)["p"].to_numpy() for part in self.parts()])
        run = commit.Run.create(folder, plan)
        markers = self.run.manifest().shards
        for number, part in enumerate(self.parts()):
            frame = self._scored(part, pooled)
            frame = finish(frame.with_columns(q=pl.Series(q_of(frame["p"].to_numpy()), dtype=pl.Float64)))
            run.commit_shard(
                number,
                partial(commit.write_frame, frame=frame),
                start=markers[number].start,
                stop=markers[number].stop,
            )
        run.finalize()
        return run

    def _pooled(self) -> dict[tuple[str, str], PooledNull]:
        return {
            (group, null): pool_nulls(partial(self._blocks, group, null), self.n_targets, prior=self.prior)
            for group in self.groups
            for null in self.nulls
        }

    def _blocks(self, group: str, null: str) -> Iterator[EffectBlock]:
        for part in self.parts():
            own = part.filter(pl.col(self.group) == group)
            if own.height:
                yield self._block(own, null)[0]

    def _block(self, rows: pl.DataFrame, null: str) -> tuple[EffectBlock, tuple[np.ndarray, np.ndarray]]:
        """The rows of some features as a block, and the place of each row in it."""
        features = rows["feature_id"].unique(maintain_order=True).to_numpy()
        place = np.searchsorted(features, rows["feature_id"].to_numpy()), rows[self.target].to_numpy()
        drawn = rows[null].to_numpy().astype(np.float64)
        effect = np.full((len(features), self.n_targets), np.nan)
        draws = np.full((len(features), drawn.shape[1], self.n_targets), np.nan)
        effect[place] = rows["effect"].to_numpy()
        draws[place[0], :, place[1]] = drawn
        return EffectBlock(effect=effect, draws=draws), place

    def _scored(self, part: pl.DataFrame, pooled: dict[tuple[str, str], PooledNull]) -> pl.DataFrame:
        """The rows of a part with the null of the largest p: its name, mean, standard deviation, z and p."""
        numbers = {name: pl.lit(0.0, dtype=pl.Float64) for name in (*_SCORES, *(f"p_{null}" for null in self.nulls))}
        frames = [part.drop(self.nulls).head(0).with_columns(null=pl.lit("", dtype=pl.String), **numbers)]
        for group in self.groups:
            rows = part.filter(pl.col(self.group) == group)
            if not rows.height:
                continue
            found = []
            for null in self.nulls:
                block, place = self._block(rows, null)
                scores = pooled[group, null].scores(block)
                found.append(np.stack([scores.mean[place], scores.sd[place], scores.z[place], scores.p[place]]))
            # careful: a target without any null draw that moves has no p, and was not tested
            p = np.stack([np.nan_to_num(own[3], nan=1.0) for own in found])
            hardest = p.argmax(0)
            mean, sd, z = np.stack(found)[hardest, :3, np.arange(rows.height)].T
            frames.append(
                rows.drop(self.nulls).with_columns(
                    null=pl.Series([self.nulls[i] for i in hardest], dtype=pl.String),
                    null_mean=pl.Series(mean),
                    null_sd=pl.Series(sd),
                    z=pl.Series(z).fill_nan(None),
                    p=pl.Series(p.max(0)),
                    **{f"p_{null}": pl.Series(own) for null, own in zip(self.nulls, p, strict=True)},
                )
            )
        return pl.concat(frames)
