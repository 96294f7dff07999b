"""The inference threshold: theta such that held-out tokens have k active features on average.

During training of BatchTopK the cutoff depends on the batch. A running mean of it is biased (by up to 6 % on the mini
model) and is therefore only reported. E[L0] as a function of theta is a count of pre-activations above theta, so the
wanted theta is an order statistic: the (k * n_tokens)-th largest. Where each feature learns its threshold (JumpReLU),
the ratios of the thresholds are kept and one common factor is calibrated by the same count of pre / theta, because
training brings L0 only near k and autoencoders are compared at equal L0.

The order statistic is found in a histogram of the bit patterns of the numbers: positive float32 patterns ascend with
their value, and their upper 19 bits are bins of relative width 2^-11 (0.05 %) over the whole range of floats. One pass
over any number of tokens takes 4 MB, and the histograms of two workers can be added. The bin is found by bisection of
the cumulative counts.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sae_core.errors import ConfigError
from sae_core.sae.autoencoder import SparseAutoencoder

SHIFT = 12  # bits of the mantissa that a bin leaves out
N_BINS = 2 ** (31 - SHIFT)
LEAST_THETA = 1e-6  # smaller learned thresholds are raised to this value, so that a factor can act on them


class Calibration(NamedTuple):
    """A factor on the thresholds, and the L0 that it gives on the held-out tokens."""

    factor: float
    """Theta is `factor` times the learned thresholds, or `factor` itself where thresholds are not learned, in the
    units of the autoencoder's pre-activations."""
    l0: float
    """Mean number of pre-activations above theta; less than k only if fewer than k are positive."""
    n_tokens: int


def calibrate_threshold(sae: SparseAutoencoder, batches: Iterable[Float[Tensor, "_ _"]]) -> Calibration:
    """The factor for which E[L0] = k on raw activations that training has not seen; the autoencoder is not changed.

    Raises:
        ConfigError: there is no token.
    """
    relative = _relative_theta(sae)
    histogram, n_tokens = torch.zeros(N_BINS, dtype=torch.int64), 0
    for x in batches:
        histogram += _histogram(sae, relative, x)
        n_tokens += x.shape[0]
    if n_tokens == 0:
        raise ConfigError("batches hold 0 tokens: calibrate the threshold on held-out activations.")
    above = histogram.flip(0).cumsum(0).flip(0)  # above[i]: entries in bin i or higher
    wanted = sae.config.k * n_tokens
    if int(above[0]) <= wanted:
        return Calibration(0.0, int(above[0]) / n_tokens, n_tokens)
    # careful: `above` descends, and searchsorted bisects what ascends
    upper = N_BINS - int(torch.searchsorted(above.flip(0), wanted, right=True))
    lower = max(upper - 1, 0)
    best = min((lower, upper), key=lambda i: abs(_count(above, i) - wanted))
    return Calibration(_below(best), _count(above, best) / n_tokens, n_tokens)


def calibrated_theta(sae: SparseAutoencoder, calibration: Calibration) -> Float[Tensor, " feature"]:
    """The calibrated thresholds of `sae`, in the units of its pre-activations."""
    return calibration.factor * _relative_theta(sae)


def _relative_theta(sae: SparseAutoencoder) -> Float[Tensor, " feature"]:
    if "theta" in sae.architecture.learned:
        return sae.theta.detach().clamp_min(LEAST_THETA)
    return torch.ones_like(sae.theta)


@torch.no_grad()
def _histogram(
    sae: SparseAutoencoder, relative: Float[Tensor, " feature"], x: Float[Tensor, "token d_model"]
) -> Int64[Tensor, " bins"]:
    pre = sae.pre_activations(sae.normalise(x)).float()
    bits = (pre / relative)[pre > 0].view(torch.int32) >> SHIFT
    return torch.bincount(bits, minlength=N_BINS).cpu()


def _count(above: Int64[Tensor, " bins"], index: int) -> int:
    return int(above[index]) if index < N_BINS else 0


def _below(index: int) -> float:
    """The largest float32 below bin `index`, so that `pre > theta` holds for exactly that bin and those above."""
    return float(torch.tensor(max((index << SHIFT) - 1, 0), dtype=torch.int32).view(torch.float32))
