from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from sae_core.scfm import FoundationModel, ScGPT, Site, Tokens, load_model
from sae_core.scfm.checkpoint import MINI

DIGEST = "664a5afe08aeb6bc205d12f4b33459277f00f3fa9859b4cbb39ea5c308ed26e5"
B_CELL = {"CD74": 30, "HLA-DRA": 22, "MS4A1": 3, "CD79A": 4, "ACTB": 12, "RPLP0": 9, "B2M": 17}
MONOCYTE = {"LYZ": 30, "S100A8": 22, "CD14": 3, "CST3": 4, "ACTB": 12, "RPLP0": 9, "B2M": 17}


def tokens_of(model: FoundationModel, cell: dict[str, int], *, seed: int = 0) -> Tokens:
    match = model.match_genes(list(cell))
    values = np.array(list(cell.values()), dtype=np.float32)
    return model.tokenize(np.array([0, len(cell)]), np.arange(len(cell)), values, match, seed=seed)


def predicted_bins(model: FoundationModel, cell: dict[str, int], masked: list[str]) -> torch.Tensor:
    """Predicted bins of masked genes, which attend to the cell's genes and are not attended to."""
    assert isinstance(model, ScGPT)
    assert model.decoder is not None
    tokens = tokens_of(model, cell)
    queries = torch.from_numpy(model.match_genes(masked).token_id)
    gene_id = torch.cat([torch.from_numpy(tokens.gene_id), queries])[None]
    value = torch.cat([torch.from_numpy(tokens.value), torch.full((len(masked),), model.config.mask_value)])[None]
    x = model.input_embedding(gene_id, value)
    for i, block in enumerate(model.blocks):
        x = block(x, index=i, n_keys=tokens.n_tokens)
    return model.decoder(x[:, tokens.n_tokens :])[0]


@pytest.fixture(scope="module")
def mini() -> FoundationModel:
    return load_model("mini")


def test_mini_is_small_and_loads_in_about_a_second() -> None:
    assert sum(path.stat().st_size for path in MINI.iterdir()) <= 6_000_000
    began = time.process_time()
    load_model("mini")
    assert time.process_time() - began < 2.0


def test_mini_is_the_model_that_its_card_describes(mini: FoundationModel) -> None:
    assert mini.digest == DIGEST
    assert (mini.name, mini.family, mini.n_layers, mini.d_model) == ("mini", "scgpt", 4, 128)


def test_mini_weights_are_finite_float32_of_the_stored_float16(mini: FoundationModel) -> None:
    for name, parameter in mini.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert torch.isfinite(parameter).all(), name
        assert torch.equal(parameter.half().float(), parameter), name


def test_mini_knows_canonical_markers_by_symbol_and_by_ensembl_id(mini: FoundationModel) -> None:
    markers = [
        "CD3D",
        "CD3E",
        "CD4",
        "CD8A",
        "CD8B",
        "IL7R",
        "CCR7",
        "NKG7",
        "GNLY",
        "CD79A",
        "MS4A1",
        "CD74",
        "HLA-DRA",
    ]
    markers += ["CD14", "LYZ", "S100A8", "FCGR3A", "MS4A7", "CST3", "FCER1A", "PPBP", "CD34", "ISG15", "IFI6", "KRT5"]
    assert mini.match_genes(markers).n_matched == len(markers)
    by_ensembl = mini.match_genes(["ENSG00000156738.17", "ENSG00000167286"])
    by_symbol = mini.match_genes(["MS4A1", "CD3D"])
    np.testing.assert_array_equal(by_ensembl.token_id, by_symbol.token_id)


def test_mini_tokens_do_not_depend_on_the_seed(mini: FoundationModel) -> None:
    a, b = (tokens_of(mini, B_CELL, seed=seed) for seed in (0, 1))
    np.testing.assert_array_equal(a.value, b.value)
    assert a.n_tokens == len(B_CELL) + 1


def test_mini_expects_genes_where_their_cell_type_expresses_them(mini: FoundationModel) -> None:
    b_genes, monocyte_genes = ["CD79B", "HLA-DQA1", "TCL1A"], ["S100A9", "FCN1", "TYROBP"]
    in_b, in_monocyte = (predicted_bins(mini, cell, b_genes + monocyte_genes) for cell in (B_CELL, MONOCYTE))
    assert (in_b[:3] > in_monocyte[:3]).all()
    assert (in_b[3:] < in_monocyte[3:]).all()


def test_mini_with_random_weights_is_another_model(mini: FoundationModel) -> None:
    tokens, site = tokens_of(mini, B_CELL), Site.parse("layer.2")
    control = load_model("mini", random_init=True, seed=4)
    assert control.digest != mini.digest
    x, random_x = (model.activations(tokens, [site])[site] for model in (mini, control))
    assert not torch.allclose(x, random_x, atol=0.1)
