"""Options of `scsae effects`."""

from typing import Annotated

import pydantic
from pydantic import Field

from pipelines.config.options import ActorOptions, FeatureId, MovedDataOptions, as_tuple


class EffectsOptions(ActorOptions, MovedDataOptions):
    """Measure what features do to the model's predictions of hidden genes.

    On `test` cells in which a feature fires, part of the genes are hidden. The feature is ablated, or boosted to its
    99th percentile, on the visible tokens where it fires, and the model predicts the hidden genes. The same steps
    along other directions are the null. The table `feature_effect` has a row for each feature, gene and intervention.
    """

    sae: str | None = None
    """SAE whose features are measured; it has to have associations. Default: that of the newest associations."""
    feature: Annotated[tuple[FeatureId, ...], pydantic.BeforeValidator(as_tuple)] = ()
    """Id of a feature to measure; may be repeated. Default: all features that fire."""
    cells: int = Field(default=64, ge=1)
    """Number of test cells for each feature, drawn from those in which it fires, evenly from the donors."""
    n_nulls: int | None = Field(default=None, ge=3)
    """Number of directions of each null for each feature: random ones, and mixtures of other features. Default: 4, and
    more where fewer than 25 features are measured."""
    seed: int = Field(default=0, ge=0)
    """Seed of the cells, of the hidden genes and of the nulls."""
