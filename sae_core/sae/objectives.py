"""What training minimises: reconstruction, and AuxK, which brings dead features back (arXiv 2406.04093, appendix A.2).

A feature that never fires gets no gradient from the reconstruction. AuxK lets the dead ones reconstruct what the
living ones left over, e = x - x_hat, so that they move to where something is missing. Only the columns of the dead
features are computed. Seen elsewhere: AuxK on values cut off from the graph, so that the decoder learned and the
encoder did not. What AuxK cannot do: a feature whose pre-activation is negative on every token gets no gradient from it
either, and a learning rate that is too high makes such features (mini model, F 2048: 5 at 5e-3, 413 at 1.5e-2).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from sae_core.sae.codes import SparseCodes


class Weights(NamedTuple):
    """The parameters of an autoencoder, rows of both matrices being features."""

    W_enc: Float[Tensor, "feature d_model"]
    W_dec: Float[Tensor, "feature d_model"]
    b_enc: Float[Tensor, " feature"]
    b_dec: Float[Tensor, " d_model"]


@dataclass(frozen=True, kw_only=True)
class Forward:
    """One forward pass of a training step, in normalised units: all that an objective may look at."""

    x: Float[Tensor, "token d_model"]
    pre: Float[Tensor, "token feature"]
    """Pre-activations before the rectifier, without gradient."""
    codes: SparseCodes
    """Chosen entries; their values carry gradients."""
    x_hat: Float[Tensor, "token d_model"]
    dead: Bool[Tensor, " feature"]
    weights: Weights
    n_aux: int
    aux_coefficient: float


class Loss(NamedTuple):
    """The loss that is minimised and its unweighted terms, all scalars."""

    total: Float[Tensor, ""]
    mse: Float[Tensor, ""]
    aux: Float[Tensor, ""]


Objective = Callable[[Forward], Loss]


def mse(x: Float[Tensor, "token d_model"], x_hat: Float[Tensor, "token d_model"]) -> Float[Tensor, ""]:
    """mean_t ||x_t - x_hat_t||^2: the sum over dimensions, so that in normalised units predicting the mean costs 1."""
    return (x - x_hat).square().sum(dim=1).mean()


def auxk(forward: Forward) -> Float[Tensor, ""]:
    """||e - e_hat||^2 / ||e - mean(e)||^2 with e = x - x_hat detached, e_hat from the `n_aux` largest dead features.

    Gradients reach the encoder, the decoder and the encoder bias of those dead features alone. Zero without a dead
    feature.
    """
    dead = forward.dead.nonzero().squeeze(1)
    if dead.numel() == 0:
        return forward.x.new_zeros(())
    residual = (forward.x - forward.x_hat).detach()
    variance = (residual - residual.mean(dim=0)).square().sum()
    W_enc, W_dec, b_enc, _ = forward.weights
    value = functional.linear(forward.x, W_enc[dead], b_enc[dead]).relu()
    if dead.numel() > forward.n_aux:
        chosen = value.detach().topk(forward.n_aux, dim=1, sorted=False).indices
        value = value * torch.zeros_like(value).scatter_(1, chosen, 1.0)
    error = (residual - value @ W_dec[dead]).square().sum()
    # careful: a perfect reconstruction leaves nothing to explain, and 0 / 0 must not reach the weights
    return torch.where(variance > 0, error / variance.clamp_min(torch.finfo(variance.dtype).tiny), 0.0)


def reconstruction_with_auxk(forward: Forward) -> Loss:
    """Sum mse + aux_coefficient * auxk: the loss of TopK and BatchTopK."""
    main = mse(forward.x, forward.x_hat)
    aux = auxk(forward) if forward.aux_coefficient > 0 else main.new_zeros(())
    return Loss(main + forward.aux_coefficient * aux, main, aux)
