"""Tiny scGPT checkpoints with random weights, in either naming of the attention weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from safetensors.torch import save_file

from sae_core.scfm import ScGPT, ScGPTConfig, Vocabulary, load_model
from sae_core.scfm.scgpt import init_weights

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

N_GENES = 40
SYMBOLS = [f"GENE{i}" for i in range(N_GENES)]
TINY_ARGS = {"nlayers": 3, "nheads": 2, "embsize": 16, "d_hid": 24, "n_bins": 51, "max_seq_len": 32}
TINY_ARGS |= {"pad_value": -2, "mask_value": -1, "input_emb_style": "continuous", "dropout": 0.2, "n_layers_cls": 3}


@pytest.fixture(scope="session")
def tiny_weights() -> dict[str, torch.Tensor]:
    tokens = (*SYMBOLS, "<pad>", "<cls>", "<eoc>")
    config = ScGPTConfig.from_args(TINY_ARGS)
    model = ScGPT.empty(config, Vocabulary(tokens=tokens), n_tokens=len(tokens))
    init_weights(model, seed=3)
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.fixture
def write_checkpoint(tmp_path: Path, tiny_weights: dict[str, torch.Tensor]) -> Callable[..., Path]:
    """Write a folder: `args` replace entries of args.json, `weights` the tensors, `file` names their file."""

    def write(
        name: str = "tiny",
        *,
        args: dict[str, Any] | None = None,
        weights: dict[str, torch.Tensor] | None = None,
        file: str = "best_model.pt",
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "args.json").write_text(json.dumps(TINY_ARGS | (args or {})))
        vocabulary = {token: i for i, token in enumerate([*SYMBOLS, "<pad>", "<cls>", "<eoc>"])}
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        weights = tiny_weights if weights is None else weights
        if file.endswith(".pt"):
            torch.save(weights, folder / file)
        else:
            save_file(weights, folder / file)
        return folder

    return write


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
