"""The request of an effects run: its options, checked against the store before anything is written."""

from dataclasses import dataclass

import numpy as np
import polars as pl

import feature_store.effects.nulls as nulls_module
import sae_core.effects.by_gene as by_gene_module
import sae_core.effects.directions as directions_module
from feature_store.cells import read_panel_cells
from feature_store.codes import CodesRun, panel_firing
from feature_store.query.runs import RunChain, newest_run_of, resolve_run
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from feature_store.storage.plans import EffectsPlan, constants_of
from pipelines.config import EffectsOptions
from pipelines.effects import actors as actors_module
from pipelines.effects import cells as cells_module
from pipelines.effects import tables as tables_module
from pipelines.errors import UsageError
from pipelines.inputs import no_model
from pipelines.steering.context import SteeringContext, SteeringPaths
from pipelines.steering.request import refuse_other_site
from sae_core.effects import HiddenGenes

_MODULES = (nulls_module, by_gene_module, directions_module, actors_module, cells_module, tables_module)
"""Those whose constants the content depends on."""
MIN_NULLS, NULLS_IN_ALL = 4, 100
"""Directions of each null: least number for a feature, and for all features together."""
_ASKED = 16


@dataclass(frozen=True, kw_only=True)
class EffectsRequest:
    """A checked request.

    Attributes:
        options, layout: as given.
        chain: the runs that the features descend from.
        features: the table `features` of the associations.
        measured: the features that are measured, ascending.
        n_nulls: directions of each null for each feature.
    """

    options: EffectsOptions
    layout: Layout
    chain: RunChain
    features: pl.DataFrame
    measured: tuple[int, ...]
    n_nulls: int

    @classmethod
    def of(cls, options: EffectsOptions, layout: Layout) -> "EffectsRequest":
        """Read the inputs and check all options.

        Raises:
            UsageError: a feature is unknown or never fires, or no model stands behind the SAE.
            NotFoundError: there are no associations of the SAE.
        """
        chain = chain_of(layout, options.sae, option="--sae")
        features = commit.read_table(layout.associations_dir(chain.run) / "features")
        measured = chosen_features(options.feature, features)
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
        associations = self.chain.associations
        run = commit.Run.open(self.layout.associations_dir(self.chain.run) / "features")
        return EffectsPlan(
            control_of=associations.control_of,
            associations=self.chain.run,
            associations_manifest=run.manifest().sha,
            sae=associations.sae,
            dataset=associations.dataset,
            site=self.chain.sae.site,
            features=self.measured,
            cells=self.options.cells,
            n_nulls=self.n_nulls,
            seed=self.options.seed,
            constants=constants_of(_MODULES),
        )

    def paths(self) -> SteeringPaths:
        """The paths at which actors find model, data and SAE."""
        return paths_of(self.chain, "cuda" if self.options.num_gpus > 0 else "cpu")

    def check_head(self) -> None:
        """Raise ConfigError if the model has no head that predicts hidden genes, by asking it for those of one cell."""
        # the driver may have no GPU
        context = SteeringContext(paths_of(self.chain, "cpu"))
        cells = read_panel_cells(self.layout.cells_dir(self.chain.associations.dataset), ["cell_idx"])["cell_idx"]
        for block in context.blocks(cells.head(_ASKED).to_numpy()):
            for i in range(len(block.cells)):
                cell = HiddenGenes(context.model, block.tokens.cells(i, i + 1), context.sae, context.site)
                if len(cell.gene_id):
                    cell.answers(cell.x[None])
                    return

    def density(self) -> np.ndarray:
        """In how many cells of the panel each feature fires [n_features]."""
        return panel_firing(CodesRun.open(self.layout.codes_dir(self.chain.associations.codes)))


def chain_of(layout: Layout, sae: str | None, *, option: str) -> RunChain:
    """The runs that the features of an SAE descend from; `sae` None: the SAE of the newest associations.

    Raises:
        UsageError: the SAE has no associations, or no model stands behind it.
        NotFoundError: there is no such SAE, or there are no associations.
    """
    if sae is None:
        named = resolve_run(layout, "associations", None, option=option)
    else:
        run = resolve_run(layout, "saes", sae, option=option).run
        found = newest_run_of(layout, "associations", {"sae": run})
        if found is None:
            raise UsageError(
                f"{option} was {sae!r}, which has no associations; make them with `scsae encode --sae {run} "
                f"{layout.store_option}` and `{layout.command_for('associations')}`"
            )
        named = found
    chain = RunChain.of(layout, named.run)
    if chain.activations.origin == "vectors":
        raise UsageError(
            f"the SAE {chain.associations.sae} was trained on given vectors, and no model stands behind them: a "
            "feature changes a vector by its decoder row times the change of its code, and genes not at all; name "
            f"an SAE of a model's tokens with {option}"
        )
    if chain.activations.origin == "recorded":
        raise UsageError(f"{no_model(chain.activations_run)}, and what a feature does is seen by running the model")
    refuse_other_site(chain)
    return chain


def chosen_features(asked: tuple[int, ...], features: pl.DataFrame) -> tuple[int, ...]:
    """The features that were asked for, ascending; all that fire where none was.

    `features`: the table of this name.

    Raises:
        UsageError: one is unknown or never fires, or none fires.
    """
    alive = features.filter(~pl.col("dead") & (pl.col("p99") > 0))["feature_id"].to_list()
    if unknown := [feature for feature in asked if feature >= features.height]:
        raise UsageError(
            f"--feature was {unknown[0]}; this SAE has features 0 to {features.height - 1}: `scsae features` lists them"
        )
    if dead := [feature for feature in asked if feature not in set(alive)]:
        raise UsageError(f"--feature was {dead[0]}, which never fires; choose one that `scsae features` lists")
    if not alive:
        raise UsageError("no feature of this SAE fires, so there is nothing to measure; train another one")
    return tuple(sorted(set(asked))) or tuple(sorted(alive))


def nulls_of_each(n_features: int) -> int:
    """Null draws of each feature: at least MIN_NULLS, and NULLS_IN_ALL of all features together."""
    return max(MIN_NULLS, -(-NULLS_IN_ALL // n_features))


def paths_of(chain: RunChain, device: str) -> SteeringPaths:
    """The paths at which actors find model, data and SAE of a chain of runs."""
    return SteeringPaths(
        activations=str(chain.activations_run.path.resolve()),
        sae=str(chain.layout.saes_dir(chain.associations.sae).resolve()),
        store=str(chain.layout.root.resolve()),
        dataset=chain.associations.dataset,
        site=chain.sae.site,
        seed=chain.activations.seed,
        device=device,
        vectors=None,
    )
