"""`Steering`: an intervention on codes as a patch of a model's activations, with the autoencoder's error term kept.

    delta     x' = x + (z' - z) W_dec           the part of x that the autoencoder does not explain is kept
    replace   x' = decode(z) + (z' - z) W_dec   x is replaced by its reconstruction first
In mode delta a token whose code does not change keeps its activation bit for bit: an intervention that changes
nothing is exactly the identity, and only the edited features act. Mode replace mixes the intervention with the
reconstruction error. Report it beside a row for the reconstruction alone, which is an intervention that changes
nothing in this mode.

Only the chosen tokens are encoded and only the chosen features are changed. z comes from the inference encoder, and
each token's change is summed separately, so a cell's result does not depend on the other cells.
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
from sae_core.steering.masks import MaskedPatch

Mode = Literal["delta", "replace"]
MAX_DENSE = 2**24  # entries of dense code values that are held in memory at once: 64 MB in float32


@dataclass(frozen=True, kw_only=True, eq=False)
class Steering(MaskedPatch):
    """A patch that applies an intervention: it maps the activations of a site to steered activations.

    Usage: `model.embed(tokens, patches={"layer.2": Steering(sae=sae, intervention=Ablate(features=[7]))})`. Use
    `SteeredModel` for many interventions on the same tokens.

    Raises:
        ConfigError: a feature does not exist, a vector has the wrong width, a mask is empty or the mode is unknown.
    """

    sae: SparseAutoencoder
    intervention: Intervention
    mode: Mode = "delta"
    direction: Float[Tensor, " d_model"] | None = None
    """A unit vector that replaces the direction of each token's step while the step keeps its length: the control
    `nulls.random_direction`. None: the step of the intervention itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in get_args(Mode):
            raise ConfigError(f"mode = {self.mode!r} is not known; choose one of {', '.join(get_args(Mode))}.")
        self.intervention.check(self.sae.config.n_features)
        if self.direction is not None and self.direction.shape != (self.sae.config.d_model,):
            raise ConfigError(
                f"direction has shape {tuple(self.direction.shape)}; allowed is ({self.sae.config.d_model},), the "
                "width of the activations."
            )

    @property
    def groups(self) -> Int64[Tensor, " cell"] | None:
        """The group of each cell, or None if the intervention does not depend on it."""
        return self.intervention.groups

    @torch.no_grad()
    def steered(
        self, x: Float[Tensor, "token d_model"], info: TokenInfo, codes: SparseCodes | None = None
    ) -> Float[Tensor, "token d_model"]:
        """The steered activations; a token whose code does not change keeps its activation bit for bit.

        `codes` are the codes of all tokens from `sae.encode`, if they have been computed before.
        """
        out, token = x.clone(), self.selects(info).nonzero().squeeze(1)
        if codes is None:
            codes, code_row = self.sae.encode(x[token]).with_index(), torch.arange(token.numel(), device=token.device)
        else:
            code_row = token
        features = self.intervention.index(x.device)
        n_at_once = max(1, token.numel() if self._is_narrow else MAX_DENSE // features.numel())
        for tokens, rows in zip(torch.split(token, n_at_once), torch.split(code_row, n_at_once), strict=True):
            z = codes.columns(features)[rows] if self._is_narrow else codes.take(rows).columns(features)
            base = x[tokens] if self.mode == "delta" else self.sae.decode(codes.take(rows))
            out[tokens] = self._add_step(base, z, info.take(tokens)).to(x.dtype)
        return out

    @property
    def _is_narrow(self) -> bool:
        """Whether the dense values of the features take no more memory than the activations."""
        return len(self.intervention.features) <= self.sae.config.d_model

    def _add_step(
        self, x: Float[Tensor, "token d_model"], z: Float[Tensor, "token chosen"], info: TokenInfo
    ) -> Float[Tensor, "token d_model"]:
        change = self.intervention.change(z, info)
        # careful: adding a zero step would turn -0.0 into 0.0
        moved = (change != 0).any(dim=1).nonzero().squeeze(1)
        step = self._step(change[moved], info.cell[moved])
        if self.direction is not None:
            step = torch.linalg.vector_norm(step, dim=1, keepdim=True) * self.direction.to(step)
        return x.index_copy(0, moved, (x[moved] + step).to(x.dtype))

    def _step(
        self, change: Float[Tensor, "token chosen"], cell: Int64[Tensor, " token"]
    ) -> Float[Tensor, "token d_model"]:
        """The product of change and decoder: a dense product where it is cheaper than finding the zeros first."""
        W_dec = self.sae.W_dec[self.intervention.index(change.device)]
        if not self._is_narrow:
            return kernel_for(change.device).decode(SparseCodes.from_dense(change), W_dec)
        if change.device.type != "cpu" or not change.numel():
            return change @ W_dec
        # careful: the bits of a row of a product depend on the other rows and on their place in memory
        lengths = torch.unique_consecutive(cell, return_counts=True)[1].tolist()
        return torch.cat([part.clone() @ W_dec for part in torch.split(change, lengths)])
