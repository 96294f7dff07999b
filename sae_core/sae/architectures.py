"""The six architectures; each is a record of its selector, activation, loss, constraints and learned parameters.

| arch | training | loss besides reconstruction | inference | paper (arXiv) |
|---|---|---|---|---|
| batchtopk | k * B largest of the batch | AuxK | theta calibrated to E[L0] = k | 2412.06410 |
| matryoshka | the same, features in nested groups | AuxK | the same | 2503.17547 |
| topk | k largest of each token | AuxK | the same as in training | 2406.04093 |
| jumprelu | above a learned theta | (L0 / k - 1)^2, AuxK | learned theta times a calibrated factor | 2407.14435 |
| gated | where a gate opens | L1 of the gate, its reconstruction, AuxK | learned theta | 2404.16014 |
| standard | all positive entries | L1 | theta = 0 | 2309.08600 |

Every trained autoencoder has the same five tensors: z = pre where pre > theta (a vector over features), except for
topk, which has no threshold. At inference a token's code never depends on other tokens.

Each can have the penalty on alike decoder rows besides (`orthogonality_coefficient`).

Standard and Gated have no k: `l1_coefficient` determines L0. To reach a target L0, train short runs at a few
coefficients a factor of 2 apart in one `Sweep` and interpolate in the logarithms; L0 is roughly proportional to
1 / l1_coefficient.

Gated is parametrised by the saved tensors. The paper has W_gate, b_gate, and W_mag = exp(r_mag) W_gate with its own
b_mag. Here W_enc = W_mag and b_enc = b_mag are learned with theta and r_mag, and the gate is
    W_gate x + b_gate = exp(-r_mag) (W_enc x + b_enc - theta)
which opens where pre > theta. These are the same functions with the same stationary points, and inference needs no
conversion. Training starts as in the paper (r_mag = 0, biases 0).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_core.errors import ConfigError
from sae_core.sae.activation import jumprelu, relu
from sae_core.sae.codes import SparseCodes
from sae_core.sae.config import SAEConfig
from sae_core.sae.constraints import DECAY_DEAD_THETA, UNIT_NORM, Constraint
from sae_core.sae.objectives import AUXK, GATE_L1, GATE_RECONSTRUCTION, L0, L1, ORTHOGONALITY, RECONSTRUCTION, Term
from sae_core.sae.selectors import above, above_threshold, batch_topk, token_topk

Selector = Callable[[Tensor, Tensor, SAEConfig], SparseCodes]
"""(pre [token feature], theta [feature], config) -> codes."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The components of one kind of sparse autoencoder."""

    select: Selector
    """Selects the entries of a training batch that get a gradient."""
    activate: Callable[[Tensor, Tensor, float], Tensor] = relu
    """(pre [nnz], theta [nnz], bandwidth) -> value of the code at each entry."""
    infer: Selector = lambda pre, theta, _: above_threshold(pre, theta)
    """Gives the code of each token at inference, independent of other tokens."""
    objective: tuple[Term, ...]
    constraints: tuple[Constraint, ...] = (UNIT_NORM,)
    over_batch: bool = False
    """Whether `select` takes the k * B largest entries of the whole batch, which `ranking` can find by integers."""
    nested: bool = False
    """Whether each group of features, together with the groups before it, has a reconstruction loss."""
    learned: tuple[str, ...] = ()
    """What is learned besides the weights and biases: "theta", "r_mag"."""
    initial_theta: Callable[[SAEConfig], float] = lambda _: 0.0
    calibrated: bool = False
    """Whether theta is calibrated to E[L0] = k at the end of training."""


def chance_threshold(config: SAEConfig) -> float:
    """The threshold that k features exceed by chance if a pre-activation is normal with variance 1 / d_model.

    Random unit directions give this variance on normalised activations, so training starts near L0 = k.
    """
    share = torch.tensor(1 - config.k / config.n_features, dtype=torch.float64).clamp_max(1 - 1e-12)
    return max(0.0, float(torch.special.ndtri(share))) / math.sqrt(config.d_model)


def _batch_topk(pre: Tensor, theta: Tensor, config: SAEConfig) -> SparseCodes:
    return batch_topk(pre, config.k)


def _token_topk(pre: Tensor, theta: Tensor, config: SAEConfig) -> SparseCodes:
    return token_topk(pre, config.k)


ARCHITECTURES = {
    "batchtopk": Architecture(
        select=_batch_topk, over_batch=True, objective=(RECONSTRUCTION, AUXK, ORTHOGONALITY), calibrated=True
    ),
    "matryoshka": Architecture(
        select=_batch_topk,
        over_batch=True,
        objective=(RECONSTRUCTION, AUXK, ORTHOGONALITY),
        calibrated=True,
        nested=True,
    ),
    "topk": Architecture(select=_token_topk, infer=_token_topk, objective=(RECONSTRUCTION, AUXK, ORTHOGONALITY)),
    "jumprelu": Architecture(
        select=lambda pre, theta, config: above(pre, theta - config.bandwidth / 2),
        activate=jumprelu,
        objective=(RECONSTRUCTION, L0, AUXK, ORTHOGONALITY),
        constraints=(UNIT_NORM, DECAY_DEAD_THETA),
        learned=("theta",),
        initial_theta=chance_threshold,
        calibrated=True,
    ),
    "gated": Architecture(
        select=lambda pre, theta, _: above(pre, theta),
        activate=relu,
        objective=(RECONSTRUCTION, GATE_L1, GATE_RECONSTRUCTION, AUXK, ORTHOGONALITY),
        learned=("theta", "r_mag"),
    ),
    "standard": Architecture(
        select=lambda pre, theta, _: above_threshold(pre, theta), objective=(RECONSTRUCTION, L1, ORTHOGONALITY)
    ),
}


def architecture(name: str) -> Architecture:
    """The record of an architecture; a `ConfigError` lists the known names."""
    if name not in ARCHITECTURES:
        raise ConfigError(f"arch = {name!r} is not known; allowed is one of {', '.join(sorted(ARCHITECTURES))}.")
    return ARCHITECTURES[name]
