"""`SteeredVectors`: interventions on given vectors of cells, which no model takes further.

A vector is its own output. An intervention sets x' = x + (z' - z) W_dec, with the autoencoder's error term kept, and x'
is the result: there are no blocks behind it whose answer could be read. A vector counts as the one token of its cell,
and as a token of no gene.

On a CPU every vector is encoded alone, so that a cell's result does not depend on the other cells bit for bit.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.errors import ConfigError
from sae_core.sae import SparseAutoencoder, SparseCodes
from sae_core.scfm import TokenInfo
from sae_core.steering.apply import Steering
from sae_core.steering.masks import MaskedPatch


class SteeredVectors:
    """Encoded vectors to which any number of interventions can be applied; the vectors of cells are rows.

    Usage: `SteeredVectors(x, sae).steered(Steering(sae=sae, intervention=...))`.

    Attributes:
        x: the vectors, float32, on the device of the autoencoder.
        codes: their codes.
        info: cell i has one token, of no gene.
    """

    def __init__(self, x: Float[Tensor, "cell d_model"], sae: SparseAutoencoder) -> None:
        """Encode the vectors.

        Raises:
            ConfigError: the autoencoder has another width.
        """
        if x.shape[1] != sae.config.d_model:
            raise ConfigError(
                f"the autoencoder has d_model = {sae.config.d_model}, and the vectors have {x.shape[1]} numbers: use "
                "the vectors that the autoencoder was trained on."
            )
        self.sae = sae
        self.x = x.to(sae.W_dec.device)
        n, device = len(x), self.x.device
        self.info = TokenInfo(
            gene_id=torch.zeros(n, dtype=torch.int64, device=device),
            cell=torch.arange(n, device=device),
            position=torch.zeros(n, dtype=torch.int64, device=device),
            is_special=torch.zeros(n, dtype=torch.bool, device=device),
            is_masked_gene=torch.zeros(n, dtype=torch.bool, device=device),
        )
        parts = torch.split(self.x, 1) if device.type == "cpu" and n else (self.x,)
        self.codes = SparseCodes.concatenate([sae.encode(part) for part in parts]).with_index()

    def steered(self, steering: MaskedPatch | None) -> Float[Tensor, "cell d_model"]:
        """The vectors under `steering`, in host memory; None gives them unchanged.

        Raises:
            ConfigError: the steering has another autoencoder or number of cells.
        """
        if steering is None:
            return self.x.clone().cpu()
        if isinstance(steering, Steering) and steering.sae is not self.sae:
            raise ConfigError("the steering has another autoencoder than these vectors: use the same one for both.")
        if (groups := steering.groups) is not None and len(groups) != len(self.x):
            raise ConfigError(
                f"group_of_cell has {len(groups)} entries; allowed is one for each of the {len(self.x)} cells."
            )
        return steering.steered(self.x, self.info, self.codes).cpu()
