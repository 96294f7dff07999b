"""`Displace`: add a vector to the activations themselves, chosen by the group of the cell, without an autoencoder.

    x' = x + amount * vector[group, gene]
With the difference between the mean activations of two conditions as the vector, this is the baseline that steering by
features is compared with: it moves the mean of one condition to that of the other without any choice of features.
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
    """A patch that adds `amount` times the vector of its group (and gene) to each token that has one.

    Raises:
        ConfigError: the amount is not finite, or a mask is empty.
    """

    vectors: GroupMeans
    """The vectors, with one column for each dimension of the activations."""
    group_of_cell: Int64[Tensor, " cell"]
    """The group of each cell in the model's input."""
    amount: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.amount):
            raise ConfigError(f"amount = {self.amount} is not finite; allowed is any finite number.")

    @property
    def groups(self) -> Int64[Tensor, " cell"]:
        """The group of each cell."""
        return self.group_of_cell

    @torch.no_grad()
    def steered(
        self, x: Float[Tensor, "token d_model"], info: TokenInfo, codes: SparseCodes | None = None
    ) -> Float[Tensor, "token d_model"]:
        """The displaced activations; `codes` have no effect.

        Raises:
            ConfigError: the vectors have another width than x.
        """
        if self.vectors.values.shape[1] != x.shape[1]:
            raise ConfigError(
                f"the vectors have {self.vectors.values.shape[1]} columns; allowed is {x.shape[1]}, one for each "
                "dimension of the activations."
            )
        step, has_row = self.vectors.lookup(self.group_of_cell, info)
        step = self.amount * step
        moved = (self.selects(info) & has_row & (step != 0).any(dim=1)).nonzero().squeeze(1)
        out = x.clone()
        out[moved] = (x[moved] + step[moved].to(x.device)).to(x.dtype)
        return out
