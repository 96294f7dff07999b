"""The directions along which the tokens of a feature are moved: its own, and those of its nulls.

A null keeps the tokens and the length of every step and changes the direction alone, so that nothing but the direction
can explain a difference. There are two kinds. Random directions are drawn uniformly; most of their length lies where
activations hardly vary, and a model may be blind to it. Mixtures are normal combinations of the decoder rows of other
features, of like density; they lie where features lie, and are the harder null. One other feature alone would be no
null: what it does to genes is as real as what this feature does, and a null that holds true effects as often as they
occur among features leaves nothing to be found. Both kinds are drawn anew for each feature, from (seed, feature).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from sae_core.errors import ConfigError

N_MIXED = 64
"""The number of features that are mixed: those nearest in log density."""
MIN_MIXED = 2


@dataclass(frozen=True, kw_only=True)
class Directions:
    """Unit vectors: the feature's own direction, then its nulls of each kind.

    Attributes:
        own: [d_model].
        random: [n_nulls d_model].
        mixture: [n_nulls d_model].
        norm: the length of the feature's decoder row, by which a change of the code becomes a step.
    """

    own: Float[Tensor, " d_model"]
    random: Float[Tensor, "null d_model"]
    mixture: Float[Tensor, "null d_model"]
    norm: float

    @property
    def all(self) -> Float[Tensor, "direction d_model"]:
        """Own, random, mixture."""
        return torch.cat([self.own[None], self.random, self.mixture])


def draw_directions(
    W_dec: Float[Tensor, "feature d_model"],
    feature: int,
    density: Float[Tensor, " feature"],
    *,
    n_nulls: int,
    seed: int,
) -> Directions:
    """The directions of a feature and of `n_nulls` nulls of each kind.

    Args:
        W_dec: the decoder's rows.
        feature: the feature.
        density: share of tokens (or cells) on which each feature fires; features with 0 are not mixed.
        n_nulls: number of nulls of each kind.
        seed: of the draws.

    Raises:
        ConfigError: fewer than MIN_MIXED other features fire, or the feature's row is zero.
    """
    norm = float(torch.linalg.vector_norm(W_dec[feature].double()))
    if norm == 0:
        raise ConfigError(f"the decoder row of feature {feature} is zero, so no change of it moves an activation")
    living = (density > 0) & (torch.linalg.vector_norm(W_dec, dim=1).cpu() > 0)
    living[feature] = False
    n_living = int(living.sum())
    if n_living < MIN_MIXED:
        raise ConfigError(f"the null of an effect mixes at least {MIN_MIXED} other features, and {n_living} fire")
    log_density = density.double().clamp(min=1e-300).log()
    distance = (log_density - log_density[feature]).abs().where(living, torch.inf)
    nearest = distance.argsort(stable=True)[: min(N_MIXED, n_living)].to(W_dec.device)
    rng = np.random.default_rng([seed, feature])
    random = torch.from_numpy(rng.standard_normal((n_nulls, W_dec.shape[1]))).to(W_dec.device)
    weight = torch.from_numpy(rng.standard_normal((n_nulls, len(nearest)))).to(W_dec.device)
    mixture = weight @ functional.normalize(W_dec[nearest].double(), dim=1)
    return Directions(
        own=functional.normalize(W_dec[feature], dim=0),
        random=functional.normalize(random, dim=1).to(W_dec.dtype),
        mixture=functional.normalize(mixture, dim=1).to(W_dec.dtype),
        norm=norm,
    )
