"""How good an autoencoder is: l0, fvu, dead_fraction, density; one definition each, independent of the batch size.

FVU is the fraction of variance UNexplained, sum ||x - x_hat||^2 / sum ||x - mean||^2 with ONE mean over all tokens: 1
for predicting the mean, 0 for a perfect copy. A mean per batch, as seen elsewhere, makes the figure depend on the
batch size.
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
    """What an evaluation found."""

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
    """The sums behind `Metrics`, batch by batch."""

    def __init__(self, d_model: int, n_features: int) -> None:
        self.spread = Normaliser(d_model)
        self.error = 0.0
        self.fired = torch.zeros(n_features, dtype=torch.int64)

    def update(
        self, x: Float[Tensor, "token d_model"], x_hat: Float[Tensor, "token d_model"], codes: SparseCodes
    ) -> None:
        """Take in a batch of raw activations, their reconstruction and their codes."""
        self.spread.update(x)
        self.error += float((x - x_hat).double().square().sum())
        self.fired += torch.bincount(codes.col[codes.value != 0], minlength=self.fired.numel()).cpu()

    def result(self) -> Metrics:
        """Metrics of all batches; `TrainingError` if the tokens do not vary."""
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
    """Metrics of an autoencoder's inference code on raw activations."""
    accumulator = MetricAccumulator(sae.config.d_model, sae.config.n_features)
    for x in batches:
        codes = sae.encode(x)
        accumulator.update(x, sae.decode(codes), codes)
    if accumulator.spread.n_tokens == 0:
        raise ConfigError("the evaluation was given no token: give at least two.")
    return accumulator.result()
