"""Options of `scsae circuit`."""

from typing import Annotated

import pydantic
from pydantic import Field

from pipelines.config.options import ActorOptions, FeatureId, MovedDataOptions, as_tuple


class CircuitOptions(ActorOptions, MovedDataOptions):
    """Measure which features of a later SAE change when a feature of an earlier one is ablated.

    Both SAEs are of one model. On `test` cells in which an earlier feature fires, it is ablated on the tokens where it
    fires, and the later SAE encodes what comes out of the blocks between. The same steps along other directions are
    the null. The table `feature_edge` has a row for each pair that is significant, and for the next ones.
    """

    from_sae: str | None = None
    """SAE of the earlier layer; it has to have associations. Default: that of the newest associations."""
    to_sae: str | None = None
    """SAE of a later layer of the same model. Default: the newest one."""
    feature: Annotated[tuple[FeatureId, ...], pydantic.BeforeValidator(as_tuple)] = ()
    """Id of an earlier feature to ablate; may be repeated. Default: all features that fire."""
    cells: int = Field(default=64, ge=1)
    """Number of test cells for each earlier feature, drawn from those in which it fires, evenly from the donors."""
    n_nulls: int | None = Field(default=None, ge=3)
    """Number of directions of each null for each earlier feature: random ones, and mixtures of other features.
    Default: 4, and more where fewer than 25 features are ablated."""
    seed: int = Field(default=0, ge=0)
    """Seed of the cells and of the nulls."""
