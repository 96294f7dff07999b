"""Cells of the mini model with random genes, and an autoencoder with random directions for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from sae_core.sae import SAEConfig, SparseAutoencoder
from sae_core.scfm import Tokens

if TYPE_CHECKING:
    from sae_core.scfm import FoundationModel


def mini_cells(
    model: FoundationModel, n_cells: int = 1, *, n_genes: int = 30, of: int | None = None, seed: int = 0
) -> Tokens:
    """Cells of `<cls>` and random genes, all or the first `of`, in the order of their ids, with random bins."""
    rng, special = np.random.default_rng(seed), model.vocabulary.id_of("<cls>")
    genes = np.setdiff1d(np.arange(model.vocabulary.n_genes), special)[:of]
    drawn = (np.sort(rng.choice(genes, n_genes, replace=False)) for _ in range(n_cells))
    n = n_genes + 1
    return Tokens(
        offsets=np.arange(0, n * n_cells + 1, n),
        gene_id=np.concatenate([np.r_[special, own] for own in drawn]).astype(np.int64),
        value=rng.integers(1, 50, n * n_cells).astype(np.float32),
        is_special=np.arange(n * n_cells) % n == 0,
    )


def random_autoencoder(d_model: int, *, n_features: int = 64, theta: float = 0.5, seed: int = 0) -> SparseAutoencoder:
    """Random unit directions, which fire above `theta`."""
    config = SAEConfig(d_model=d_model, n_features=n_features, k=4)
    made = SparseAutoencoder(config, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        made.theta.fill_(theta)
    return made.requires_grad_(False)
