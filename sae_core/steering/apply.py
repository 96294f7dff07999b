"""`Steering`: an intervention on codes as a patch of a model's activations, with the autoencoder's error term kept.

    delta     x' = x + (z' - z) W_dec           what the autoencoder does not explain of x stays as it is
    replace   x' = decode(z) + (z' - z) W_dec   x is replaced by its reconstruction first
In mode delta a token whose code does not change keeps its activation bit for bit, so doing nothing is EXACTLY the
identity and only the edited features act. Replace mixes the intervention with the reconstruction error;
report it beside a reconstruction-only row, which is an intervention that changes nothing in this mode.

Only the chosen tokens are encoded, only the chosen features are touched; z comes from the inference encoder and each
token's change is summed by itself, so a cell's result does not depend on the cells beside it.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sae_core.errors import ConfigError
from sae_core.sae import SparseAutoencoder, SparseCodes
from sae_core.sae.kernels import kernel_for
from sae_core.scfm.sites import TokenInfo
from sae_core.steering.interventions import Intervention
from sae_core.steering.masks import Masked

Mode = Literal["delta", "replace"]
MAX_DENSE = 2**24  # entries of the chosen features' dense values held at once: 64 MB in float32


@dataclass(frozen=True, kw_only=True, eq=False)
class Steering(Masked):
    """A patch: activations of a site in, steered activations out.

    Usage: `model.embed(tokens, patches={"layer.2": Steering(sae=sae, intervention=Ablate(features=[7]))})`; for many
    interventions on the same tokens, `SteeredModel`.
    `ConfigError` if a feature does not exist, a vector has another width, or a mask is empty.
    """

    sae: SparseAutoencoder
    intervention: Intervention
    mode: Mode = "delta"
    active_only: bool = False
    """Whether to leave alone the tokens on which none of the features is active."""
    direction: Float[Tensor, " d_model"] | None = None
    """A unit vector: move each token along it, by the length of the step it would have taken (a null; `nulls`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in get_args(Mode):
            raise ConfigError(f"mode = {self.mode!r} is not known; choose one of {', '.join(get_args(Mode))}.")
        self.intervention.check(self.sae.config.n_features)
        if self.direction is not None and self.direction.shape != (self.sae.config.d_model,):
            raise ConfigError(
                f"direction has shape {tuple(self.direction.shape)}: it needs the {self.sae.config.d_model} dimensions "
                "of the activations."
            )

    @property
    def groups(self) -> Int64[Tensor, " cell"] | None:
        """Group of each cell, where the intervention depends on it."""
        return self.intervention.groups

    @torch.no_grad()
    def steered(
        self, x: Float[Tensor, "token d_model"], info: TokenInfo, codes: SparseCodes | None = None
    ) -> Float[Tensor, "token d_model"]:
        """Steered activations; tokens that nothing happens to keep theirs bit for bit.

        `codes`: those of all the tokens, from `sae.encode`, if they are known already.
        """
        out = x.clone()
        at = self.selects(info).nonzero().squeeze(1)
        for part in torch.split(at, max(1, MAX_DENSE // len(self.intervention.features))):
            own = self.sae.encode(x[part]) if codes is None else codes.tokens(part)
            out[part] = self._steered(x[part], own, info.take(part)).to(x.dtype)
        return out

    def _steered(
        self, x: Float[Tensor, "token d_model"], codes: SparseCodes, info: TokenInfo
    ) -> Float[Tensor, "token d_model"]:
        features = self.intervention.index(x.device)
        z = codes.columns(features)
        change = self.intervention.change(z, info)
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
