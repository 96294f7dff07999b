"""Modules of Tahoe-x1's network: encoders of genes, values and drugs, and the two pretraining heads.

Parameter names are those of the official checkpoints without the prefix `model.`. The norms here have torch's own eps
of 1e-5; that of the blocks comes from the checkpoint's settings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "leaky_relu": F.leaky_relu,
}
"""By the names of the settings; gelu is the exact one (erf), and leaky_relu has torch's slope of .01."""


def _norm(d_model: int, is_there: bool) -> nn.Module:
    return nn.LayerNorm(d_model) if is_there else nn.Identity()


class GeneEncoder(nn.Module):
    """LN(Emb(gene)); without the norm where the checkpoint has none."""

    def __init__(self, *, n_tokens: int, d_model: int, with_norm: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_tokens, d_model, _weight=torch.empty(n_tokens, d_model))
        self.enc_norm = _norm(d_model, with_norm)

    def forward(self, gene_id: Int64[Tensor, "*shape"]) -> Float[Tensor, "*shape d_model"]:
        """Vector of each gene."""
        return cast("Tensor", self.enc_norm(self.embedding(gene_id)))


class ValueEncoder(nn.Module):
    """LN(W2 act(W1 min(v, max_value))) of a binned value."""

    def __init__(self, *, d_model: int, activation: str, max_value: float, with_norm: bool) -> None:
        super().__init__()
        self.linear1 = nn.Linear(1, d_model)
        self.linear2 = nn.Linear(d_model, d_model)
        self.norm = _norm(d_model, with_norm)
        self.act, self.max_value = ACTIVATIONS[activation], max_value

    def forward(self, value: Float[Tensor, "row position"]) -> Float[Tensor, "row position d_model"]:
        """Vector of each value."""
        hidden = self.act(self.linear1(value.clamp(max=self.max_value)[..., None]))
        return cast("Tensor", self.norm(self.linear2(hidden)))


class DrugEncoder(nn.Module):
    """LN(proj(act(fc(fingerprint)))) of a drug; row 0 of the fingerprints stands for no known drug."""

    def __init__(self, *, n_drugs: int, n_bits: int, d_model: int, activation: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_drugs, n_bits, _weight=torch.empty(n_drugs, n_bits))
        self.fc, self.proj = nn.Linear(n_bits, d_model), nn.Linear(d_model, d_model)
        self.norm = nn.LayerNorm(d_model)
        self.act = ACTIVATIONS[activation]

    def forward(self, drug: Int64[Tensor, " cell"]) -> Float[Tensor, "cell d_model"]:
        """Vector of each drug, by its row."""
        return cast("Tensor", self.norm(self.proj(self.act(self.fc(self.embedding(drug))))))


class ExpressionDecoder(nn.Module):
    """Head `expression_decoder`: binned value of a gene from its own token, W_out act(W x) with one W a layer."""

    def __init__(self, *, d_model: int, n_layers: int, activation: str) -> None:
        super().__init__()
        self.linear_layers = nn.ModuleList(nn.Linear(d_model, d_model) for _ in range(n_layers))
        self.out_proj = nn.Linear(d_model, 1)
        self.act = ACTIVATIONS[activation]

    def forward(self, x: Float[Tensor, "*shape d_model"]) -> Float[Tensor, "*shape"]:
        """Predicted value per token."""
        for layer in self.linear_layers:
            x = self.act(layer(x))
        return cast("Tensor", self.out_proj(x)).squeeze(-1)


class CellValueDecoder(nn.Module):
    """Head `mvc_decoder`: binned value of a gene from the cell token.

    (W sigmoid(W_q gene)) . cell, divided by sqrt(d_model) if it is scaled.
    """

    def __init__(self, *, d_model: int, is_scaled: bool) -> None:
        super().__init__()
        self.gene2query = nn.Linear(d_model, d_model)
        self.W = nn.Linear(d_model, d_model, bias=False)
        self.scale = d_model**-0.5 if is_scaled else 1.0

    def forward(
        self, cell: Float[Tensor, "masked_gene d_model"], gene: Float[Tensor, "masked_gene d_model"]
    ) -> Float[Tensor, " masked_gene"]:
        """Predicted value of each gene in its cell."""
        query = self.W(torch.sigmoid(self.gene2query(gene)))
        return cast("Tensor", (query * cell).sum(-1) * self.scale)
