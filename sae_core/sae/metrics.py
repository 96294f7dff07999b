"""The metrics of an autoencoder: l0, fvu, dead_fraction and density, independent of the batch size.

The fvu is the fraction of variance unexplained, sum ||x - x_hat||^2 / sum ||x - mean||^2, with one mean over all
tokens: 1 for predicting the mean, 0 for a perfect reconstruction. Some libraries use the mean of each batch, which
makes the fvu depend on the batch size.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from sae_core.errors import ConfigError
from sae_core.sae.autoencoder import SparseAutoencoder
from sae_core.sae.codes import SparseCodes
from sae_core.sae.normaliser import Normaliser


@dataclass(frozen=True, kw_only=True, eq=False)
class Metrics:
    """The metrics of an autoencoder on a set of tokens."""

    l0: float
    """Active features per token."""
    fvu: float
    """Fraction of variance unexplained."""
    dead_fraction: float
    """Share of the features that fired on none of the tokens."""
    density: Float64[Tensor, " feature"]
    """Share of the tokens on which each feature fired."""
    n_tokens: int


class MetricAccumulator:
    """The sums from which `Metrics` are computed, updated batch by batch."""

    def __init__(self, d_model: int, n_features: int) -> None:
        self.spread = Normaliser(d_model)
        self.error = 0.0
        self.fired = torch.zeros(n_features, dtype=torch.int64)

    def update(
        self, x: Float[Tensor, "token d_model"], x_hat: Float[Tensor, "token d_model"], codes: SparseCodes
    ) -> None:
        """Add a batch of raw activations with their reconstructions and codes."""
        self.spread.update(x)
        self.error += float((x - x_hat).double().square().sum())
        self.fired += torch.bincount(codes.col[codes.value != 0], minlength=self.fired.numel()).cpu()

    def result(self) -> Metrics:
        """The metrics over all batches; a `TrainingError` if all tokens are equal."""
        n_tokens = self.spread.n_tokens
        return Metrics(
            l0=int(self.fired.sum()) / n_tokens,
            fvu=self.error / (self.spread.scale**2 * n_tokens),
            dead_fraction=float((self.fired == 0).double().mean()),
            density=self.fired.double() / n_tokens,
            n_tokens=n_tokens,
        )


@torch.no_grad()
def evaluate(sae: SparseAutoencoder, batches: Iterable[Float[Tensor, "_ _"]]) -> Metrics:
    """The metrics of an autoencoder on batches of raw activations.

    Raises:
        ConfigError: there is no token.
        TrainingError: all tokens are equal, or an activation is not finite.
    """
    accumulator = MetricAccumulator(sae.config.d_model, sae.config.n_features)
    for x in batches:
        codes = sae.encode(x)
        accumulator.update(x, sae.decode(codes), codes)
    if accumulator.spread.n_tokens == 0:
        raise ConfigError("batches hold 0 tokens; an evaluation needs at least 2.")
    return accumulator.result()
