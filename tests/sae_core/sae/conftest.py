"""A synthetic dictionary, whose features are known, and small random codes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sae_core.sae import SparseCodes
from sae_core.sae.synthetic import own_seed

if TYPE_CHECKING:
    from collections.abc import Callable


class Synthetic(NamedTuple):
    """Unit directions [feature d_model] and a source of activations made of about three of them each, off centre."""

    directions: Tensor
    sample: Callable[[int, int], Tensor]
    """(n_tokens, seed) -> activations [token d_model]"""


@pytest.fixture(scope="session")
def synthetic() -> Synthetic:
    n_features, d_model = 64, 32
    generator = torch.Generator().manual_seed(own_seed(0, "directions of the tests"))
    directions = functional.normalize(torch.randn(n_features, d_model, generator=generator), dim=1)
    mean = 0.5 * torch.randn(d_model, generator=generator)

    def sample(n_tokens: int, seed: int) -> Tensor:
        own = torch.Generator().manual_seed(seed)
        on = torch.rand(n_tokens, n_features, generator=own) < 3 / n_features
        size = 0.5 + torch.rand(n_tokens, n_features, generator=own)
        return 2.5 * ((on * size) @ directions + mean)

    return Synthetic(directions, sample)


@pytest.fixture
def random_codes() -> Callable[..., SparseCodes]:
    def make(
        n_tokens: int, n_features: int, *, density: float, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> SparseCodes:
        generator = torch.Generator().manual_seed(seed)
        dense = torch.rand(n_tokens, n_features, generator=generator, dtype=dtype)
        return SparseCodes.from_mask(dense, torch.rand(n_tokens, n_features, generator=generator) < density)

    return make
