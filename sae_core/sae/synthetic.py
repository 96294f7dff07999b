"""`SyntheticDictionary`: activations made of known features, to test whether an autoencoder finds them.

There are more directions than dimensions (superposition), and each is active on its own share of the tokens. The
shares are log-uniform over a factor of `spread`, like the densities of features in real models (a few fire on most
cells, most on a few), and scaled so that `l0` directions are active on average. Lengths are 0.5 plus an exponential
variable of mean 1. The activations have a mean other than zero and isotropic noise.

The directions must have nothing to do with the weights from which an autoencoder starts, which are drawn from a seed
as well: a generator of the same seed would start it at the truth. What is drawn here is therefore drawn from seeds of
its own (`own_seed`).
"""

import hashlib
import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from sae_core.errors import ConfigError


def own_seed(seed: int, what: str) -> int:
    """A seed of the data that is no other generator's: 63 bits of a hash of `what` is drawn and its number."""
    digest = hashlib.sha256(f"{what} {seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class SyntheticDictionary:
    """Unit directions [n_features d_model], and samples of activations made of them.

    Usage: `dictionary = SyntheticDictionary(n_features=512, d_model=256); x = dictionary.sample(4096, seed=1)`.
    """

    def __init__(
        self,
        *,
        n_features: int,
        d_model: int,
        l0: float = 16.0,
        spread: float = 100.0,
        noise: float = 0.05,
        seed: int = 0,
    ) -> None:
        """Draw directions, densities and mean; `noise` is relative to the length of a typical active feature.

        Raises:
            ConfigError: the densities for this `l0` would exceed 1.
        """
        generator = torch.Generator().manual_seed(own_seed(seed, "directions"))
        self.directions: Float[Tensor, "feature d_model"] = functional.normalize(
            torch.randn(n_features, d_model, generator=generator), dim=1
        )
        share = spread ** -torch.rand(n_features, generator=generator)
        self.density: Float[Tensor, " feature"] = share * (l0 / share.sum())
        """Share of the tokens on which each feature is active."""
        if not 0 < float(self.density.max()) <= 1:
            raise ConfigError(
                f"l0 = {l0} with {n_features} features and spread = {spread} needs a density of "
                f"{float(self.density.max()):.2f}; allowed is at most 1: lower l0 or spread."
            )
        self.mean: Float[Tensor, " d_model"] = torch.randn(d_model, generator=generator) / math.sqrt(d_model)
        self.noise = noise

    def sample(self, n_tokens: int, seed: int) -> Float[Tensor, "token d_model"]:
        """The activations of `n_tokens` tokens."""
        generator = torch.Generator().manual_seed(own_seed(seed, "tokens"))
        n_features, d_model = self.directions.shape
        on = torch.rand(n_tokens, n_features, generator=generator) < self.density
        length = 0.5 - torch.log1p(-torch.rand(n_tokens, n_features, generator=generator))
        noise = torch.randn(n_tokens, d_model, generator=generator) * (1.5 * self.noise / math.sqrt(d_model))
        return (on * length) @ self.directions + self.mean + noise


def mean_max_cosine(true: Float[Tensor, "true d_model"], learned: Float[Tensor, "learned d_model"]) -> float:
    """The mean over true directions of the largest cosine with a learned one; the rows have unit length.

    Sharkey, Braun, Millidge 2022, "Taking features out of superposition with sparse autoencoders".
    """
    return float((true @ learned.T).amax(dim=1).mean())
