"""The request of an inputs run: its options, checked against the store before anything is written."""

from dataclasses import dataclass

import feature_store.effects.matched as matched_module
import sae_core.effects.candidates as candidates_module
import sae_core.effects.inputs as inputs_module
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from feature_store.storage.plans import InputsPlan
from pipelines.config import InputsOptions
from pipelines.effects import cells as cells_module
from pipelines.effects import shards as shards_module
from pipelines.effects.chain import FeaturesRequest, chain_behind, first_cells, measured_features, paths_of
from pipelines.feature_inputs import actors as actors_module
from pipelines.feature_inputs import tables as tables_module
from pipelines.feature_inputs.actors import InputsJob
from pipelines.steering.context import SteeringContext
from sae_core.effects import CellInputs

_MODULES = (matched_module, candidates_module, inputs_module, actors_module, cells_module, shards_module, tables_module)
"""Those whose constants the content depends on."""
MIN_NULLS, NULLS_IN_ALL = 4, 500
"""Null genes: least number for a gene, and for all genes of all features together."""


@dataclass(frozen=True, kw_only=True)
class InputsRequest(FeaturesRequest):
    """A checked request."""

    options: InputsOptions

    @classmethod
    def of(cls, options: InputsOptions, layout: Layout) -> "InputsRequest":
        """Read the inputs and check all options.

        Raises:
            UsageError: a feature is unknown or never fires, or no model stands behind the SAE.
            NotFoundError: there are no associations of the SAE.
        """
        chain = chain_behind(
            layout,
            options.sae,
            vectors="a vector has no genes that could be left out",
            recorded="inputs run the model up to the site again",
        )
        features = commit.read_table(layout.associations_dir(chain.run) / "features")
        measured = measured_features(options.feature, features)
        return cls(
            options=options,
            layout=layout,
            chain=chain,
            measured=measured,
            n_nulls=options.n_nulls or max(MIN_NULLS, -(-NULLS_IN_ALL // (len(measured) * options.genes))),
        )

    @property
    def plan(self) -> InputsPlan:
        """The plan, which holds all that determines the run."""
        return InputsPlan(**self.plan_fields(_MODULES), n_genes=self.options.genes)

    def job(self, draws: str) -> InputsJob:
        """What actors need to write the draws. ConfigError if the model passes no gradient to the site."""
        self._check_gradient()
        return InputsJob(**self.job_fields("inputs", draws), genes=self.options.genes)

    def _check_gradient(self) -> None:
        """Raise ConfigError if the model passes no gradient from its embedding to the site, by trying one cell."""
        # the driver may have no GPU
        context = SteeringContext(paths_of(self.chain, "inputs", num_gpus=0))
        for tokens in first_cells(context, self.chain):
            if tokens.n_tokens:
                CellInputs(context.model, tokens, context.sae, context.site, self.measured[:1]).attributions()
                return
