"""Steering: change the features of chosen tokens and see what the model makes of it.

`Steering(sae=sae, intervention=Clamp(features=[7], dose=2.0, unit=p99))` is a patch for `FoundationModel.embed`;
`SteeredModel(model, tokens, sae, site)` runs many of them on the same cells, exactly and without doing anything twice.
"""

from sae_core.steering.apply import Steering
from sae_core.steering.displacement import Displace
from sae_core.steering.forward import SteeredModel
from sae_core.steering.group_means import GroupMeans
from sae_core.steering.interventions import Ablate, Add, Clamp, Intervention, Scale, Shift, Toward
from sae_core.steering.nulls import matched_features, random_direction

__all__ = [
    "Ablate",
    "Add",
    "Clamp",
    "Displace",
    "GroupMeans",
    "Intervention",
    "Scale",
    "Shift",
    "SteeredModel",
    "Steering",
    "Toward",
    "matched_features",
    "random_direction",
]
