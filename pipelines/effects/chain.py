"""What stages that run the model behind an SAE share: which associations, which features, and where the model is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.cells import read_panel_cells
from feature_store.codes import CodesRun, panel_firing
from feature_store.query.runs import RunChain
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from feature_store.storage.plans import constants_of
from pipelines.associate import associations_of
from pipelines.errors import UsageError
from pipelines.inputs import load_token_of_gene, no_model
from pipelines.steering.context import SteeringContext, SteeringPaths
from pipelines.steering.request import refuse_other_site

if TYPE_CHECKING:
    from types import ModuleType

    from pipelines.config import CircuitOptions, EffectsOptions, InputsOptions
    from sae_core.scfm import Tokens

_FIRST_CELLS = 16


@dataclass(frozen=True, kw_only=True)
class FeaturesRequest:
    """A checked request to measure features.

    Attributes:
        options, layout: as given.
        chain: the runs that the features descend from.
        measured: the features that are measured, ascending.
        n_nulls: null draws of each kind.
    """

    options: "EffectsOptions | CircuitOptions | InputsOptions"
    layout: Layout
    chain: RunChain
    measured: tuple[int, ...]
    n_nulls: int

    def plan_fields(self, modules: "Sequence[ModuleType]") -> dict[str, Any]:
        """The fields of `FeaturesMeasured`; `modules` are those whose constants the content depends on."""
        associations = self.chain.associations
        run = commit.Run.open(self.layout.associations_dir(self.chain.run) / "features")
        return {
            "control_of": associations.control_of,
            "associations": self.chain.run,
            "associations_manifest": run.manifest().sha,
            "sae": associations.sae,
            "site": self.chain.sae.site,
            "dataset": associations.dataset,
            "features": self.measured,
            "cells": self.options.cells,
            "n_nulls": self.n_nulls,
            "seed": self.options.seed,
            "constants": constants_of(modules),
        }

    def job_fields(self, stage: str, draws: str) -> dict[str, Any]:
        """The fields of `pipelines.effects.shards.FeaturesJob`; `draws` is the folder of the draws."""
        return {
            "paths": paths_of(self.chain, stage, num_gpus=self.options.num_gpus),
            "run": draws,
            "codes": str(self.layout.codes_dir(self.chain.associations.codes).resolve()),
            "features": self.measured,
            "cells": self.options.cells,
            "n_nulls": self.n_nulls,
            "seed": self.options.seed,
        }


def chain_behind(layout: Layout, sae: str | None, *, vectors: str, recorded: str, option: str = "--sae") -> RunChain:
    """The newest associations of the SAE that an option names, or of any, and the runs that they descend from.

    Args:
        layout: of the store.
        sae: what the option was; None: the newest associations.
        vectors: what the error says of an SAE of given vectors, after "no model stands behind them: ".
        recorded: what the error says of recorded tokens, after "and ".
        option: the option.

    Raises:
        UsageError: the SAE has no associations, no model stands behind it, or it reads another site.
        NotFoundError: there is no such SAE, or there are no associations.
    """
    chain = RunChain.of(layout, associations_of(layout, sae, option=option).run)
    if chain.activations.origin == "vectors":
        raise UsageError(
            f"the SAE {chain.associations.sae} was trained on given vectors, and no model stands behind them: "
            f"{vectors}; name an SAE of a model's tokens with {option}"
        )
    if chain.activations.origin == "recorded":
        raise UsageError(f"{no_model(chain.activations_run)}, and {recorded}")
    refuse_other_site(chain)
    return chain


def measured_features(wanted: Sequence[int], features: pl.DataFrame) -> tuple[int, ...]:
    """The features to measure, ascending: those that --feature names, or all that fire.

    `features`: the table of the associations. Raises UsageError for a feature that is unknown or never fires.
    """
    alive = features.filter(~pl.col("dead") & (pl.col("p99") > 0))["feature_id"].to_list()
    if unknown := [feature for feature in wanted if feature >= features.height]:
        raise UsageError(
            f"--feature was {unknown[0]}; this SAE has features 0 to {features.height - 1}: `scsae features` lists them"
        )
    if dead := [feature for feature in wanted if feature not in set(alive)]:
        raise UsageError(f"--feature was {dead[0]}, which never fires; choose one that `scsae features` lists")
    if not alive:
        raise UsageError("no feature of this SAE fires, so there is nothing to measure; train another one")
    return tuple(sorted(set(wanted))) or tuple(sorted(alive))


def paths_of(chain: RunChain, stage: str, *, num_gpus: float) -> SteeringPaths:
    """The paths at which actors find model, data and SAE; `stage` is the command."""
    layout = chain.layout
    return SteeringPaths(
        activations=str(chain.activations_run.path.resolve()),
        sae=str(layout.saes_dir(chain.associations.sae).resolve()),
        store=str(layout.root.resolve()),
        dataset=chain.associations.dataset,
        site=chain.sae.site,
        seed=chain.activations.seed,
        device="cuda" if num_gpus > 0 else "cpu",
        stage=stage,
        vectors=None,
    )


def first_cells(context: SteeringContext, chain: RunChain) -> "Iterator[Tokens]":
    """The tokens of the first cells of the panel, one cell at a time."""
    cells = read_panel_cells(chain.layout.cells_dir(chain.associations.dataset), ["cell_idx"])["cell_idx"]
    for block in context.blocks(cells.head(_FIRST_CELLS).to_numpy()):
        for i in range(len(block.cells)):
            yield block.tokens.cells(i, i + 1)


def gene_symbols(chain: RunChain) -> pl.DataFrame:
    """The symbol of each gene of the data that is a token, and its gene_id in the model's vocabulary, ascending."""
    codes = CodesRun.open(chain.layout.codes_dir(chain.associations.codes))
    genes = load_token_of_gene(chain.layout, codes).drop_nulls("gene_id").select("symbol", "gene_id")
    return genes.unique("gene_id", keep="first").sort("gene_id").with_columns(pl.col("gene_id").cast(pl.Int32))


def firing_of(chain: RunChain) -> npt.NDArray[np.int64]:
    """In how many cells of the panel each feature fires [n_features]."""
    return panel_firing(CodesRun.open(chain.layout.codes_dir(chain.associations.codes)))
