"""Tiny checkpoints of every family with random weights, in their official layouts, and counts of twelve cells."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import scipy.sparse as sp
import tiny_checkpoints
import tiny_tahoe
import torch
from tiny_checkpoints import N_GENES, SYMBOLS

from sae_core.scfm import ScGPT, load_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def tiny_weights() -> dict[str, torch.Tensor]:
    return tiny_checkpoints.tiny_weights()


@pytest.fixture
def write_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    return partial(tiny_checkpoints.write_scgpt, tmp_path)


@pytest.fixture
def write_finetuned_scgpt(tmp_path: Path) -> Callable[..., Path]:
    return partial(tiny_checkpoints.write_finetuned_scgpt, tmp_path)


@pytest.fixture
def write_geneformer(tmp_path: Path) -> Callable[..., Path]:
    return partial(tiny_checkpoints.write_geneformer, tmp_path)


@pytest.fixture
def write_scfoundation(tmp_path: Path) -> Callable[..., Path]:
    return partial(tiny_checkpoints.write_scfoundation, tmp_path)


@pytest.fixture
def write_tahoe(tmp_path: Path) -> Callable[..., Path]:
    return partial(tiny_tahoe.write_tahoe, tmp_path)


@pytest.fixture
def checkpoint_of(tmp_path: Path) -> Callable[[str], Path]:
    """A tiny checkpoint of a kind, in its official layout."""
    return partial(tiny_checkpoints.write_tiny, tmp_path)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch with one thread, so that sums are taken in one order; in models this small threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def draw() -> Callable[..., torch.Tensor]:
    """Seeded normal tensors by name."""
    return tiny_checkpoints.draw


@pytest.fixture
def tiny(write_checkpoint: Callable[..., Path]) -> ScGPT:
    model = load_model(write_checkpoint(args={"tie_break": "midpoint"}))
    assert isinstance(model, ScGPT)
    return model


@pytest.fixture(scope="session")
def counts() -> sp.csr_matrix:
    """Poisson counts of 12 cells, the fourth without any; between 3 and 25 nonzero genes in the others."""
    rng = np.random.default_rng(0)
    depth = np.array([0.1, 0.2, 0.4, 0.0, 0.8, 1.0, 0.3, 0.5, 0.15, 0.9, 0.6, 0.25])
    dense = rng.poisson(depth[:, None] * rng.gamma(1.0, 1.0, N_GENES)).astype(np.float32)
    dense[depth > 0, :3] += 1
    return sp.csr_matrix(dense)


@pytest.fixture
def tokenize(counts: sp.csr_matrix) -> Callable[..., Any]:
    def run(model: ScGPT, x: sp.csr_matrix = counts, **options: Any) -> Any:
        options = {"seed": 0} | options
        return model.tokenize(x.indptr, x.indices, x.data, model.match_genes(SYMBOLS), **options)

    return run
