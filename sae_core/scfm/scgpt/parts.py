"""Modules of scGPT's network: gene and value encoders, the batch norms of fine-tuned checkpoints, pretraining heads.

Parameter names are those of the official checkpoints.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

_BATCH_NORM_EPS = 6.1e-5


class InputNorm(NamedTuple):
    """Batch norm of the input: one for all cells (`n_batches` None) or one per batch."""

    n_batches: int | None
    affine: bool


class GeneEncoder(nn.Module):
    """LN(Emb(id)), of genes and of batch labels."""

    def __init__(self, *, n_tokens: int, d_model: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_tokens, d_model, _weight=torch.empty(n_tokens, d_model))
        self.enc_norm = nn.LayerNorm(d_model)

    def forward(self, gene_id: Int64[Tensor, "*shape"]) -> Float[Tensor, "*shape d_model"]:
        """Vector of each id."""
        return cast("Tensor", self.enc_norm(self.embedding(gene_id)))


class BatchNorm(nn.BatchNorm1d):
    """Batch norm of the input's channels, with the statistics of the fine-tuning data."""

    def __init__(self, d_model: int, *, affine: bool) -> None:
        super().__init__(d_model, eps=_BATCH_NORM_EPS, affine=affine)

    def forward(self, x: Float[Tensor, "row position d_model"]) -> Float[Tensor, "row position d_model"]:
        """The normed input."""
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class DomainNorm(nn.Module):
    """Domain-specific batch norm (DSBN): one batch norm per batch of the fine-tuning data."""

    def __init__(self, n_batches: int, *, d_model: int, affine: bool) -> None:
        super().__init__()
        self.bns = nn.ModuleList(BatchNorm(d_model, affine=affine) for _ in range(n_batches))


class ValueEncoder(nn.Module):
    """LN(W2 relu(W1 min(v, clamp))) of a binned value."""

    def __init__(self, *, d_model: int, clamp: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(1, d_model)
        self.linear2 = nn.Linear(d_model, d_model)
        self.norm = nn.LayerNorm(d_model)
        self.clamp = clamp

    def forward(self, value: Float[Tensor, "row position"]) -> Float[Tensor, "row position d_model"]:
        """Vector of each value."""
        hidden = F.relu(self.linear1(value.clamp(max=self.clamp)[..., None]))
        return cast("Tensor", self.norm(self.linear2(hidden)))


class ExpressionDecoder(nn.Module):
    """Head `decoder`: binned value of a gene, from its own token (and the batch's vector where there are batches)."""

    def __init__(self, *, d_model: int, with_batch: bool = False) -> None:
        super().__init__()
        linear = [
            nn.Linear(d_model * (1 + with_batch), d_model),
            nn.LeakyReLU(),
            nn.Linear(d_model, d_model),
            nn.LeakyReLU(),
        ]
        self.fc = nn.Sequential(*linear, nn.Linear(d_model, 1))

    def forward(self, x: Float[Tensor, "row position d_model"]) -> Float[Tensor, "row position"]:
        """Predicted value per position."""
        return cast("Tensor", self.fc(x)).squeeze(-1)


class CellValueDecoder(nn.Module):
    """Head `mvc_decoder`: binned value of a gene, from the cell token and the gene's vector ("inner product" style)."""

    def __init__(self, *, d_model: int, with_batch: bool = False) -> None:
        super().__init__()
        self.gene2query = nn.Linear(d_model, d_model)
        self.W = nn.Linear(d_model, d_model * (1 + with_batch), bias=False)

    def forward(
        self, cell: Float[Tensor, "row d_cell"], gene: Float[Tensor, "row position d_model"]
    ) -> Float[Tensor, "row position"]:
        """Predicted value of each gene of the row."""
        query = self.W(torch.sigmoid(self.gene2query(gene)))
        return torch.einsum("rpd,rd->rp", query, cell)
