"""A transformer whose weights are set by hand: known features raise known genes and known later features.

A visible gene token i carries the early feature i modulo N_EARLY, with the value of the token, beside a mark of its
gene. Block 0 changes nothing. Block 1 writes the mean of the early features over all tokens of the cell to every token.
Block 2 adds, at the token of gene g, weight[f, g] times the mean of feature f to the output, and later[f, h] times it
to the later feature h, at every token. The head reads the output. Nothing reads early features that cause neither.

So an early feature reads the token of its own genes, i and i + N_EARLY, and a later feature reads the tokens of the
genes of its causes, at all tokens. With `noise`, every token also has a number that is as good as random for its gene
and value: a part is added to the later features at the token, and the mean over the cell at all tokens. Genes then
change later features in every cell, and none of them does so on average.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn
from toy_family import ToyModel

from sae_core.sae import SAEConfig, SparseAutoencoder
from sae_core.scfm import Site, Tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sae_core.scfm.encoder import EncoderBlock

N_EARLY, N_LATER, N_GENES = 48, 8, 96
EARLY = slice(0, N_EARLY)
MEANS = slice(N_EARLY, 2 * N_EARLY)
LATER = slice(2 * N_EARLY, 2 * N_EARLY + N_LATER)
MARKS = slice(LATER.stop, LATER.stop + N_GENES)
OUTPUT = MARKS.stop
D_MODEL = OUTPUT + 1
NOISE, NOISE_MEAN = D_MODEL, D_MODEL + 1
D_MODEL_WITH_NOISE = D_MODEL + 2
BIG = 64.0
SELF_NOISE = 0.05
"""The part of a token's noise that is added to the later features at the token itself."""


class Nothing(nn.Module):
    """A block that changes nothing."""

    def change(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        return x

    def forward(
        self,
        x: Tensor,
        *,
        index: int,
        hook: Callable[..., Tensor],
        key_mask: Tensor | None = None,
        key_bias: Tensor | None = None,
    ) -> Tensor:
        return hook(Site(kind="layer", index=index), self.change(x, key_mask))


class Means(Nothing):
    """Writes the mean of the early features over the tokens of a cell to each of them."""

    def change(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        keys = torch.ones(x.shape[:2], dtype=torch.bool) if key_mask is None else key_mask
        weight = keys.to(x.dtype)[:, :, None]
        out = x.clone()
        out[:, :, MEANS] += (x[:, :, EARLY] * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        if x.shape[2] == D_MODEL_WITH_NOISE:
            out[:, :, NOISE_MEAN] += (x[:, :, NOISE] * weight[..., 0]).sum(1, keepdim=True) / weight.sum(1)
        return out


class Causes(Nothing):
    """Adds the effects of the means on the output of each gene and on the later features."""

    def __init__(self, weight: Tensor, later: Tensor) -> None:
        super().__init__()
        self.weight, self.later = weight, later
        self.feature, self.gene = weight.nonzero().unbind(1)

    def change(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        out = x.clone()
        means, marks = x[:, :, MEANS][..., self.feature], x[:, :, MARKS][..., self.gene]
        # relu(mean + BIG mark - BIG): the mean of the feature at the tokens of the gene, 0 elsewhere
        at_gene = torch.relu(means + BIG * marks - BIG)
        out[:, :, OUTPUT] += at_gene @ self.weight[self.feature, self.gene]
        out[:, :, LATER] += torch.relu(x[:, :, MEANS]) @ self.later
        if x.shape[2] == D_MODEL_WITH_NOISE:
            out[:, :, LATER] += x[:, :, NOISE_MEAN, None] + SELF_NOISE * x[:, :, NOISE, None]
        return out


class ConstructedModel(ToyModel):
    """The model, of three blocks."""

    def __init__(self, weight: Tensor, later: Tensor, *, noise: float = 0.0) -> None:
        super().__init__([f"GENE{i}" for i in range(N_GENES)], d_model=8)
        self.d_model, self.n_layers, self.noise = D_MODEL_WITH_NOISE if noise else D_MODEL, 3, noise
        self.layers = nn.ModuleList([Nothing(), Means(), Causes(weight, later)])

    @property
    def blocks(self) -> Sequence[EncoderBlock]:
        return cast("tuple[EncoderBlock, ...]", tuple(self.layers))

    def input_embedding(self, gene_id: Tensor, value: Tensor) -> Tensor:
        x = torch.zeros(*gene_id.shape, self.d_model)
        gene = (gene_id - 1).clamp(min=0)[..., None]
        x[..., MARKS].scatter_(-1, gene, 1.0)
        x[..., EARLY].scatter_(-1, gene % N_EARLY, value.clamp(min=0)[..., None])
        if self.noise:
            x[..., NOISE] = self.noise * torch.sin(1e4 * value.double() + gene_id**2).float()
        return x

    def predict_masked(self, x: Tensor, batch: object, masked: object) -> Tensor:
        return x[masked.row, masked.column, OUTPUT]


def constructed(
    rng: np.random.Generator, *, n_causal: int = 12, n_targets: int = 3, noise: float = 0.0
) -> ConstructedModel:
    """A model in which `n_causal` early features act on `n_targets` genes and one later feature each."""
    weight, later = torch.zeros(N_EARLY, N_GENES), torch.zeros(N_EARLY, N_LATER)
    for i, feature in enumerate(rng.choice(N_EARLY, n_causal, replace=False)):
        genes = torch.from_numpy(rng.choice(N_GENES, n_targets, replace=False))
        weight[feature, genes] = torch.from_numpy(rng.choice([-1.0, 1.0], n_targets)).float() * 5
        later[feature, i % N_LATER] = 5.0
    return ConstructedModel(weight, later, noise=noise).eval()


def unit_autoencoder(
    dimensions: slice, *also: slice, threshold: float = 0.05, d_model: int = D_MODEL
) -> SparseAutoencoder:
    """Features are the dimensions of the slices, one after the other, as they are, where they exceed the threshold."""
    rows = torch.cat([torch.eye(d_model)[one] for one in (dimensions, *also)])
    n = len(rows)
    sae = SparseAutoencoder(SAEConfig(d_model=d_model, n_features=n, k=n))
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows)
        sae.theta.fill_(threshold)
    return sae.requires_grad_(False)


def random_cells(rng: np.random.Generator, n_cells: int, *, n_tokens: int = 40) -> Tokens:
    """Cells of `n_tokens` random genes with random values."""
    gene = np.concatenate([rng.choice(N_GENES, n_tokens, replace=False) for _ in range(n_cells)])
    n = n_cells * n_tokens
    return Tokens(
        offsets=np.arange(0, n + 1, n_tokens),
        gene_id=gene.astype(np.int64) + 1,
        value=rng.uniform(0.5, 2.0, n).astype(np.float32),
        is_special=np.zeros(n, dtype=bool),
    )
