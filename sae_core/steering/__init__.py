"""Steering: change features of chosen tokens inside a foundation model and measure what its outputs become.

The room takes a model, tokenized cells, an autoencoder and a site. An `Intervention` says how codes change,
`Steering` turns that change into a patch of activations, and the model's remaining blocks turn the patched
activations into embeddings or predictions. The door is `SteeredModel(model, tokens, sae, site)`, which runs many
patches on the same cells without repeating work; a single patch, such as
`Steering(sae=sae, intervention=Clamp(features=[7], dose=2.0, unit=p99))`, also goes straight into
`FoundationModel.embed`. `SteeredVectors` does the same to vectors of cells that no model takes further. The controls of
steering are in `nulls`.
"""

from sae_core.steering.apply import Steering
from sae_core.steering.displacement import Displace
from sae_core.steering.forward import SteeredModel
from sae_core.steering.group_means import GroupMeans
from sae_core.steering.interventions import Ablate, Add, Clamp, Intervention, Scale, Shift, Toward
from sae_core.steering.nulls import matched_features, random_direction
from sae_core.steering.vectors import SteeredVectors

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
    "SteeredVectors",
    "Steering",
    "Toward",
    "matched_features",
    "random_direction",
]
