"""`Steering`: an intervention on codes as a patch of a model's activations, with the autoencoder's error term kept.

    delta     x' = x + (z' - z) W_dec           what the autoencoder does not explain of x stays as it is
    replace   x' = decode(z) + (z' - z) W_dec   x is replaced by its reconstruction first
In mode delta a token whose code does not change keeps its activation bit for bit, so doing nothing is EXACTLY the
identity and only the edited features act. Replace mixes the intervention with the reconstruction error;
report it beside a reconstruction-only row, which is an intervention that changes nothing in this mode.

Only the chosen tokens are encoded, only the chosen features are touched; z comes from the inference encoder and each
token's change is summed by itself, so a cell's result does not depend on the cells beside it.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_core.errors import ConfigError
from sae_core.sae import SparseAutoencoder, SparseCodes
from sae_core.sae.kernels import kernel_for
from sae_core.scfm.sites import TokenInfo
from sae_core.steering.interventions import Intervention

Mode = Literal["delta", "replace"]
MAX_DENSE = 2**24  # entries of the chosen features' dense values held at once: 64 MB in float32


@dataclass(frozen=True, kw_only=True, eq=False)
class Steering:
    """A patch: activations of a site in, steered activations out.

    Usage: `model.embed(tokens, patches={"layer.2": Steering(sae=sae, intervention=Ablate(features=[7]))})`.
    `ConfigError` if a feature does not exist, a vector has another width, or a mask is empty.
    """

    sae: SparseAutoencoder
    intervention: Intervention
    mode: Mode = "delta"
    genes: Collection[int] | None = None
    """Vocabulary ids of the genes whose tokens are steered; None: all."""
    cells: Collection[int] | None = None
    """Indices, into the tokens that the model was given, of the cells that are steered; None: all."""
    include_special: bool = False
    """Whether special tokens (<cls>) are steered too."""
    active_only: bool = False
    """Whether to leave alone the tokens on which none of the features is active."""
    direction: Float[Tensor, " d_model"] | None = None
    """A unit vector: move each token along it, by the length of the step it would have taken (a null; `nulls`)."""

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ConfigError(f"mode = {self.mode!r} is not known; choose one of {', '.join(get_args(Mode))}.")
        self.intervention.check(self.sae.config.n_features)
        for name in ("genes", "cells"):
            chosen = getattr(self, name)
            if chosen is not None and len(chosen) == 0:
                raise ConfigError(
                    f"{name} = {chosen!r} selects nothing: name at least one, or leave it out to take all."
                )
        if self.direction is not None and self.direction.shape != (self.sae.config.d_model,):
            raise ConfigError(
                f"direction has shape {tuple(self.direction.shape)}: it needs the {self.sae.config.d_model} dimensions "
                "of the activations."
            )

    def selects(self, info: TokenInfo) -> Bool[Tensor, " token"]:
        """Which tokens the masks let through."""
        chosen = torch.ones_like(info.is_special) if self.include_special else ~info.is_special
        if self.genes is not None:
            chosen = chosen & _is_in(info.gene_id, self.genes)
        if self.cells is not None:
            chosen = chosen & _is_in(info.cell, self.cells)
        return chosen

    def check(self, info: TokenInfo) -> None:
        """`ConfigError` if the masks let none of these tokens through: call it with all tokens before a run."""
        if not bool(self.selects(info).any()):
            raise ConfigError(
                f"the masks select none of {info.gene_id.numel()} tokens (genes {_some(self.genes)}, cells "
                f"{_some(self.cells)}, special tokens {'in' if self.include_special else 'ex'}cluded): choose genes "
                "and cells that occur in these tokens."
            )

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "token d_model"], info: TokenInfo) -> Float[Tensor, "token d_model"]:
        """Steered activations; tokens that nothing happens to keep theirs bit for bit."""
        out = x.clone()
        at = self.selects(info).nonzero().squeeze(1)
        for part in torch.split(at, max(1, MAX_DENSE // len(self.intervention.features))):
            out[part] = self._steered(x[part]).to(x.dtype)
        return out

    def _steered(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        codes = self.sae.encode(x)
        features = self.intervention.index(x.device)
        z = codes.columns(features)
        change = self.intervention.change(z)
        if self.active_only:
            change = change.where((z != 0).any(dim=1, keepdim=True), 0.0)
        out = x.clone() if self.mode == "delta" else self.sae.decode(codes)
        # careful: adding a zero step would turn -0.0 into 0.0
        moved = (change != 0).any(dim=1).nonzero().squeeze(1)
        step = kernel_for(x.device).decode(SparseCodes.from_dense(change[moved]), self.sae.W_dec[features])
        if self.direction is not None:
            step = torch.linalg.vector_norm(step, dim=1, keepdim=True) * self.direction.to(step)
        out[moved] += step
        return out


def _is_in(ids: Tensor, chosen: Collection[int]) -> Tensor:
    return torch.isin(ids, torch.tensor(sorted(chosen), dtype=ids.dtype, device=ids.device))


def _some(chosen: Collection[int] | None) -> str:
    if chosen is None:
        return "all"
    first = sorted(chosen)[:5]
    return f"{first}" if len(chosen) <= len(first) else f"{first} and {len(chosen) - len(first)} more"
