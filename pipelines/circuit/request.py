"""The request of a circuit run: its options, checked against the store before anything is written."""

import math
from dataclasses import dataclass

import feature_store.effects.nulls as nulls_module
import sae_core.effects.cell_at_site as cell_module
import sae_core.effects.directions as directions_module
import sae_core.effects.later_codes as later_module
from feature_store.errors import OutdatedRunError
from feature_store.query.runs import RunChain, resolve_run
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from feature_store.storage.plans import ActivationsPlan, CircuitPlan, SAEPlan
from pipelines.circuit import actors as actors_module
from pipelines.circuit import tables as tables_module
from pipelines.circuit.actors import CircuitJob
from pipelines.config import CircuitOptions
from pipelines.effects import cells as cells_module
from pipelines.effects import shards as shards_module
from pipelines.effects.chain import FeaturesRequest, chain_behind, firing_of, measured_features, paths_of
from pipelines.effects.request import nulls_of_each
from pipelines.errors import UsageError
from pipelines.steering.context import SteeringContext
from sae_core.effects import check_order
from sae_core.scfm import Site

_MODULES = (
    nulls_module,
    cell_module,
    directions_module,
    later_module,
    actors_module,
    cells_module,
    shards_module,
    tables_module,
)
"""Those whose constants the content depends on."""


@dataclass(frozen=True, kw_only=True)
class CircuitRequest(FeaturesRequest):
    """A checked request; the features are those of the earlier SAE.

    Attributes:
        later: id of the later SAE.
        later_plan: its plan.
    """

    later: str
    later_plan: SAEPlan

    @classmethod
    def of(cls, options: CircuitOptions, layout: Layout) -> "CircuitRequest":
        """Read the inputs and check all options.

        Raises:
            UsageError: a feature is unknown or never fires, the SAEs are of different models or of cell vectors, or the
                second does not lie later.
            NotFoundError: there is no such SAE, or the first has no associations.
        """
        chain = chain_behind(
            layout,
            options.from_sae,
            vectors="a vector is followed by no layer",
            recorded="a circuit runs the model behind the site again",
            option="--from-sae",
        )
        if options.to_sae is None:
            later = newest_later(layout, chain)
        else:
            later = resolve_run(layout, "saes", options.to_sae, option="--to-sae").run
        plan = SAEPlan.of(commit.Run.open(layout.saes_dir(later)))
        later_activations = ActivationsPlan.of(commit.Run.open(layout.activations_dir(plan.activations)))
        if later_activations.origin != "model" or later_activations.readout is not None:
            raise UsageError(
                f"--to-sae was {later}, which is not an SAE of a model's tokens, so no forward pass leads to what it "
                "reads; name one that was trained on tokens of a later layer"
            )
        own, other = chain.sae.model_digest, plan.model_digest
        if own != other:
            raise UsageError(
                f"--from-sae {chain.associations.sae} and --to-sae {later} are of different models ({own[:12]} and "
                f"{other[:12]}); name two SAEs of one model, of an earlier and a later layer"
            )
        features = commit.read_table(layout.associations_dir(chain.run) / "features")
        measured = measured_features(options.feature, features)
        return cls(
            options=options,
            layout=layout,
            chain=chain,
            later=later,
            later_plan=plan,
            measured=measured,
            n_nulls=options.n_nulls or nulls_of_each(len(measured)),
        )

    @property
    def plan(self) -> CircuitPlan:
        """The plan, which holds all that determines the run."""
        return CircuitPlan(
            **self.plan_fields(_MODULES),
            to_sae=self.later,
            to_sae_manifest=commit.Run.open(self.layout.saes_dir(self.later)).manifest().sha,
            to_site=self.later_plan.site,
        )

    def job(self, draws: str) -> CircuitJob:
        """What actors need to write the draws. ConfigError unless the second SAE reads a later site than the first."""
        self._check_order()
        return CircuitJob(
            **self.job_fields("circuit", draws),
            later_sae=str(self.layout.saes_dir(self.later).resolve()),
            later_site=self.later_plan.site,
            density=firing_of(self.chain),
        )

    def _check_order(self) -> None:
        """Raise ConfigError unless the second SAE reads a later site than the first; this loads the model."""
        context = SteeringContext(paths_of(self.chain, "circuit", num_gpus=0))
        check_order(context.model, context.site, self.later_plan.site)


def newest_later(layout: Layout, chain: RunChain) -> str:
    """The newest SAE of tokens of the same model at a later site. UsageError if there is none."""
    own = chain.sae
    for info in layout.runs("saes"):
        if not info.complete:
            continue
        try:
            plan = SAEPlan.of(commit.Run.open(info.path))
        except OutdatedRunError:
            continue
        is_of_model = plan.model_digest == own.model_digest and plan.control_of is None
        if is_of_model and _place(plan.site) > _place(own.site):
            return info.run
    raise UsageError(
        f"there is no SAE of a later layer of {own.model} than {own.site}, the site of {chain.associations.sae}; make "
        f"one with `scsae extract DATA --layer N {layout.store_option}` and `scsae train {layout.store_option}`, or "
        "name one with --to-sae"
    )


def _place(site: str) -> tuple[float, int]:
    """How far a site lies in a model: the blocks before it, then its place in a block."""
    parsed = Site.parse(site)
    n_blocks = math.inf if parsed.n_blocks is None else parsed.n_blocks
    return n_blocks, ("attention", "mlp").index(parsed.kind) if parsed.kind in ("attention", "mlp") else 2
