"""The request of an effects run: its options, checked against the store before anything is written."""

from dataclasses import dataclass

import polars as pl

import feature_store.effects.nulls as nulls_module
import sae_core.effects.by_gene as by_gene_module
import sae_core.effects.directions as directions_module
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from feature_store.storage.plans import EffectsPlan
from pipelines.config import EffectsOptions
from pipelines.effects import actors as actors_module
from pipelines.effects import cells as cells_module
from pipelines.effects import shards as shards_module
from pipelines.effects import tables as tables_module
from pipelines.effects.actors import EffectsJob
from pipelines.effects.chain import FeaturesRequest, chain_behind, firing_of, first_cells, measured_features, paths_of
from pipelines.steering.context import SteeringContext
from sae_core.effects import HiddenGenes

_MODULES = (nulls_module, by_gene_module, directions_module, actors_module, cells_module, shards_module, tables_module)
"""Those whose constants the content depends on."""
MIN_NULLS, NULLS_IN_ALL = 3, 100
"""Directions of each null: least number for a feature, and for all features together."""


@dataclass(frozen=True, kw_only=True)
class EffectsRequest(FeaturesRequest):
    """A checked request.

    Attributes:
        features: the table `features` of the associations.
    """

    features: pl.DataFrame

    @classmethod
    def of(cls, options: EffectsOptions, layout: Layout) -> "EffectsRequest":
        """Read the inputs and check all options.

        Raises:
            UsageError: a feature is unknown or never fires, or no model stands behind the SAE.
            NotFoundError: there are no associations of the SAE.
        """
        chain = chain_behind(
            layout,
            options.sae,
            vectors="a feature changes a vector by its decoder row times the change of its code, and genes not at all",
            recorded="effects run the model behind the site again",
        )
        features = commit.read_table(layout.associations_dir(chain.run) / "features")
        measured = measured_features(options.feature, features)
        return cls(
            options=options,
            layout=layout,
            chain=chain,
            features=features,
            measured=measured,
            n_nulls=options.n_nulls or nulls_of_each(len(measured)),
        )

    @property
    def plan(self) -> EffectsPlan:
        """The plan, which holds all that determines the run."""
        return EffectsPlan(**self.plan_fields(_MODULES))

    def job(self, draws: str) -> EffectsJob:
        """What actors need to write the draws. ConfigError if the model has no head that predicts hidden genes."""
        self._check_head()
        return EffectsJob(
            **self.job_fields("effects", draws),
            p99=tuple(self.features["p99"].fill_null(0.0).to_list()),
            density=firing_of(self.chain),
        )

    def _check_head(self) -> None:
        """Raise ConfigError if the model has no head that predicts hidden genes, by asking it for those of one cell."""
        # the driver may have no GPU
        context = SteeringContext(paths_of(self.chain, "effects", num_gpus=0))
        for tokens in first_cells(context, self.chain):
            cell = HiddenGenes(context.model, tokens, context.sae, context.site)
            if len(cell.gene_id):
                cell.answers(cell.x[None])
                return


def nulls_of_each(n_features: int) -> int:
    """Directions of each null for each feature: at least MIN_NULLS, and NULLS_IN_ALL for all features together."""
    return max(MIN_NULLS, -(-NULLS_IN_ALL // n_features))
