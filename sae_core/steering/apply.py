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
from sae_core.steering.masks import MaskedPatch

Mode = Literal["delta", "replace"]
MAX_DENSE = 2**24  # entries of the chosen features' dense values held at once: 64 MB in float32


@dataclass(frozen=True, kw_only=True, eq=False)
class Steering(MaskedPatch):
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
        out, at = x.clone(), self.selects(info).nonzero().squeeze(1)
        if codes is None:
            codes, place = self.sae.encode(x[at]).with_index(), torch.arange(at.numel(), device=at.device)
        else:
            place = at
        features = self.intervention.index(x.device)
        n_at_once = max(1, at.numel() if self._is_narrow else MAX_DENSE // features.numel())
        for rows, own in zip(torch.split(at, n_at_once), torch.split(place, n_at_once), strict=True):
            z = codes.columns(features)[own] if self._is_narrow else codes.take(own).columns(features)
            base = x[rows] if self.mode == "delta" else self.sae.decode(codes.take(own))
            out[rows] = self._moved(base, z, info.take(rows)).to(x.dtype)
        return out

    @property
    def _is_narrow(self) -> bool:
        """Whether the features' dense values take no more than the activations themselves."""
        return len(self.intervention.features) <= self.sae.config.d_model

    def _moved(
        self, x: Float[Tensor, "token d_model"], z: Float[Tensor, "token chosen"], info: TokenInfo
    ) -> Float[Tensor, "token d_model"]:
        change = self.intervention.change(z, info)
        if self.active_only:
            change = change.where((z != 0).any(dim=1, keepdim=True), 0.0)
        # careful: adding a zero step would turn -0.0 into 0.0
        moved = (change != 0).any(dim=1).nonzero().squeeze(1)
        step = self._step(change[moved], info.cell[moved])
        if self.direction is not None:
            step = torch.linalg.vector_norm(step, dim=1, keepdim=True) * self.direction.to(step)
        return x.index_copy(0, moved, (x[moved] + step).to(x.dtype))

    def _step(
        self, change: Float[Tensor, "token chosen"], cell: Int64[Tensor, " token"]
    ) -> Float[Tensor, "token d_model"]:
        """Change times decoder: dense where that is less work than to look for the zeros."""
        W_dec = self.sae.W_dec[self.intervention.index(change.device)]
        if not self._is_narrow:
            return kernel_for(change.device).decode(SparseCodes.from_dense(change), W_dec)
        if change.device.type != "cpu" or not change.numel():
            return change @ W_dec
        # careful: a row's bits depend on the rows, and where in memory they are, that it is multiplied with
        lengths = torch.unique_consecutive(cell, return_counts=True)[1].tolist()
        return torch.cat([part.clone() @ W_dec for part in torch.split(change, lengths)])
