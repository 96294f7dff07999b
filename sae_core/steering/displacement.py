"""`Displace`: add a vector to the activations themselves, by the group of the cell: what needs no autoencoder.

    x' = x + amount * vector[group, gene]
With the difference between the mean activations of two conditions as the vector it is the baseline that a choice of
features is held against: it moves the means all the way, features or not.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sae_core.errors import ConfigError
from sae_core.sae import SparseCodes
from sae_core.scfm.sites import TokenInfo
from sae_core.steering.group_means import GroupMeans
from sae_core.steering.masks import MaskedPatch


@dataclass(frozen=True, kw_only=True, eq=False)
class Displace(MaskedPatch):
    """A patch that adds `amount` times the vector of its group (and gene) to each token; without a vector, nothing."""

    vectors: GroupMeans
    """One column for each dimension of the activations."""
    group_of_cell: Int64[Tensor, " cell"]
    """Group of each cell that the model is given."""
    amount: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.amount):
            raise ConfigError(f"amount = {self.amount} is not finite: an activation cannot be moved by it.")

    @property
    def groups(self) -> Int64[Tensor, " cell"]:
        """Group of each cell."""
        return self.group_of_cell

    @torch.no_grad()
    def steered(
        self, x: Float[Tensor, "token d_model"], info: TokenInfo, codes: SparseCodes | None = None
    ) -> Float[Tensor, "token d_model"]:
        """Displaced activations; `codes` are not looked at. `ConfigError` if the vectors have another width than x."""
        if self.vectors.values.shape[1] != x.shape[1]:
            raise ConfigError(
                f"the vectors have {self.vectors.values.shape[1]} columns: they need one for each of the {x.shape[1]} "
                "dimensions of the activations."
            )
        step, known = self.vectors.lookup(self.group_of_cell, info)
        step = self.amount * step
        moved = (self.selects(info) & known & (step != 0).any(dim=1)).nonzero().squeeze(1)
        out = x.clone()
        out[moved] = (x[moved] + step[moved].to(x.device)).to(x.dtype)
        return out
