"""The actors that measure effects: a shard is a few features, each with its own cells.

The cells of a shard are read, and their genes hidden, once; every feature that fires in a cell is then moved in it. A
shard holds the mean effects of its features and of each of their null directions, so that nulls can be pooled over all
features when all shards are there. Memory: the sums of the features of a shard over the vocabulary.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.storage import commit
from feature_store.storage.layout import Layout, as_path
from pipelines.effects.cells import MIN_CELLS, FeatureCells
from pipelines.effects.shards import FeaturesJob, commit_shard
from pipelines.steering.context import SteeringContext

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sae_core.effects import FeatureEffect

NULLS = ("random", "mixture")
"""Columns of the draws of `sae_core.effects.Directions`."""


@dataclass(frozen=True, kw_only=True)
class EffectsJob(FeaturesJob):
    """A job of effects.

    Attributes:
        p99: the 99th percentile of each feature of the SAE [n_features].
        density: in how many cells each feature of the SAE fires [n_features].
    """

    p99: tuple[float, ...]
    density: npt.NDArray[np.int64]


class EffectsMeasurer:
    """Measures shards of an `EffectsJob`; it is the body of an actor and can be called without Ray."""

    def __init__(self, job: EffectsJob) -> None:
        self.job = job
        self.run = commit.Run.open(job.run)
        self.context = SteeringContext(job.paths)
        cells_dir = Layout(as_path(job.paths.store)).cells_dir(job.paths.dataset)
        self.cells = FeatureCells(as_path(job.codes), cells_dir, n_cells=job.cells, seed=job.seed)

    def shard(self, number: int) -> dict[str, int]:
        """Measure and commit shard `number` unless it is committed; return the counts for the progress display."""
        return commit_shard(self.run, number, self.job.features, self._measure)

    def _measure(self, features: tuple[int, ...]) -> pl.DataFrame:
        import torch

        from sae_core.effects import EffectSums, HiddenGenes, add_cell, draw_directions

        job, model, sae = self.job, self.context.model, self.context.sae
        density = torch.from_numpy(job.density.astype(np.float64))
        directions = [
            draw_directions(sae.W_dec, feature, density, n_nulls=job.n_nulls, seed=job.seed) for feature in features
        ]
        sums = [EffectSums(len(model.vocabulary), 1 + 2 * job.n_nulls) for _ in features]
        for tokens, cell_idx, places in self.cells.each(self.context, features):
            cell = HiddenGenes(model, tokens, sae, self.context.site, seed=job.seed)
            donor = self.cells.donor(cell_idx)
            for j in places:
                boosted = job.p99[features[j]]
                add_cell(sums[j], cell, features[j], directions[j], boosted=boosted, donor=donor)
        return draws_frame(features, [own.mean() for own in sums], job.n_nulls)


def draws_frame(features: tuple[int, ...], found: "Sequence[FeatureEffect]", n_nulls: int) -> pl.DataFrame:
    """The rows of a shard, by feature, intervention and gene; genes of fewer than MIN_CELLS cells are left out."""
    from sae_core.effects import INTERVENTIONS

    frames = [pl.DataFrame(schema=draws_schema(n_nulls))]
    for feature, own in zip(features, found, strict=True):
        kept = own.n_cells >= MIN_CELLS
        for i, intervention in enumerate(INTERVENTIONS):
            effect = own.effect[i][:, kept].astype(np.float32)
            frames.append(
                pl.DataFrame(
                    {
                        "feature_id": np.full(kept.sum(), feature, np.int32),
                        "intervention": [intervention] * int(kept.sum()),
                        "gene_id": own.gene_id[kept].astype(np.int32),
                        "n_cells": own.n_cells[kept].astype(np.int32),
                        "n_donors": own.n_donors[kept].astype(np.int32),
                        "effect": effect[0],
                        "direct": own.direct[i][kept].astype(np.float32),
                        NULLS[0]: np.ascontiguousarray(effect[1 : 1 + n_nulls].T),
                        NULLS[1]: np.ascontiguousarray(effect[1 + n_nulls :].T),
                    },
                    schema=draws_schema(n_nulls),
                )
            )
    return pl.concat(frames)


def draws_schema(n_nulls: int) -> dict[str, pl.DataType]:
    """The columns of the table of draws."""
    return {
        "feature_id": pl.Int32(),
        "intervention": pl.String(),
        "gene_id": pl.Int32(),
        "n_cells": pl.Int32(),
        "n_donors": pl.Int32(),
        "effect": pl.Float32(),
        "direct": pl.Float32(),
        **dict.fromkeys(NULLS, pl.Array(pl.Float32, n_nulls)),
    }
