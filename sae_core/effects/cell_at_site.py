"""`CellAtSite`: one cell whose blocks before a site have run, and from which any number of variants go on.

The blocks before the site run once. All variants of the cell then go through the blocks after it as one batch of equal
rows, so that N variants at layer l of L cost 1 + N (L - l) / L forward passes, and no row is padded. The bits of a
result depend on the number of variants that are asked for together, and on nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_core.errors import ConfigError
from sae_core.sae import SparseAutoencoder
from sae_core.scfm import CachedActivations, FoundationModel, MaskedGeneTask, Patch, Site, TokenInfo, Tokens
from sae_core.steering.forward import check_width, starting_site

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_NUMBERS = 2**23
"""Numbers of activations that go through the model at once (32 MB in float32)."""


class CellAtSite:
    """One cell, with its activations and codes at a site.

    Attributes:
        tokens: those of the cell.
        x: activations of the cell's tokens at the site [n_tokens d_model], on the model's device.
        codes: their codes, dense [n_tokens n_features].
        is_visible: gene tokens from which no gene is predicted; only these are ever steered [n_tokens].
        is_asked: tokens from which a hidden gene is predicted; none where no gene is hidden, or hidden genes have no
            token [n_tokens].
    """

    def __init__(
        self,
        model: FoundationModel,
        inputs: Tokens | MaskedGeneTask,
        sae: SparseAutoencoder,
        site: Site | str,
        *,
        also: Sequence[Site] = (),
    ) -> None:
        """Run the blocks up to the site and encode the tokens.

        `also` are further sites whose activations are kept, in `kept`.

        Raises:
            ConfigError: there is not one cell, no such site, or the autoencoder has another width than the model.
        """
        masked = inputs.is_masked_gene if isinstance(inputs, MaskedGeneTask) else None
        self.tokens = inputs.tokens if isinstance(inputs, MaskedGeneTask) else inputs
        check_one(self.tokens)
        check_width(model, sae)
        self.model, self.sae, self.site = model, sae, Site.parse(site)
        self._start = starting_site(self.site, model)
        n, device = self.tokens.n_tokens, next(model.parameters()).device
        found = model.activations(inputs, [self.site, self._start, *also], max_batch_tokens=max(n, 1))
        self.x, self._before = found[self.site].to(device), found[self._start].to(device)
        self.kept = {at: found[at].to(device) for at in also}
        self.codes: Float[Tensor, "token feature"] = sae.encode(self.x).to_dense()
        self.is_asked = _bools(np.zeros(n, dtype=bool) if masked is None else masked, device)
        self.is_visible: Bool[Tensor, " token"] = _bools(~self.tokens.is_special, device) & ~self.is_asked

    def rows_of(self, feature: int) -> Tensor:
        """The visible tokens on which a feature fires."""
        return ((self.codes[:, feature] > 0) & self.is_visible).nonzero()[:, 0]

    def moved(
        self, rows: Tensor, steps: Float[Tensor, "variant row d_model"]
    ) -> Float[Tensor, "variant token d_model"]:
        """The activations with a step at some tokens, for each variant."""
        x = self.x.repeat(len(steps), 1, 1)
        x[:, rows] += steps.to(x.dtype)
        return x

    @property
    def n_at_once(self) -> int:
        """The number of variants that go through the model together."""
        return max(1, MAX_NUMBERS // max(self.x.numel(), 1))

    def entry(
        self, x: Float[Tensor, "variant token d_model"], site: Site | None = None
    ) -> tuple[CachedActivations, dict[Site | str, Patch]]:
        """Where the forward passes of variants start that have the activations x at `site`, by default the cell's.

        The passes are of the cell's tokens, repeated for each variant.
        """
        at, flat = site or self.site, x.flatten(0, 1)
        if at != self.site or self._start == self.site:
            return CachedActivations(at, flat), {}
        length = x.shape[1]

        def put(_: Tensor, info: TokenInfo) -> Tensor:
            return flat[info.cell * length + info.position]

        return CachedActivations(self._start, self._before.repeat(len(x), 1)), {at: put}


def check_one(tokens: Tokens) -> None:
    """Raise ConfigError unless the tokens are of one cell."""
    if tokens.n_cells != 1:
        raise ConfigError(f"the tokens are of {tokens.n_cells} cells; give those of one")


def _bools(values: np.ndarray, device: torch.device) -> Bool[Tensor, " token"]:
    return torch.from_numpy(values).to(device)
