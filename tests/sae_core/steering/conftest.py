"""An autoencoder whose codes are known: orthogonal directions, a normaliser folded in, a threshold of 1."""

from __future__ import annotations

import pytest
import torch

from sae_core.sae import SAEConfig, SparseAutoencoder
from sae_core.scfm.sites import TokenInfo


@pytest.fixture
def sae() -> SparseAutoencoder:
    """Feature f is the unit vector f of 4 dimensions, feature 4 + f its negative; z = x[f] where that is above 1."""
    made = SparseAutoencoder(SAEConfig(d_model=4, n_features=8, k=2))
    with torch.no_grad():
        directions = torch.cat([torch.eye(4), -torch.eye(4)])
        made.W_dec.copy_(directions)
        made.W_enc.copy_(directions)
        made.theta.fill_(1.0)
    return made.requires_grad_(False)


@pytest.fixture
def trained() -> SparseAutoencoder:
    """An autoencoder of random directions, biases and normaliser, as far from the easy one as possible."""
    generator = torch.Generator().manual_seed(0)
    made = SparseAutoencoder(SAEConfig(d_model=16, n_features=64, k=4), generator=generator)
    with torch.no_grad():
        made.b_enc.normal_(0, 0.1, generator=generator)
        made.b_dec.normal_(0, 0.1, generator=generator)
    made.mu.normal_(3, 1, generator=generator)
    made.scale.fill_(2.0)
    made.theta.fill_(0.5)
    return made.folded()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.tensor(
        [
            [2.0, 0.5, 0.0, -0.0],
            [3.0, -4.0, 0.1, 0.0],
            [0.2, 0.3, -0.4, 0.5],
            [5.0, 1.5, 0.0, 0.0],
            [2.0, 0.0, 0.0, 0.0],
        ]
    )


@pytest.fixture
def info() -> TokenInfo:
    """Cells 0 and 1; the first token of cell 0 is special; genes 10, 11 and 12."""
    return TokenInfo(
        gene_id=torch.tensor([0, 10, 11, 10, 12]),
        cell=torch.tensor([0, 0, 0, 1, 1]),
        position=torch.tensor([0, 1, 2, 0, 1]),
        is_special=torch.tensor([True, False, False, False, False]),
        is_masked_gene=torch.zeros(5, dtype=torch.bool),
    )
