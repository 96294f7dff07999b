"""The actors that measure edges: a shard is a few earlier features, each with its own cells.

The cells of a shard are read, and run up to the earlier site, once; every feature that fires in a cell is then ablated
in it. A shard holds the mean effects of its features and of each of their null directions on the later features.
Memory: the sums of the features of a shard over the later ones, for each direction and each donor.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.associations.donor_agreement import sign_flip_p
from feature_store.storage import commit
from feature_store.storage.layout import Layout, as_path
from pipelines.effects.actors import NULLS
from pipelines.effects.cells import MIN_CELLS, FeatureCells
from pipelines.effects.shards import FeaturesJob, commit_shard
from pipelines.inputs import load_stored_sae
from pipelines.steering.context import SteeringContext

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sae_core.effects import LaterEffect

INTERVENTION = "ablate"


@dataclass(frozen=True, kw_only=True)
class CircuitJob(FeaturesJob):
    """A job of a circuit; its SAE is the earlier one.

    Attributes:
        later_sae, later_site: the folder of the later SAE, and its site.
        density: in how many cells each feature of the earlier SAE fires [n_features].
    """

    later_sae: str
    later_site: str
    density: npt.NDArray[np.int64]


class CircuitMeasurer:
    """Measures shards of a `CircuitJob`; it is the body of an actor and can be called without Ray."""

    def __init__(self, job: CircuitJob) -> None:
        self.job = job
        self.run = commit.Run.open(job.run)
        self.context = SteeringContext(job.paths)
        self.later_sae = load_stored_sae(as_path(job.later_sae), device=job.paths.device)
        cells_dir = Layout(as_path(job.paths.store)).cells_dir(job.paths.dataset)
        self.cells = FeatureCells(as_path(job.codes), cells_dir, n_cells=job.cells, seed=job.seed)

    def shard(self, number: int) -> dict[str, int]:
        """Measure and commit shard `number` unless it is committed; return the counts for the progress display."""
        return commit_shard(self.run, number, self.job.features, self._measure)

    def _measure(self, features: tuple[int, ...]) -> pl.DataFrame:
        import torch

        from sae_core.effects import LaterCodes, LaterSums, add_later, draw_directions

        job, model, sae = self.job, self.context.model, self.context.sae
        density = torch.from_numpy(job.density.astype(np.float64))
        directions = [
            draw_directions(sae.W_dec, feature, density, n_nulls=job.n_nulls, seed=job.seed) for feature in features
        ]
        sums = [LaterSums(self.later_sae.config.n_features, 1 + 2 * job.n_nulls) for _ in features]
        for tokens, cell_idx, places in self.cells.each(self.context, features):
            cell = LaterCodes(
                model, tokens, sae, self.context.site, later_sae=self.later_sae, later_site=job.later_site
            )
            for j in places:
                add_later(sums[j], cell, features[j], directions[j], donor=self.cells.donor(cell_idx))
        return draws_frame(features, [own.mean(min_cells=MIN_CELLS) for own in sums], job.n_nulls)


def draws_frame(features: tuple[int, ...], found: "Sequence[LaterEffect]", n_nulls: int) -> pl.DataFrame:
    """The rows of a shard, by earlier and later feature; later ones that fire in fewer than MIN_CELLS are left out."""
    frames = [pl.DataFrame(schema=draws_schema(n_nulls))]
    for feature, own in zip(features, found, strict=True):
        effect, n = own.effect.astype(np.float32), len(own.feature_id)
        n_donors, n_agree, p_donor = across_donors(own)
        frames.append(
            pl.DataFrame(
                {
                    "feature_id": np.full(n, feature, np.int32),
                    "intervention": [INTERVENTION] * n,
                    "to_feature_id": own.feature_id.astype(np.int32),
                    "n_cells": np.full(n, own.n_cells, np.int32),
                    "n_cells_fired": own.n_cells_fired.astype(np.int32),
                    "n_donors": np.full(n, n_donors, np.int32),
                    "n_agree": n_agree.astype(np.int32),
                    "p_donor": p_donor,
                    "base": own.base.astype(np.float32),
                    "effect": effect[0],
                    NULLS[0]: np.ascontiguousarray(effect[1 : 1 + n_nulls].T),
                    NULLS[1]: np.ascontiguousarray(effect[1 + n_nulls :].T),
                },
                schema=draws_schema(n_nulls),
            )
        )
    return pl.concat(frames)


def across_donors(own: "LaterEffect") -> tuple[int, npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The number of donors, and by later feature those that agree in sign with the effect, and the sign-flip p of their
    effects; NaN for a single donor.
    """
    n_donors, n_agree = len(own.of_donor), (np.sign(own.of_donor) == np.sign(own.effect[0])) & (own.of_donor != 0)
    if n_donors < 2:
        return n_donors, n_agree.sum(0), np.full(len(own.feature_id), np.nan)
    largest = np.abs(own.of_donor).max(0)
    # the test has an absolute tolerance, and changes of codes may be small
    p = sign_flip_p(own.of_donor / np.where(largest > 0, largest, 1))
    return n_donors, n_agree.sum(0), p


def draws_schema(n_nulls: int) -> dict[str, pl.DataType]:
    """The columns of the table of draws."""
    return {
        "feature_id": pl.Int32(),
        "intervention": pl.String(),
        "to_feature_id": pl.Int32(),
        "n_cells": pl.Int32(),
        "n_cells_fired": pl.Int32(),
        "n_donors": pl.Int32(),
        "n_agree": pl.Int32(),
        "p_donor": pl.Float64(),
        "base": pl.Float32(),
        "effect": pl.Float32(),
        **dict.fromkeys(NULLS, pl.Array(pl.Float32, n_nulls)),
    }
