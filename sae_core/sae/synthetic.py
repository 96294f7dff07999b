"""`SyntheticDictionary`: activations made of known features, to see whether an autoencoder finds them.

More directions than dimensions (superposition), each active on its own share of the tokens. Shares are log-uniform
over a factor of `spread`, as densities of features in real models are (a few on most cells, most on a few), scaled so
that `l0` are active on average; lengths are 0.5 plus an exponential of mean 1; the whole is off centre, with isotropic
noise.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from sae_core.errors import ConfigError


class SyntheticDictionary:
    """Unit directions [n_features d_model] and a source of activations made of them.

    Usage: `planted = SyntheticDictionary(n_features=512, d_model=256); x = planted.sample(4096, seed=1)`.
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
        """`noise` is its length against that of a typical active feature; `ConfigError` if `l0` is out of reach."""
        generator = torch.Generator().manual_seed(seed)
        self.directions: Float[Tensor, "feature d_model"] = functional.normalize(
            torch.randn(n_features, d_model, generator=generator), dim=1
        )
        share = spread ** -torch.rand(n_features, generator=generator)
        self.density: Float[Tensor, " feature"] = share * (l0 / share.sum())
        """Share of the tokens on which each feature is active."""
        if not 0 < float(self.density.max()) <= 1:
            raise ConfigError(
                f"l0 = {l0} of {n_features} features with densities over a factor of {spread} would need a feature on "
                f"{float(self.density.max()):.2f} of the tokens: lower l0 or the spread."
            )
        self.mean: Float[Tensor, " d_model"] = torch.randn(d_model, generator=generator) / math.sqrt(d_model)
        self.noise = noise

    def sample(self, n_tokens: int, seed: int) -> Float[Tensor, "token d_model"]:
        """Activations of `n_tokens` tokens."""
        generator = torch.Generator().manual_seed(seed)
        n_features, d_model = self.directions.shape
        on = torch.rand(n_tokens, n_features, generator=generator) < self.density
        length = 0.5 - torch.log1p(-torch.rand(n_tokens, n_features, generator=generator))
        noise = torch.randn(n_tokens, d_model, generator=generator) * (1.5 * self.noise / math.sqrt(d_model))
        return (on * length) @ self.directions + self.mean + noise


def mean_max_cosine(planted: Float[Tensor, "planted d_model"], learned: Float[Tensor, "learned d_model"]) -> float:
    """Mean over planted directions of the largest cosine with a learned one; of unit rows."""
    return float((planted @ learned.T).amax(dim=1).mean())
