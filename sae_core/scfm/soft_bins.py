"""Value embedding by soft bins: the mean of learned bin vectors, weighted by a softmax (scFoundation, AIDO.Cell).

    v = leaky_relu(W1 x + b1);  weights = softmax(alpha v + W2 v + b2);  output = weights @ E

Hidden values and padding have vectors of their own. Hao et al. 2024, 10.1038/s41592-024-02305-7.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class SoftBins(nn.Module):
    """The embedding; parameter names are scFoundation's. `bias` says whether W1 and W2 have biases."""

    def __init__(
        self, *, n_bins: int, d_model: int, alpha: float, pad_value: float, mask_value: float, bias: bool = True
    ) -> None:
        super().__init__()
        self.alpha, self.pad_value, self.mask_value = alpha, pad_value, mask_value
        self.mlp, self.mlp2 = nn.Linear(1, n_bins, bias=bias), nn.Linear(n_bins, n_bins, bias=bias)
        self.emb = nn.Embedding(n_bins, d_model)
        self.emb_mask, self.emb_pad = nn.Embedding(1, d_model), nn.Embedding(1, d_model)

    def forward(self, value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape d_model"]:
        """The mask vector where the value is `mask_value`, the padding vector where it is `pad_value`."""
        v = F.leaky_relu(self.mlp(value[..., None]), 0.1)
        x = torch.softmax(self.alpha * v + self.mlp2(v), dim=-1) @ self.emb.weight
        for special, vector in ((self.mask_value, self.emb_mask.weight), (self.pad_value, self.emb_pad.weight)):
            x = torch.where((value == special)[..., None], vector[0].to(x.dtype), x)
        return x
