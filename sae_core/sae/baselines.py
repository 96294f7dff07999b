"""Baselines: dictionaries of fixed directions in the form of an autoencoder, to which a trained one is compared.

A feature that matches a cell type is weak evidence if a neuron of the model or a principal component matches it as
well. The baselines are therefore `SparseAutoencoder`s: the same code saves, loads, encodes, associates and steers
them, at the same L0.

| baseline | rows of W_dec | rows of W_enc |
|---|---|---|
| neurons | +e_i and -e_i, the coordinates of x | the same |
| pca | + and - the principal axes of x | the same |
| ica | + and - the columns of the mixing matrix, at unit length | the unmixing rows times those lengths |
| random | F random unit directions | the same |

Codes are not negative, so each direction gives two features: f, and f + n_directions for the opposite direction.
    z_f = (x - mu) . W_enc[f] where that is above theta, else 0          x_hat = mu + z W_dec
As in a trained autoencoder, a value is a length in the units of x, every feature has the same threshold, and theta is
calibrated to E[L0] = k on held-out tokens. x_hat therefore keeps the coordinates (neurons) or components (pca, which
has the least error among orthogonal directions) that are far from the mean, and replaces the others by the mean. For
ica it is the sum of the sources far from the mean; random directions overlap, so their sum is not a projection.
Directions are found on `train` tokens.

One theta for all features is the stronger baseline: thresholds in proportion to each direction's standard deviation
(kang18_ifnb, layer 2 of mini, k 16) left FVU .50, .48 and .45 instead of .28, .16 and .40 for neurons, pca and ica.
The AUROC of the best feature of a cell type was the same to .002, also without any threshold.

Cost on one core for 65,536 tokens of d_model 128: pca .5 s; ica 10 s (90 iterations), and growing as d_model squared.
Papers: FastICA Hyvarinen 1999, doi:10.1109/72.761722; random-weight controls arXiv 2501.17727.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn import functional

from sae_core.errors import ConfigError
from sae_core.sae.autoencoder import SparseAutoencoder
from sae_core.sae.calibration import calibrate_threshold, calibrated_theta
from sae_core.sae.config import SAEConfig
from sae_core.sae.normaliser import Normaliser

LEAST_VARIANCE = 1e-6
"""Components with less than this share of the first one's variance are left out: they are rounding errors, or
directions that a layer norm has removed."""
ICA_ITERATIONS = 200
ICA_TOLERANCE = 1e-4


class Directions(NamedTuple):
    """The directions of a baseline: a centred x has the lengths `x @ encoder.T` along the unit rows of `decoder`."""

    encoder: Float[Tensor, "direction d_model"]
    decoder: Float[Tensor, "direction d_model"]
    notes: dict[str, float]
    """Figures of the fit, such as the number of iterations."""


FindDirections = Callable[[Float[Tensor, "token d_model"], int, torch.Generator], Directions]
"""(centred tokens, n_features of the autoencoder, generator) -> directions."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """How one kind of baseline finds its directions."""

    find: FindDirections
    signed: bool = True
    """Whether a direction and its opposite are two features."""
    needs_width: bool = False
    """Whether its number of features is that of the autoencoder to which it is compared."""


class FittedBaseline(NamedTuple):
    """A calibrated baseline without gradients, and figures of its fit."""

    sae: SparseAutoencoder
    notes: dict[str, float]


class Unmixing(NamedTuple):
    """A rotation of white tokens to independent components, and the end of its search."""

    rotation: Float[Tensor, "component dimension"]
    n_iterations: int
    change: float
    """The largest change of a component in the last iteration, 1 - |cosine|."""


def fit_baseline(
    kind: str,
    train: Float[Tensor, "token d_model"],
    held_out: Iterable[Float[Tensor, "_ _"]],
    *,
    k: int,
    n_features: int,
    seed: int = 0,
) -> FittedBaseline:
    """A baseline fitted to raw `train` activations and calibrated to E[L0] = k on raw `held_out` activations.

    Args:
        kind: a key of `BASELINES`.
        train: tokens for the mean and the directions.
        held_out: batches of tokens for the threshold.
        k: active features per token.
        n_features: number of features of the autoencoder to which it is compared; only `random` uses it, the others
            have two features for each direction.
        seed: of random directions, and of the start of ica.

    Raises:
        ConfigError: the kind is unknown, k is larger than the number of features, or there is no held-out token.
        TrainingError: activations are not finite, or all are equal.
    """
    if kind not in BASELINES:
        raise ConfigError(f"baseline = {kind!r} is not known; choose one of {', '.join(BASELINES)}.")
    normaliser = Normaliser.fit([train])
    spread = normaliser.scale
    generator = torch.Generator().manual_seed(seed)
    found = BASELINES[kind].find((train - normaliser.mu) / spread, n_features, generator)
    sign = torch.tensor([1.0, -1.0] if BASELINES[kind].signed else [1.0])
    config = SAEConfig(d_model=train.shape[1], n_features=len(sign) * len(found.decoder), k=k)
    sae = SparseAutoencoder(config).requires_grad_(False)
    for weights, rows in ((sae.W_enc, found.encoder), (sae.W_dec, found.decoder)):
        weights.copy_(torch.cat([s * rows for s in sign]))
    sae.mu.copy_(normaliser.mu)
    sae.scale.fill_(spread)
    sae.theta.copy_(calibrated_theta(sae, calibrate_threshold(sae, held_out)))
    return FittedBaseline(sae, found.notes)


def fastica(
    white: Float[Tensor, "token dimension"],
    start: Float[Tensor, "dimension dimension"],
    *,
    n_iterations: int = ICA_ITERATIONS,
    tolerance: float = ICA_TOLERANCE,
) -> Unmixing:
    """The rotation of white tokens (mean 0, covariance 1) whose components are most independent.

    The search starts from `start`, any invertible matrix, and is a fixed-point iteration with symmetric decorrelation
    and G = log cosh:
        W <- E[tanh(W x) x'] - diag(E[1 - tanh^2(W x)]) W          W <- (W W')^-1/2 W
    until no row changes by more than `tolerance`, or for `n_iterations`. Hyvarinen 1999, doi:10.1109/72.761722.
    """
    rotation, change = _decorrelated(start.double()), math.inf
    done = 0
    while done < n_iterations and change > tolerance:
        squashed = (white @ rotation.to(white.dtype).T).tanh_()
        mean_slope = 1 - squashed.square().mean(dim=0)
        step = (squashed.T @ white / len(white) - mean_slope.unsqueeze(1) * rotation.to(white.dtype)).double()
        turned = _decorrelated(step)
        change = float((1 - (turned * rotation).sum(dim=1).abs()).abs().max())
        rotation, done = turned, done + 1
    return Unmixing(rotation.to(white.dtype), done, change)


def _decorrelated(rows: Float64[Tensor, "component dimension"]) -> Float64[Tensor, "component dimension"]:
    """The nearest matrix with orthonormal rows, (W W')^-1/2 W."""
    left, _, right = torch.linalg.svd(rows, full_matrices=False)
    nearest: Tensor = left @ right
    return nearest


def _neurons(x: Float[Tensor, "token d_model"], n_features: int, generator: torch.Generator) -> Directions:
    axes = torch.eye(x.shape[1])
    return Directions(axes, axes, {})


def _pca(x: Float[Tensor, "token d_model"], n_features: int, generator: torch.Generator) -> Directions:
    axes = _principal_axes(x).axes
    return Directions(axes, axes, {})


def _ica(x: Float[Tensor, "token d_model"], n_features: int, generator: torch.Generator) -> Directions:
    found = _principal_axes(x)
    deviation = found.variance.sqrt().unsqueeze(1)
    whiten, colour = found.axes / deviation, found.axes * deviation
    start = torch.randn(len(whiten), len(whiten), generator=generator)
    rotation, n_iterations, change = fastica(x @ whiten.T, start)
    mixing = rotation @ colour
    length = torch.linalg.vector_norm(mixing, dim=1)
    encoder = length.unsqueeze(1) * (rotation @ whiten)
    notes = {"ica_iterations": float(n_iterations), "ica_change": change}
    return Directions(encoder, mixing / length.unsqueeze(1), notes)


def _random(x: Float[Tensor, "token d_model"], n_features: int, generator: torch.Generator) -> Directions:
    rows = functional.normalize(torch.randn(n_features, x.shape[1], generator=generator), dim=1)
    return Directions(rows, rows, {})


class _PrincipalAxes(NamedTuple):
    axes: Float[Tensor, "component d_model"]
    variance: Float[Tensor, " component"]


def _principal_axes(x: Float[Tensor, "token d_model"]) -> _PrincipalAxes:
    """The principal axes of centred tokens as rows, by descending variance, without axes of no variance."""
    wide = x.double()
    variance, columns = torch.linalg.eigh(wide.T @ wide / len(x))
    kept = (variance > LEAST_VARIANCE * variance[-1]).nonzero().flip(0).squeeze(1)
    return _PrincipalAxes(columns.T[kept].float(), variance[kept].float())


BASELINES = {
    "neurons": Baseline(find=_neurons),
    "pca": Baseline(find=_pca),
    "ica": Baseline(find=_ica),
    "random": Baseline(find=_random, signed=False, needs_width=True),
}
