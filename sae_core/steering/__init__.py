"""Steering: change the features of chosen tokens and see what the model makes of it.

`Steering(sae=sae, intervention=Clamp(features=[7], dose=2.0, unit=p99))` is a patch for `FoundationModel.embed`.
"""

from sae_core.steering.apply import Steering
from sae_core.steering.interventions import Ablate, Add, Clamp, Intervention, Scale, Toward
from sae_core.steering.nulls import matched_features, random_direction

__all__ = [
    "Ablate",
    "Add",
    "Clamp",
    "Intervention",
    "Scale",
    "Steering",
    "Toward",
    "matched_features",
    "random_direction",
]
