from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sae_core.errors import CheckpointError, ConfigError, TokenizationError
from sae_core.scfm import ScGPT, Site, Tokens, load_model

if TYPE_CHECKING:
    import scipy.sparse as sp

Write = Callable[..., Path]
Weights = dict[str, torch.Tensor]


def by_torch(
    w: Weights, tokens: Tokens, norm: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Embedding and output of each stock layer for padded cells, from the file's own weights; which are real."""
    real = torch.from_numpy(np.arange(tokens.lengths.max()) < tokens.lengths[:, None])
    ids, values = torch.zeros(real.shape, dtype=torch.int64), torch.zeros(real.shape)
    ids[real], values[real] = torch.from_numpy(tokens.gene_id), torch.from_numpy(tokens.value)

    def layer_norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"])

    gene = layer_norm(w["encoder.embedding.weight"][ids], "encoder.enc_norm")
    hidden = F.relu(F.linear(values[..., None], w["value_encoder.linear1.weight"], w["value_encoder.linear1.bias"]))
    value = F.linear(hidden, w["value_encoder.linear2.weight"], w["value_encoder.linear2.bias"])
    x = norm(gene + layer_norm(value, "value_encoder.norm"))
    states = [x]
    for i in range(3):
        layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=24, dropout=0.0, batch_first=True)
        prefix = f"transformer_encoder.layers.{i}."
        state = {k.removeprefix(prefix).replace("Wqkv.", "in_proj_"): v for k, v in w.items() if k.startswith(prefix)}
        layer.load_state_dict(state)
        x = layer.train()(x, src_key_padding_mask=~real)
        states.append(x)
    return [state.detach() for state in states], real


def without_empty(tokens: Tokens) -> Tokens:
    lengths = tokens.lengths[tokens.lengths > 0]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Tokens(offsets=offsets, gene_id=tokens.gene_id, value=tokens.value, is_special=tokens.is_special)


def test_every_site_equals_torchs_layers_on_padded_cells(
    write_checkpoint: Write, tiny_weights: Weights, tokenize: Callable[..., Tokens]
) -> None:
    model = load_model(write_checkpoint())
    tokens = without_empty(tokenize(model))
    states, real = by_torch(tiny_weights, tokens)
    found = model.activations(tokens, model.sites)
    for name, state in zip(["embedding", "layer.0", "layer.1", "layer.2"], states, strict=True):
        torch.testing.assert_close(found[Site.parse(name)], state[real], atol=1e-5, rtol=0)
    cls = states[-1][:, 0]
    expected = cls / cls.norm(dim=1, keepdim=True)
    torch.testing.assert_close(model.embed(tokens, readout="official"), expected, atol=1e-5, rtol=0)


def test_the_pretraining_loss_equals_a_plain_computation(
    write_checkpoint: Write, tiny_weights: Weights, tokenize: Callable[..., Tokens]
) -> None:
    model = load_model(write_checkpoint())
    assert isinstance(model, ScGPT)
    tokens = without_empty(tokenize(model))
    task = model.mask_genes(tokens, seed=1, fraction=0.4)
    assert (task.tokens.value[task.token_rows] == -1).all()
    assert not tokens.is_special[task.token_rows].any()
    w = tiny_weights
    states, real = by_torch(w, task.tokens)
    gene, cell = states[-1][real][task.token_rows], states[-1][torch.from_numpy(task.cell), 0]
    for i in (0, 2):
        gene = F.leaky_relu(F.linear(gene, w[f"decoder.fc.{i}.weight"], w[f"decoder.fc.{i}.bias"]))
    by_gene = F.linear(gene, w["decoder.fc.4.weight"], w["decoder.fc.4.bias"])[:, 0]
    ids = torch.from_numpy(task.gene_id)
    vector = F.layer_norm(
        w["encoder.embedding.weight"][ids], (16,), w["encoder.enc_norm.weight"], w["encoder.enc_norm.bias"]
    )
    query = torch.sigmoid(F.linear(vector, w["mvc_decoder.gene2query.weight"], w["mvc_decoder.gene2query.bias"]))
    by_cell = (F.linear(query, w["mvc_decoder.W.weight"]) * cell).sum(1)
    target = torch.from_numpy(task.target)
    expected = ((by_gene - target) ** 2 + (by_cell - target) ** 2).mean()
    assert model.pretraining_loss(tokens, seed=1).mean == pytest.approx(float(expected), rel=1e-5)


def test_no_token_attends_to_a_masked_query_gene(
    write_checkpoint: Write, tiny_weights: Weights, tokenize: Callable[..., Tokens]
) -> None:
    model = load_model(write_checkpoint(args={"objective": "query"}))
    tokens = tokenize(model)
    task = model.mask_genes(tokens, seed=1, fraction=0.4)
    assert task.is_query_only is not None
    seen: list[torch.Tensor] = []

    plain = model.pretraining_loss(tokens, seed=1, patches={"layer.2": lambda x, info: (seen.append(x), x)[1]})
    masked = set(zip(task.cell.tolist(), task.gene_id.tolist(), strict=True))

    def move_masked(x: torch.Tensor, info: object) -> torch.Tensor:
        pairs = zip(info.cell.tolist(), info.gene_id.tolist(), strict=True)  # type: ignore[attr-defined]
        is_masked = torch.tensor([pair in masked for pair in pairs])
        return torch.where(is_masked[:, None], x + 1, x)

    moved: list[torch.Tensor] = []
    patches = {"layer.0": move_masked, "layer.2": lambda x, info: (moved.append((x, info)), x)[1]}
    model.pretraining_loss(tokens, seed=1, patches=patches)
    assert np.isfinite(plain.mean)
    for before, (after, info) in zip(seen, moved, strict=True):
        pairs = zip(info.cell.tolist(), info.gene_id.tolist(), strict=True)
        is_masked = torch.tensor([pair in masked for pair in pairs])
        torch.testing.assert_close(before[~is_masked], after[~is_masked], atol=1e-6, rtol=0)
        assert not torch.allclose(before[is_masked], after[is_masked], atol=1e-3)


def test_the_mini_model_predicts_better_than_the_mean_of_a_cell() -> None:
    model = load_model("mini")
    assert isinstance(model, ScGPT)
    assert model.config.objective == "query"
    names = ["CD74", "HLA-DRA", "MS4A1", "CD79A", "ACTB", "RPLP0", "B2M", "TMSB4X", "EEF1A1", "CD37", "CD79B", "MALAT1"]
    counts = np.array([30, 22, 3, 4, 12, 9, 17, 20, 25, 2, 5, 60], dtype=np.float32)
    match = model.match_genes(names)
    tokens = model.tokenize(np.array([0, 12]), np.arange(12), counts, match, seed=0)
    losses = [model.pretraining_loss(tokens, seed=seed).mean for seed in range(8)]
    control = load_model("mini", random_init=True)
    random = [control.pretraining_loss(tokens, seed=seed).mean for seed in range(8)]
    assert np.mean(losses) < np.mean(random)


@pytest.mark.parametrize("norm", ["dsbn", "bn"])
def test_a_finetuned_checkpoint_normalises_its_input_by_the_batch(
    write_finetuned_scgpt: Write, tokenize: Callable[..., Tokens], norm: str
) -> None:
    folder = write_finetuned_scgpt(norm=norm)
    model = load_model(folder)
    w = torch.load(folder / "best_model.pt", weights_only=True)
    tokens = without_empty(tokenize(model))
    bn = "dsbn.bns.1." if norm == "dsbn" else "bn."

    def normalised(x: torch.Tensor) -> torch.Tensor:
        x = (x - w[bn + "running_mean"]) / torch.sqrt(w[bn + "running_var"] + 6.1e-5)
        return x * w[bn + "weight"] + w[bn + "bias"]

    states, real = by_torch(w, tokens, normalised)
    found = model.activations(tokens, ["embedding", "layer.2"])
    torch.testing.assert_close(found[Site.parse("embedding")], states[0][real], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[Site.parse("layer.2")], states[-1][real], atol=1e-5, rtol=0)
    assert model.ignored_weights == ("cls_decoder.out_layer.bias", "grad_reverse_discriminator.out_layer.bias")


def test_the_batch_enters_the_heads(write_finetuned_scgpt: Write, tokenize: Callable[..., Tokens]) -> None:
    one, two = (load_model(write_finetuned_scgpt(f"b{i}", batch_label=i, norm="bn")) for i in (0, 1))
    tokens = tokenize(one)
    assert torch.equal(one.embed(tokens).nan_to_num(), two.embed(tokens).nan_to_num())
    assert one.pretraining_loss(tokens).mean != two.pretraining_loss(tokens).mean


def test_a_checkpoint_with_batches_has_to_be_told_which(
    write_finetuned_scgpt: Write, tokenize: Callable[..., Tokens]
) -> None:
    with pytest.raises(CheckpointError, match=r"batch_label=obs:COLUMN.*batch_label=I .*0 to 2"):
        load_model(write_finetuned_scgpt("none", batch_label=None))
    with pytest.raises(CheckpointError, match="3 batches"):
        load_model(write_finetuned_scgpt("four", batch_label=4))
    heads_only = load_model(write_finetuned_scgpt("heads", batch_label=None, norm="bn"))
    tokens = tokenize(heads_only)
    assert heads_only.embed(tokens)[0].isfinite().all()
    with pytest.raises(ConfigError, match="3 batches"):
        heads_only.pretraining_loss(tokens)


def test_special_tokens_that_the_vocabulary_leaves_out_follow_its_genes(write_checkpoint: Write) -> None:
    folder = write_checkpoint()
    whole = load_model(folder)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({k: v for k, v in vocabulary.items() if k[0] != "<"}))
    assert load_model(folder).vocabulary.tokens == whole.vocabulary.tokens


def test_weights_saved_from_a_parallel_run_load_equal(write_checkpoint: Write, tiny_weights: Weights) -> None:
    parallel = load_model(write_checkpoint("a", weights={f"module.{k}": v for k, v in tiny_weights.items()}))
    assert all(torch.equal(parallel.state_dict()[key], value) for key, value in tiny_weights.items())


def test_the_real_vocabulary_is_that_of_the_human_model(scsae_data: Path) -> None:
    from sae_core.scfm.vocabulary import read_vocabulary

    path = scsae_data.parent / "vocab" / "scgpt" / "finetuned_model_vocab.json"
    if not path.is_file():
        pytest.skip(f"{path} is no file: the real vocabularies lie beside SCSAE_DATA")
    vocabulary = read_vocabulary(path)
    assert (len(vocabulary), vocabulary.n_genes) == (60697, 60694)
    assert [vocabulary.id_of(token) for token in ("<pad>", "<cls>", "<eoc>")] == [60694, 60695, 60696]


BATCHES = ["0", "2", "1", "1", "0", "2", "2", "0", "1", "0", "2", "1"]
"""The batch of each of the twelve cells."""


def test_the_batch_of_each_cell_normalises_its_input(
    write_finetuned_scgpt: Write, tokenize: Callable[..., Tokens]
) -> None:
    folder = write_finetuned_scgpt(batch_label=None)
    model = load_model(folder, options={"batch_label": "obs:run"})
    assert model.obs_columns == ("run",)
    w = torch.load(folder / "best_model.pt", weights_only=True)
    tokens = tokenize(model, obs={"run": BATCHES})
    label = torch.tensor([int(one) for one, n in zip(BATCHES, tokens.lengths, strict=True) if n])
    row = {name: torch.stack([w[f"dsbn.bns.{i}.{name}"] for i in label]) for name in ("weight", "bias")}
    row |= {name: torch.stack([w[f"dsbn.bns.{i}.{name}"] for i in label]) for name in ("running_mean", "running_var")}

    def normalised(x: torch.Tensor) -> torch.Tensor:
        mean, var, weight, bias = (row[name][:, None] for name in ("running_mean", "running_var", "weight", "bias"))
        return (x - mean) / torch.sqrt(var + 6.1e-5) * weight + bias

    plain = without_empty(tokens)
    ids = np.where(plain.is_special, model.vocabulary.id_of("<cls>"), plain.gene_id)
    direct = Tokens(offsets=plain.offsets, gene_id=ids, value=plain.value, is_special=plain.is_special)
    states, real = by_torch(w, direct, normalised)
    found = model.activations(tokens, ["embedding", "layer.2"])
    torch.testing.assert_close(found[Site.parse("embedding")], states[0][real], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[Site.parse("layer.2")], states[-1][real], atol=1e-5, rtol=0)


@pytest.mark.parametrize("norm", ["dsbn", "bn"])
def test_cells_of_several_batches_are_what_each_is_with_a_model_of_its_batch(
    write_finetuned_scgpt: Write, tokenize: Callable[..., Tokens], norm: str
) -> None:
    folder = write_finetuned_scgpt(norm=norm, batch_label=None)
    mixed = load_model(folder, options={"batch_label": "obs:run"})
    tokens = tokenize(mixed, obs={"run": BATCHES})
    activations = mixed.activations(tokens, ["layer.1"])[Site.parse("layer.1")]
    task = mixed.mask_genes(tokens, seed=3, fraction=0.3)
    error = mixed.pretraining_loss(tokens, seed=3).per_cell
    assert len(task.target) > 20
    for batch in range(3):
        alone = load_model(folder, options={"batch_label": str(batch)})
        own = np.flatnonzero(np.array(BATCHES) == str(batch))
        same = tokenize(alone)
        rows = tokens.rows(own)
        assert torch.equal(alone.activations(same, ["layer.1"])[Site.parse("layer.1")][rows], activations[rows])
        expected = alone.pretraining_loss(same, seed=3).per_cell[own]
        torch.testing.assert_close(error[own], expected, atol=1e-6, rtol=1e-6, equal_nan=True)
    assert len({load_model(folder, options={"batch_label": one}).digest for one in ("obs:run", "0", "1")}) == 3


def test_a_batch_that_the_tuning_did_not_have_is_refused(
    write_finetuned_scgpt: Write, write_checkpoint: Write, tokenize: Callable[..., Tokens]
) -> None:
    folder = write_finetuned_scgpt(batch_label=1)
    assert load_model(folder, options={"batch_label": "1"}).digest == load_model(folder).digest
    model = load_model(folder, options={"batch_label": "obs:run"})
    for bad in ("3", "", "lane 1", "-1"):
        with pytest.raises(TokenizationError, match=rf"batch_label '{bad}' .*allowed: a whole number from 0 to 2"):
            tokenize(model, obs={"run": [*BATCHES[:-1], bad]})
    with pytest.raises(ConfigError, match=r"batch_label was 'b1'; allowed: the number of a batch.*obs:COLUMN"):
        load_model(folder, options={"batch_label": "b1"})
    with pytest.raises(ConfigError, match="batch_label was 7, but the checkpoint has 3 batches"):
        load_model(write_finetuned_scgpt("heads", norm="bn"), options={"batch_label": "7"})
    for one in ("obs:run", "0"):
        with pytest.raises(ConfigError, match="batch_label was"):
            load_model(write_checkpoint(f"plain-{one[0]}"), options={"batch_label": one})


def test_zeros_of_all_genes_go_in_as_torch_computes_it(
    write_checkpoint: Write, tiny_weights: Weights, tokenize: Callable[..., Tokens], counts: sp.csr_matrix
) -> None:
    folder = write_checkpoint(args={"tie_break": "midpoint", "max_seq_len": 41})
    model = load_model(folder, options={"include_zeros": "true"})
    tokens = tokenize(model)
    has_any = counts.getnnz(axis=1) > 0
    assert tokens.lengths.tolist() == [41 if has else 0 for has in has_any]
    plain = tokenize(load_model(folder))
    values = tokens.value.reshape(-1, 41)
    assert (tokens.gene_id.reshape(-1, 41)[:, 1:] == np.arange(40)).all()
    assert (values[:, 0] == 0).all()
    assert values[values > 0].tolist() == plain.value[~plain.is_special].tolist()
    assert ((values[:, 1:] == 0) == (counts.toarray()[has_any] == 0)).all()
    states, real = by_torch(tiny_weights, without_empty(tokens))
    found = model.activations(tokens, ["layer.2"])[Site.parse("layer.2")]
    torch.testing.assert_close(found, states[-1][real], atol=1e-5, rtol=0)
    assert model.digest != load_model(folder).digest
    assert load_model(folder, options={"include_zeros": "false"}).digest == load_model(folder).digest
    with pytest.raises(ConfigError, match="include_zeros was 'yes'; allowed: true, false"):
        load_model(folder, options={"include_zeros": "yes"})


def test_a_sample_of_genes_with_zeros_does_not_depend_on_the_cells_beside(
    write_checkpoint: Write, tokenize: Callable[..., Tokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(write_checkpoint(args={"max_seq_len": 12}), options={"include_zeros": "true"})
    whole = tokenize(model)
    assert set(whole.lengths.tolist()) == {0, 12}
    assert (whole.value[~whole.is_special] == 0).any()
    monkeypatch.setattr("sae_core.scfm.scgpt.tokenizer._ZEROS_AT_A_TIME", 90)
    by_twos = tokenize(model)
    assert (by_twos.gene_id == whole.gene_id).all()
    assert (by_twos.value == whole.value).all()
