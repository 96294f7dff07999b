"""AIDO.Cell equals a network written from its published equations, and its tokens are those computed by hand."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_aido_cell import HEADS, LAYERS, SETTINGS, D, shapes, write_aido_cell

from sae_core.errors import CheckpointError, ConfigError
from sae_core.scfm import load_model

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from sae_core.scfm.tokens import Tokens

GENES = [f"GENE{i}" for i in range(40)]


class Written:
    """The network, one cell at a time, from the weights by their official names."""

    def __init__(self, folder: Path) -> None:
        self.w = load_file(folder / "model.safetensors")
        self.is_rms = json.loads((folder / "config.json").read_text())["normalization_type"] == "RMSNorm"

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor) -> Tensor:
        if self.is_rms:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.w[f"{name}.weight"]
        return F.layer_norm(x, [D], self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-5)

    def run(self, gene: Tensor, value: Tensor) -> dict[str, Tensor]:
        a = F.leaky_relu(self.linear("bert.gene_embedding.linear1", value[:, None]), 0.1)
        soft = torch.softmax(0.7 * a + self.linear("bert.gene_embedding.linear2", a), -1)
        x = soft @ self.w["bert.gene_embedding.lookup_table.weight"]
        x[value == -1] = self.w["bert.gene_embedding.mask_embedding.weight"][0]
        x = x + self.w["bert.position_embedding.weight"][gene]
        found = {"embedding": x}
        for i in range(LAYERS):
            layer = f"bert.encoder.layer.{i}"
            h = self.norm(f"{layer}.attention.ln", x)
            q, k, v = (
                self.linear(f"{layer}.attention.self.{part}", h).view(len(h), HEADS, -1).transpose(0, 1)
                for part in ("query", "key", "value")
            )
            weight = torch.softmax(q @ k.transpose(1, 2) / (D / HEADS) ** 0.5, -1)
            out = self.linear(f"{layer}.attention.output.dense", (weight @ v).transpose(0, 1).reshape(len(h), D))
            found[f"attention.{i}"] = out
            x = x + out
            h = self.norm(f"{layer}.ln", x)
            gated = F.silu(self.linear(f"{layer}.mlp.gate_proj", h)) * self.linear(f"{layer}.mlp.up_proj", h)
            found[f"mlp.{i}"] = self.linear(f"{layer}.mlp.down_proj", gated)
            x = found[f"layer.{i}"] = x + found[f"mlp.{i}"]
        found["final"] = self.norm("bert.encoder.ln", x)
        return found

    def head(self, x: Tensor) -> Tensor:
        h = F.gelu(self.linear("cls.predictions.transform.dense", x))
        return self.linear("cls.predictions.decoder", self.norm("cls.predictions.transform.LayerNorm", h))[:, 0]


def some_counts(n_genes: int = 40) -> sp.csr_matrix:
    rng = np.random.default_rng(3)
    return sp.csr_matrix(rng.poisson(rng.gamma(0.5, 2.0, (4, n_genes))).astype(np.float32))


def tokens_of(model: Any, x: sp.csr_matrix, genes: list[str], **options: Any) -> Tokens:
    return model.tokenize(x.indptr, x.indices, x.data, model.match_genes(genes), seed=0, **options)


@pytest.mark.parametrize("norm", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("bias", [True, False])
def test_every_site_and_the_head_equal_the_written_network(tmp_path: Path, norm: str, bias: bool) -> None:
    folder = write_aido_cell(tmp_path, genes=GENES, config={"normalization_type": norm, "add_linear_bias": bias})
    model, written = load_model(folder), Written(folder)
    tokens = tokens_of(model, some_counts(), GENES)
    task = model.mask_genes(tokens, seed=2, fraction=0.3)
    assert (task.target > 0).all()
    for these in (tokens, task.tokens):
        found = model.activations(these, model.sites)
        for cell in range(these.n_cells):
            rows = slice(*these.offsets[cell : cell + 2].tolist())
            expected = written.run(torch.from_numpy(these.gene_id[rows]), torch.from_numpy(these.value[rows]))
            assert {str(site) for site in found} == set(expected)
            for site, x in found.items():
                torch.testing.assert_close(x[rows], expected[str(site)], atol=1e-5, rtol=1e-5)
    final = model.activations(task, ["final"])[model.sites[-1]]
    predicted = model.masked_gene_prediction(task)
    torch.testing.assert_close(predicted.prediction, written.head(final[task.token_rows]), atol=1e-5, rtol=1e-5)
    error = (predicted.prediction - predicted.target) ** 2
    mean = torch.zeros(4).index_add_(0, predicted.cell, error) / torch.bincount(predicted.cell)
    torch.testing.assert_close(model.pretraining_loss(tokens, seed=2, mask_fraction=0.3).per_cell.float(), mean)


def test_biases_of_the_value_embedding_and_the_norm_of_the_head_are_those_of_the_file(tmp_path: Path) -> None:
    def more(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        added = {"bert.gene_embedding.linear1.bias": torch.ones(7), "bert.gene_embedding.linear2.bias": torch.ones(7)}
        return weights | added | {"cls.predictions.transform.LayerNorm.bias": torch.ones(D)}

    folder = write_aido_cell(tmp_path, genes=GENES, edit=more)
    model = load_model(folder)
    assert model.values.mlp.bias.eq(1).all()
    assert isinstance(model.head.norm, torch.nn.LayerNorm)
    assert isinstance(model.norm, torch.nn.RMSNorm)
    tokens = tokens_of(model, some_counts(), GENES)
    found = model.activations(tokens, ["embedding"])[model.sites[0]]
    expected = Written(folder).run(torch.from_numpy(tokens.gene_id[:42]), torch.from_numpy(tokens.value[:42]))
    torch.testing.assert_close(found[:42], expected["embedding"], atol=1e-5, rtol=1e-5)


def test_tokens_of_two_real_cells_are_those_computed_by_hand(tmp_path: Path, scsae_data: Path) -> None:
    cells = anndata.read_h5ad(scsae_data / "kang18_ifnb_2000x9015_counts.h5ad")[[5, 900]]
    known = [*cells.var_names[:3000], *(f"absent{i}" for i in range(50))]
    order = np.random.default_rng(0).permutation(len(known))
    genes = [known[i] for i in order]
    model = load_model(write_aido_cell(tmp_path, genes=genes))
    x = sp.csr_matrix(cells.X)
    tokens = tokens_of(model, x, list(cells.var_names))
    assert tokens.lengths.tolist() == [3052, 3052]
    column = {name: i for i, name in enumerate(cells.var_names)}
    for cell in range(2):
        count = np.array([x[cell, column[gene]] if gene in column else 0 for gene in genes], dtype=np.float64)
        rows = slice(*tokens.offsets[cell : cell + 2].tolist())
        np.testing.assert_array_equal(tokens.gene_id[rows], np.arange(3052))
        np.testing.assert_allclose(tokens.value[rows][:-2], np.log1p(count / count.sum() * 1e4), rtol=1e-6)
        assert tokens.value[rows][-2:].tolist() == [5.0, 5.0]
        assert tokens.is_special[rows].tolist() == [*(gene not in column for gene in genes), True, True]


def test_depth_is_at_least_five_and_values_at_most_twenty(tmp_path: Path) -> None:
    model = load_model(write_aido_cell(tmp_path, genes=GENES))
    x = sp.csr_matrix(np.array([[3e6, 1, *[0] * 38], [2, 1, *[0] * 38]], dtype=np.float64))
    tokens = tokens_of(model, x, GENES)
    value = tokens.value.reshape(2, 42)
    np.testing.assert_allclose(value[:, 40:], [[np.log10(3e6 + 1)] * 2, [5, 5]], rtol=1e-6)
    assert (value[:, :40] <= 20).all()
    np.testing.assert_allclose(value[1, :2], np.log1p([2e4 / 3, 1e4 / 3]), rtol=1e-6)


def test_the_official_cell_is_the_mean_over_measured_genes_and_the_depth_places(tmp_path: Path) -> None:
    model = load_model(write_aido_cell(tmp_path, genes=GENES))
    measured = GENES[5:30]
    x = some_counts(25)
    tokens = tokens_of(model, x, measured)
    final = model.activations(tokens, ["final"])[model.sites[-1]].view(4, 42, D)
    torch.testing.assert_close(model.embed(tokens, readout="official"), final[:, [*range(5, 30), 40, 41]].mean(1))
    torch.testing.assert_close(model.embed(tokens, readout="mean"), final[:, 5:30].mean(1))
    # genes that are not measured are zeros to the network, and no genes of the cell
    whole = tokens_of(model, sp.csr_matrix(sp.hstack([sp.csr_matrix((4, 5)), x, sp.csr_matrix((4, 10))])), GENES)
    np.testing.assert_array_equal(whole.value, tokens.value)
    assert (whole.is_special.reshape(4, 42).sum(1) == 2).all()


def test_chosen_genes_leave_the_other_places_out_and_keep_values_and_depth(tmp_path: Path) -> None:
    model = load_model(write_aido_cell(tmp_path, genes=GENES))
    x = some_counts()
    match = model.match_genes(GENES)
    whole = model.tokenize(x.indptr, x.indices, x.data, match, seed=0)
    few = model.tokenize(x.indptr, x.indices, x.data, match.only(np.arange(3, 23)), seed=0)
    assert few.lengths.tolist() == [22] * 4
    expected = whole.value.reshape(4, 42)[:, [*range(3, 23), 40, 41]]
    np.testing.assert_array_equal(few.value.reshape(4, 22), expected)
    with pytest.raises(ConfigError, match=r"max_tokens was 2; allowed: 3 or more"):
        model.tokenize(x.indptr, x.indices, x.data, match, seed=0, max_tokens=2)


def test_every_weight_of_the_real_layout_is_read_or_named(tmp_path: Path) -> None:
    def more(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return weights | {"pooler.dense.weight": torch.zeros(2, 2), "classifier.bias": torch.zeros(3)}

    folder = write_aido_cell(
        tmp_path,
        genes=GENES,
        config={"num_hidden_layers": 18},
        edit=lambda w: more(
            {
                key: torch.zeros(shape)
                for key, shape in shapes(n_genes=40, norm="RMSNorm", bias=True, n_layers=18).items()
            }
        ),
    )
    model = load_model(folder)
    assert model.n_layers == 18
    assert model.ignored_weights == ("classifier.bias", "pooler.dense.weight")
    assert any("not read, taken for heads that no activation needs: classifier, pooler" in note for note in model.notes)


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"hidden_act": "gelu"}, r"config\.json has hidden_act 'gelu'; allowed: 'swiglu'"),
        ({"normalization_type": "BatchNorm"}, r"normalization_type 'BatchNorm'; allowed: 'RMSNorm' or 'LayerNorm'"),
        ({"bin_alpha": None}, r"config\.json has bin_alpha null"),
        ({"num_attention_heads": 3}, r"num_attention_heads 3; allowed: a divisor of hidden_size 16"),
        ({"max_position_embeddings": 41}, r"names 40 genes, and .* rows for 41 genes"),
        ({"intermediate_size": 32}, r"bert\.encoder\.layer\.0\.mlp"),
    ],
)
def test_a_wrong_setting_is_one_error_with_file_and_field(tmp_path: Path, config: dict[str, Any], wanted: str) -> None:
    folder = write_aido_cell(tmp_path, genes=GENES)
    stored = SETTINGS | {"max_position_embeddings": 40} | config
    (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match=wanted):
        load_model(folder)


def test_wrong_weights_and_missing_files_are_named(tmp_path: Path) -> None:
    def without(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value for key, value in weights.items() if "layer.1.attention.self.key.weight" not in key}

    def two_biases(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return weights | {"cls.predictions.bias": torch.full((1,), 9.0)}

    def short(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return weights | {"bert.position_embedding.weight": torch.zeros(40, D)}

    for name, edit, wanted in (
        ("a", without, r"layer\.1\.attention\.self"),
        ("b", two_biases, r"cls\.predictions\.bias and cls\.predictions\.decoder\.bias differ"),
        ("c", short, r"position_embedding\.weight has 40 rows and config\.json max_position_embeddings 40"),
    ):
        with pytest.raises(CheckpointError, match=wanted):
            load_model(write_aido_cell(tmp_path / name, genes=GENES, edit=edit))
    folder = write_aido_cell(tmp_path, genes=GENES)
    moved = (folder / "OS_scRNA_gene_index.19264.tsv").rename(tmp_path / "list.tsv")
    with pytest.raises(CheckpointError, match=r"no gene list; put OS_scRNA_gene_index\.19264\.tsv"):
        load_model(folder)
    assert load_model(folder, options={"gene_list": moved}).n_layers == LAYERS
    with pytest.raises(CheckpointError, match=r"gene_list is .*nowhere"):
        load_model(folder, options={"gene_list": tmp_path / "nowhere"})
