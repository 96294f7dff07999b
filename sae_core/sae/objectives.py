"""The loss of training: a weighted sum of terms, each a function of one sparse forward pass.

| term | mean over tokens of | paper (arXiv) |
|---|---|---|
| reconstruction | squared error; mean over the nested groups if there are any | 2406.04093, 2503.17547 |
| auxk | squared error of e_hat, made of dead features, against the residual e, over its variance | 2406.04093, A.2 |
| l1 | sum_f z_f | 2309.08600 |
| gate_l1 | sum_f relu(gate_f) | 2404.16014, eq. 8 |
| gate_reconstruction | squared error of relu(gate) through the frozen decoder | 2404.16014, eq. 8 |
| l0 | (L0 / k - 1)^2, L0 differentiable by a straight-through estimate | 2407.14435 |
| orthogonality | squared largest cosine of a decoder row with another, a mean over features | 2509.22033 |

A feature that never fires gets no gradient from the reconstruction. AuxK makes the dead features reconstruct the
residual of the living ones, e = x - x_hat, so that they move toward what is not yet explained. Only the columns of the
dead features are computed. Careful: some implementations detach the values in AuxK, so that the decoder learns and the
encoder does not. AuxK has a limit: a feature whose pre-activation is negative on every token gets no gradient from it
either, and a learning rate that is too high makes such features (mini model, F 2048: 5 at 5e-3, 413 at 1.5e-2). The
dead features of Standard are all of this kind, so AuxK does not apply to it.

All terms use the selected entries only, so no term needs a [token feature] matrix where few entries are selected.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from sae_core.sae.activation import heaviside
from sae_core.sae.codes import SparseCodes
from sae_core.sae.config import SAEConfig
from sae_core.sae.kernels import Kernel

CHUNK = 1024  # decoder rows that are compared with each other; a step's products then cost CHUNK / B of x W_enc^T


class Weights(NamedTuple):
    """The tensors of an autoencoder; the rows of both matrices are features."""

    W_enc: Float[Tensor, "feature d_model"]
    W_dec: Float[Tensor, "feature d_model"]
    b_enc: Float[Tensor, " feature"]
    b_dec: Float[Tensor, " d_model"]
    theta: Float[Tensor, " feature"]


@dataclass(frozen=True, kw_only=True)
class Forward:
    """One forward pass of a training step in normalised units: the input of every term."""

    x: Float[Tensor, "token d_model"]
    pre: Float[Tensor, " nnz"]
    """Pre-activations at the entries of `codes`, with gradients."""
    codes: SparseCodes
    """The selected entries; their values have gradients and may be zero."""
    nested_x_hat: tuple[Float[Tensor, "token d_model"], ...]
    """The reconstructions by the first group of features, by the first two groups, and so on to all features."""
    dead: Bool[Tensor, " feature"]
    weights: Weights
    r_mag: Float[Tensor, " feature"]
    """The logarithm of the ratio of the magnitude encoder to the gate encoder: learned by Gated, else zero."""
    config: SAEConfig
    kernel: Kernel
    step: int
    """Number of steps done before this one."""

    @property
    def x_hat(self) -> Float[Tensor, "token d_model"]:
        """The reconstruction by all features."""
        return self.nested_x_hat[-1]

    @cached_property
    def errors(self) -> Float[Tensor, " group"]:
        """The error mean_t ||x_t - x_hat_t||^2 of each nested reconstruction; predicting the mean has error 1."""
        errors = [functional.mse_loss(x_hat, self.x, reduction="sum") for x_hat in self.nested_x_hat]
        return torch.stack(errors) / self.x.shape[0]

    @cached_property
    def theta_at(self) -> Float[Tensor, " nnz"]:
        """The threshold of the feature of each entry."""
        return self.weights.theta.index_select(0, self.codes.col)

    @cached_property
    def gate(self) -> Float[Tensor, " nnz"]:
        """The pre-activation of the gate at each entry, W_gate x + b_gate = exp(-r_mag) (pre - theta)."""
        return torch.exp(-self.r_mag).index_select(0, self.codes.col) * (self.pre - self.theta_at)


class Loss(NamedTuple):
    """The total loss, its unweighted terms by name, and the squared error per token of the full reconstruction."""

    total: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]
    mse: Float[Tensor, ""]


@dataclass(frozen=True, kw_only=True)
class Term:
    """One term of the loss and its weight."""

    name: str
    value: Callable[[Forward], Tensor]
    weight: Callable[[SAEConfig], float] = lambda _: 1.0
    is_sparsity: bool = False
    """Whether its weight rises from zero over the sparsity warm-up."""


def loss_of(objective: tuple[Term, ...], forward: Forward, *, warm_up: float = 1.0) -> Loss:
    """The weighted sum of the terms; `warm_up` (0 to 1) multiplies the sparsity terms, and weight 0 skips a term."""
    total = zero = forward.x.new_zeros(())
    terms = {}
    for term in objective:
        weight = term.weight(forward.config) * (warm_up if term.is_sparsity else 1.0)
        terms[term.name] = term.value(forward) if weight > 0 else zero
        total = total + weight * terms[term.name]
    return Loss(total, terms, forward.errors[-1].detach())


def auxk(forward: Forward) -> Float[Tensor, ""]:
    """The AuxK loss ||e - e_hat||^2 / ||e - mean(e)||^2, with e = x - x_hat detached.

    e_hat is made from the `n_aux` largest dead features of each token. Only the encoder, decoder and encoder bias of
    these features get gradients. The loss is zero without a dead feature.
    """
    dead = forward.dead.nonzero().squeeze(1)
    if dead.numel() == 0:
        return forward.x.new_zeros(())
    residual = (forward.x - forward.x_hat).detach()
    variance = (residual - residual.mean(dim=0)).square().sum()
    W_enc, W_dec, b_enc, *_ = forward.weights
    value = functional.linear(forward.x, W_enc[dead], b_enc[dead]).relu()
    if dead.numel() > forward.config.n_aux:
        chosen = value.detach().topk(forward.config.n_aux, dim=1, sorted=False).indices
        value = value * torch.zeros_like(value).scatter_(1, chosen, 1.0)
    error = (residual - value @ W_dec[dead]).square().sum()
    # careful: a perfect reconstruction leaves no residual, and 0 / 0 must not reach the weights
    return torch.where(variance > 0, error / variance.clamp_min(torch.finfo(variance.dtype).tiny), 0.0)


def l1(forward: Forward) -> Float[Tensor, ""]:
    """The L1 loss mean_t sum_f z_f; decoder rows are unit vectors, so a long row cannot reduce it."""
    return forward.codes.value.sum() / forward.x.shape[0]


def gate_l1(forward: Forward) -> Float[Tensor, ""]:
    """The loss mean_t sum_f relu(gate_f): sparsity acts on the gate alone and does not shrink magnitudes."""
    return forward.gate.relu().sum() / forward.x.shape[0]


def gate_reconstruction(forward: Forward) -> Float[Tensor, ""]:
    """The loss mean_t ||x - relu(gate) W_dec - b_dec||^2 with W_dec and b_dec frozen: it trains the gate."""
    W_dec, b_dec = forward.weights.W_dec.detach(), forward.weights.b_dec.detach()
    x_hat = forward.kernel.decode(forward.codes.with_value(forward.gate.relu()), W_dec) + b_dec
    return functional.mse_loss(x_hat, forward.x, reduction="sum") / forward.x.shape[0]


def l0_to_target(forward: Forward) -> Float[Tensor, ""]:
    """The loss (L0 / k - 1)^2, with L0 the mean number of pre-activations above their threshold."""
    n_active = heaviside(forward.pre, forward.theta_at, forward.config.bandwidth).sum()
    return (n_active / (forward.x.shape[0] * forward.config.k) - 1).square()


def orthogonality(forward: Forward) -> Float[Tensor, ""]:
    """The mean over features of max(0, c_f)^2, with c_f the largest cosine of decoder row f with another row.

    Rows are compared inside random chunks of at most `CHUNK` rows, anew in each step, so that the cost grows with the
    number of features and not with its square. The chunks depend on the step alone, so that they are the same on all
    ranks and in a resumed run. Careful: decoder rows have unit length, so that their products are cosines. A row gets
    a gradient from its own nearest row and from the rows to which it is the nearest.
    """
    W_dec = forward.weights.W_dec
    order = torch.randperm(len(W_dec), generator=torch.Generator().manual_seed(forward.step)).to(W_dec.device)
    total = W_dec.new_zeros(())
    for chunk in order.tensor_split(math.ceil(len(order) / CHUNK)):
        rows = W_dec[chunk]
        with torch.no_grad():
            largest, nearest = (rows @ rows.T).fill_diagonal_(0).max(dim=1)
        cosine = (rows * rows[nearest]).sum(dim=1)
        total = total + cosine[largest > 0].square().sum()
    return total / len(W_dec)


RECONSTRUCTION = Term(name="reconstruction", value=lambda forward: forward.errors.mean())
AUXK = Term(name="auxk", value=auxk, weight=lambda config: config.aux_coefficient)
L1 = Term(name="l1", value=l1, weight=lambda config: config.l1_coefficient, is_sparsity=True)
GATE_L1 = Term(name="gate_l1", value=gate_l1, weight=lambda config: config.l1_coefficient, is_sparsity=True)
GATE_RECONSTRUCTION = Term(name="gate_reconstruction", value=gate_reconstruction)
L0 = Term(name="l0", value=l0_to_target, weight=lambda config: config.l0_coefficient, is_sparsity=True)
ORTHOGONALITY = Term(name="orthogonality", value=orthogonality, weight=lambda config: config.orthogonality_coefficient)
