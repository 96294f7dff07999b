"""The request of an inputs run: its options, checked against the store before anything is written."""

from dataclasses import dataclass

import feature_store.effects.matched as matched_module
import sae_core.effects.candidates as candidates_module
import sae_core.effects.inputs as inputs_module
from feature_store.query.runs import RunChain
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from feature_store.storage.plans import InputsPlan, constants_of
from pipelines.config import InputsOptions
from pipelines.effects import cells as cells_module
from pipelines.effects import shards as shards_module
from pipelines.effects.chain import chain_behind, first_cells, measured_features, paths_of
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
class InputsRequest:
    """A checked request.

    Attributes:
        options, layout: as given.
        chain: the runs that the features descend from.
        measured: the features that are measured, ascending.
        n_nulls: null genes for each gene.
    """

    options: InputsOptions
    layout: Layout
    chain: RunChain
    measured: tuple[int, ...]
    n_nulls: int

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
        associations = self.chain.associations
        run = commit.Run.open(self.layout.associations_dir(self.chain.run) / "features")
        return InputsPlan(
            control_of=associations.control_of,
            associations=self.chain.run,
            associations_manifest=run.manifest().sha,
            sae=associations.sae,
            dataset=associations.dataset,
            site=self.chain.sae.site,
            features=self.measured,
            cells=self.options.cells,
            n_genes=self.options.genes,
            n_nulls=self.n_nulls,
            seed=self.options.seed,
            constants=constants_of(_MODULES),
        )

    def job(self, draws: str) -> InputsJob:
        """What actors need to write the draws. ConfigError if the model passes no gradient to the site."""
        self._check_gradient()
        return InputsJob(
            paths=paths_of(self.chain, "inputs", num_gpus=self.options.num_gpus),
            run=draws,
            codes=str(self.layout.codes_dir(self.chain.associations.codes).resolve()),
            features=self.measured,
            cells=self.options.cells,
            genes=self.options.genes,
            n_nulls=self.n_nulls,
            seed=self.options.seed,
        )

    def _check_gradient(self) -> None:
        """Raise ConfigError if the model passes no gradient from its embedding to the site, by trying one cell."""
        # the driver may have no GPU
        context = SteeringContext(paths_of(self.chain, "inputs", num_gpus=0))
        for tokens in first_cells(context, self.chain):
            if tokens.n_tokens:
                CellInputs(context.model, tokens, context.sae, context.site, self.measured[:1]).attributions()
                return
