from __future__ import annotations

import argparse
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import nn

from sae_core.errors import CheckpointError, ConfigError, TokenizationError
from sae_core.scfm import GeneMatch, ScFoundation, Site, Tokens, load_model
from sae_core.scfm.scfoundation.decoder import Performer
from sae_core.scfm.scfoundation.files import read_gene_list
from sae_core.scfm.scfoundation.tokenizer import Resolution, ScFoundationTokenizer

Write = Callable[..., Path]
N_GENES, D = 40, 16
TARGET, SOURCE = N_GENES, N_GENES + 1


@pytest.fixture
def model(write_scfoundation: Write) -> ScFoundation:
    loaded = load_model(write_scfoundation())
    assert isinstance(loaded, ScFoundation)
    return loaded


def tokenize(rows: list[list[float]], **options: int) -> Tokens:
    x = sp.csr_matrix(np.array(rows, dtype=np.float32))
    n = x.shape[1]
    match = GeneMatch(token_id=np.array([2, 0, 5, 1][:n]), matched=np.array([True, True, False, True][:n]))
    return ScFoundationTokenizer(target_id=8, source_id=9)(x.indptr, x.indices, x.data, match, seed=0, **options)


def test_hand_computed_tokens() -> None:
    # columns are genes 2, 0, unknown, 1; matched counts 3 + 1 + 6 = 10
    tokens = tokenize([[3, 1, 90, 6], [0, 0, 7, 0], [0, 100, 0, 0]])
    np.testing.assert_array_equal(tokens.gene_id, [0, 1, 2, 8, 9, 0, 8, 9])
    expected = [math.log1p(1000), math.log1p(6000), math.log1p(3000), 4, 1, math.log1p(10000), 4, 2]
    np.testing.assert_allclose(tokens.value, expected, rtol=1e-6)
    np.testing.assert_array_equal(tokens.lengths, [5, 0, 3])
    np.testing.assert_array_equal(tokens.is_special, [False] * 3 + [True] * 2 + [False] + [True] * 2)


def test_a_sample_keeps_values_and_totals_of_the_whole_cell() -> None:
    whole, cut = tokenize([[3, 1, 90, 6]]), tokenize([[3, 1, 90, 6]], max_tokens=4)
    value_of = dict(zip(whole.gene_id.tolist(), whole.value.tolist(), strict=True))
    assert cut.n_tokens == 4
    assert cut.gene_id[-2:].tolist() == [8, 9]
    assert [value_of[g] for g in cut.gene_id.tolist()] == cut.value.tolist()
    with pytest.raises(ConfigError, match="2; allowed: 3"):
        tokenize([[3, 1, 90, 6]], max_tokens=2)


def test_chosen_genes_keep_values_and_totals_of_the_whole_cell() -> None:
    x = sp.csr_matrix(np.array([[3, 1, 90, 6]], dtype=np.float32))
    match = GeneMatch(token_id=np.arange(4, dtype=np.int64), matched=np.ones(4, dtype=bool))
    tokenizer = ScFoundationTokenizer(target_id=4, source_id=5)
    whole, some = (tokenizer(x.indptr, x.indices, x.data, one, seed=0) for one in (match, match.only(np.array([3, 1]))))
    np.testing.assert_array_equal(some.gene_id, [1, 3, 4, 5])
    np.testing.assert_array_equal(some.value, whole.value[[1, 3, 4, 5]])


def test_normalised_values_that_hide_the_read_depth_are_refused() -> None:
    with pytest.raises(TokenizationError, match=r"0\.3, 1\.7.*--matrix"):
        tokenize([[0.3, 1.7, 0.52, 2.2]])
    with pytest.raises(TokenizationError, match=r"1\.7.*--matrix"):
        tokenize([[0.0, 1.7, 0.0, 0.0]])


def weights_of(folder: Path, part: str = "cell") -> dict[str, torch.Tensor]:
    content = torch.load(folder / "models.ckpt", weights_only=True)
    return {key.removeprefix("model."): value for key, value in content[part]["state_dict"].items()}


def by_torch(w: dict[str, torch.Tensor], gene_id: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
    """Embedding, output of each stock layer and of the final norm, for one cell, from the file's own weights."""
    hidden = F.leaky_relu(value[:, None] @ w["token_emb.mlp.weight"].T + w["token_emb.mlp.bias"], 0.1)
    scores = 0.7 * hidden + hidden @ w["token_emb.mlp2.weight"].T + w["token_emb.mlp2.bias"]
    weight = scores.exp() / scores.exp().sum(1, keepdim=True)
    x = (weight @ w["token_emb.emb.weight"] + w["pos_emb.weight"][gene_id])[None]
    states = [x]
    for i in range(3):
        prefix = f"encoder.transformer_encoder.{i}."
        layer = nn.TransformerEncoderLayer(D, 2, dim_feedforward=4 * D, dropout=0.0, batch_first=True)
        layer.load_state_dict({k.removeprefix(prefix): v for k, v in w.items() if k.startswith(prefix)})
        x = layer.train()(x)
        states.append(x)
    states.append(F.layer_norm(x, (D,), w["encoder.norm.weight"], w["encoder.norm.bias"]))
    return [state[0].detach() for state in states]


def test_every_layer_and_the_cell_embedding_equal_torchs_layers(
    write_scfoundation: Write, counts: sp.csr_matrix, tokenize: Callable[..., Tokens]
) -> None:
    folder = write_scfoundation()
    model, w = load_model(folder), weights_of(folder)
    tokens = tokenize(model)
    found = model.activations(tokens, model.sites)
    embedded = model.embed(tokens, readout="all")
    assert embedded.shape == (12, 4 * D)
    for cell in np.flatnonzero(tokens.lengths):
        here = slice(*tokens.offsets[cell : cell + 2])
        states = by_torch(w, torch.from_numpy(tokens.gene_id[here]), torch.from_numpy(tokens.value[here]))
        names = ["embedding", "layer.0", "layer.1", "layer.2", "final"]
        for name, state in zip(names, states, strict=True):
            torch.testing.assert_close(found[Site.parse(name)][here], state, atol=1e-5, rtol=0)
        last = states[-1]
        parts = [last[-1], last[-2], last[:-2].max(0).values, last[:-2].mean(0)]
        torch.testing.assert_close(embedded[cell], torch.cat(parts), atol=1e-5, rtol=0)
    for i, readout in enumerate(("source", "target", "max", "mean")):
        part = model.embed(tokens, readout=readout)
        torch.testing.assert_close(part, embedded[:, i * D : (i + 1) * D], equal_nan=True)


def test_values_of_padding_and_of_hidden_genes_have_their_own_vectors(model: ScFoundation) -> None:
    # the data set's config lies over the model's: 103 and 102, not 5 and 6
    x = model.token_emb(torch.tensor([103.0, 102.0, 5.0]))
    assert torch.equal(x[0], model.token_emb.emb_pad.weight[0])
    assert torch.equal(x[1], model.token_emb.emb_mask.weight[0])
    assert not torch.equal(x[2], x[0])


def performer_by_hand(w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """FAVOR+ with the kernel matrix written out: n x n weights instead of products of features."""

    def features(v: torch.Tensor, p: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
        v = v / p.shape[1] ** 0.25
        return (torch.exp(v @ p.T - v.pow(2).sum(-1, keepdim=True) / 2 - top) + 1e-4) / p.shape[0] ** 0.5

    for i in range(2):
        a, b = f"decoder.performer.net.layers.{i}.0.", f"decoder.performer.net.layers.{i}.1."
        h = F.layer_norm(x, (8,), w[a + "norm.weight"], w[a + "norm.bias"])
        q, k, v = (F.linear(h, w[f"{a}fn.to_{n}.weight"], w[f"{a}fn.to_{n}.bias"]) for n in "qkv")
        p = w[a + "fn.fast_attention.projection_matrix"]
        top = torch.stack([k[:, s] / 4**0.25 @ p.T for s in (slice(0, 4), slice(4, 8))]).max()
        heads = []
        for s in (slice(0, 4), slice(4, 8)):
            along = (q[:, s] / 4**0.25 @ p.T).max(1, keepdim=True).values
            kernel = features(q[:, s], p, along) @ features(k[:, s], p, top).T
            heads.append(kernel / kernel.sum(1, keepdim=True) @ v[:, s])
        x = x + F.linear(torch.cat(heads, 1), w[a + "fn.to_out.weight"], w[a + "fn.to_out.bias"])
        h = F.layer_norm(x, (8,), w[b + "norm.weight"], w[b + "norm.bias"])
        h = F.gelu(F.linear(h, w[b + "fn.fn.w1.weight"], w[b + "fn.fn.w1.bias"]))
        x = x + F.linear(h, w[b + "fn.fn.w2.weight"], w[b + "fn.fn.w2.bias"])
    return F.layer_norm(x, (8,), w["decoder.norm.weight"], w["decoder.norm.bias"])


def test_the_decoder_equals_attention_by_the_written_out_kernel(write_scfoundation: Write) -> None:
    folder = write_scfoundation()
    model, w = load_model(folder), weights_of(folder)
    assert isinstance(model, ScFoundation)
    assert isinstance(model.decoder, Performer)
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.decoder(x), performer_by_hand(w, x), atol=1e-5, rtol=1e-5)


def test_the_pretraining_loss_equals_a_plain_computation(
    write_scfoundation: Write, tokenize: Callable[..., Tokens]
) -> None:
    folder = write_scfoundation()
    model, w = load_model(folder), weights_of(folder)
    assert isinstance(model, ScFoundation)
    tokens = tokenize(model)
    task = model.mask_genes(tokens, seed=2, fraction=0.3)
    unmasked = task.tokens
    assert not set(zip(task.cell.tolist(), task.gene_id.tolist(), strict=True)) & set(
        zip(unmasked.cell_of_token().tolist(), unmasked.gene_id.tolist(), strict=True)
    )
    loss = model.pretraining_loss(tokens, seed=2)
    for cell in np.unique(task.cell):
        here = slice(*unmasked.offsets[cell : cell + 2])
        ids = torch.from_numpy(unmasked.gene_id[here])
        encoded = by_torch(w, ids, torch.from_numpy(unmasked.value[here]))[-1]
        full = model.token_emb(torch.zeros(N_GENES + 2)).detach().clone()
        masked = torch.from_numpy(task.gene_id[task.cell == cell])
        full[masked] = w["token_emb.emb_mask.weight"]
        full[ids] = encoded
        full = F.linear(full + w["pos_emb.weight"][: N_GENES + 2], w["decoder_embed.weight"], w["decoder_embed.bias"])
        out = F.layer_norm(performer_by_hand(w, full), (8,), w["norm.weight"], w["norm.bias"])
        predicted = F.linear(out, w["to_final.weight"], w["to_final.bias"])[masked, 0]
        target = torch.from_numpy(task.target[task.cell == cell])
        assert float(loss.per_cell[cell]) == pytest.approx(float(((predicted - target) ** 2).mean()), rel=1e-4)


def test_the_path_names_a_part_and_the_folder_alone_is_cell(write_scfoundation: Write) -> None:
    folder = write_scfoundation()
    models = {part: load_model(folder / part) for part in ("cell", "rde", "gene")}
    alone = load_model(folder)
    key = "pos_emb.weight"
    assert torch.equal(alone.state_dict()[key], models["cell"].state_dict()[key])
    assert alone.digest == models["cell"].digest
    assert len({model.digest for model in models.values()}) == 3
    assert not torch.equal(models["rde"].state_dict()[key], models["gene"].state_dict()[key])
    assert models["rde"].name == "rde"
    only = write_scfoundation("only", parts=("rde",))
    assert torch.equal(load_model(only).state_dict()[key], models["rde"].state_dict()[key])
    with pytest.raises(CheckpointError, match=r"'cell'.*rde"):
        load_model(only / "cell")


@pytest.mark.parametrize("key", ["pos_emb.weight", "encoder.norm.bias", "to_final.weight"])
def test_a_missing_weight_is_named(write_scfoundation: Write, key: str) -> None:
    with pytest.raises(CheckpointError, match=f"missing model.{key}"):
        load_model(write_scfoundation(edit=lambda w: {k: v for k, v in w.items() if k != key}))


def test_an_unexpected_weight_is_named(write_scfoundation: Write) -> None:
    extra = {"encoder.transformer_encoder.3.linear1.bias": torch.zeros(64)}
    with pytest.raises(CheckpointError, match=r"unexpected model\.encoder\.transformer_encoder\.3\.linear1\.bias"):
        load_model(write_scfoundation(edit=lambda w: w | extra))


def test_a_checkpoint_without_its_decoder_has_activations_but_no_loss(
    write_scfoundation: Write, tokenize: Callable[..., Tokens]
) -> None:
    heads = ("decoder", "norm.", "to_final")
    model = load_model(write_scfoundation(edit=lambda w: {k: v for k, v in w.items() if not k.startswith(heads)}))
    tokens = tokenize(model)
    assert model.embed(tokens)[0].isfinite().all()
    with pytest.raises(ConfigError, match=r"scfoundation.*decoder"):
        model.pretraining_loss(tokens)


def test_another_encoder_and_a_lacking_setting_are_refused(write_scfoundation: Write) -> None:
    with pytest.raises(CheckpointError, match=r"'performer'.*'transformer'"):
        load_model(write_scfoundation("other", config={"encoder": {"module_type": "performer"}}))
    folder = write_scfoundation("lacking")
    content = torch.load(folder / "models.ckpt", weights_only=True)
    del content["cell"]["config"]["model_config"]["mae_autobin"]["bin_alpha"]
    torch.save(content, folder / "models.ckpt")
    with pytest.raises(CheckpointError, match="bin_alpha"):
        load_model(folder)


def test_a_missing_or_wrong_gene_list_is_named(write_scfoundation: Write) -> None:
    folder = write_scfoundation()
    path = folder / "OS_scRNA_gene_index.19264.tsv"
    text = path.read_text()
    path.write_text(text.replace("GENE39\t39\n", ""))
    with pytest.raises(CheckpointError, match=r"19264\.tsv.* 39 .* 40"):
        load_model(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"OS_scRNA_gene_index\.19264\.tsv"):
        load_model(folder)
    (folder.parent / "OS_scRNA_gene_index.19264.tsv").write_text(text)
    assert load_model(folder).vocabulary.n_genes == N_GENES


def test_a_gene_list_of_another_size_is_refused_with_both_numbers(write_scfoundation: Write, scsae_data: Path) -> None:
    folder = write_scfoundation()
    official = scsae_data.parent / "vocab" / "scfoundation" / "OS_scRNA_gene_index.19264.tsv"
    path = folder / official.name
    path.write_text(official.read_text())
    with pytest.raises(CheckpointError, match=r"19264 genes.* 40 genes.*OS_scRNA"):
        load_model(folder)
    lines = official.read_text().splitlines()
    names = [line.split("\t")[0] for line in lines[1:]]
    for wrong in (sorted(names, reverse=True), [names[1], names[0], *names[2:]]):
        path.write_text("gene_name\tindex\n" + "".join(f"{name}\t{i}\n" for i, name in enumerate(wrong)))
        with pytest.raises(CheckpointError, match=r"19264 genes of the official list with other indices"):
            read_gene_list(path, n_genes=19264)
    path.write_text("gene_name\tindex\nA\t0\nA\t1\n")
    with pytest.raises(CheckpointError, match=r"1 genes twice"):
        read_gene_list(path, n_genes=2)


def test_rows_of_pos_emb_and_the_config_must_agree(write_scfoundation: Write) -> None:
    longer = write_scfoundation(edit=lambda w: w | {"pos_emb.weight": torch.zeros(N_GENES + 5, D)})
    with pytest.raises(CheckpointError, match=r"45 rows.*seq_len 42.*43"):
        load_model(longer)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("t4", [4.0, 4.0]),
        ("t4.5", [4.5, 4.5]),
        ("a5", [6.0, 7.0]),
        ("a-0.5", [0.5, 1.5]),
        ("f1", [1.0, 2.0]),
        ("f20", [math.log10(200), math.log10(2000)]),
    ],
)
def test_the_resolution_is_a_target_an_addition_or_a_factor(text: str, expected: list[float]) -> None:
    # as the authors' script has it: t T, a log10(total) + a, f log10(total * f); the totals are 10 and 100
    x = sp.csr_matrix(np.array([[3, 1, 90, 6], [0, 100, 0, 0]], dtype=np.float32))
    match = GeneMatch(token_id=np.array([2, 0, 5, 1]), matched=np.array([True, True, False, True]))
    resolution = Resolution.parse(text)
    made = ScFoundationTokenizer(target_id=8, source_id=9, resolution=resolution)
    tokens = made(x.indptr, x.indices, x.data, match, seed=0)
    np.testing.assert_allclose(tokens.value[tokens.gene_id == 8], expected, rtol=1e-6)
    np.testing.assert_allclose(tokens.value[tokens.gene_id == 9], [1, 2], rtol=1e-6)
    assert Resolution.parse(str(resolution)) == resolution


@pytest.mark.parametrize("text", ["", "4", "t", "t0", "t-1", "tfour", "f0", "f-1", "anan", "tinf", "x4"])
def test_another_resolution_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"allowed: t .*t4.*f1"):
        Resolution.parse(text)


def test_parts_and_resolutions_are_options_that_change_the_digest(write_scfoundation: Write, tmp_path: Path) -> None:
    folder = write_scfoundation()
    by_path, by_option = load_model(folder / "rde"), load_model(folder, options={"part": "rde"})
    assert by_path.digest == by_option.digest
    deeper = load_model(folder, options={"part": "rde", "resolution": "t4.5"})
    assert isinstance(deeper, ScFoundation)
    assert deeper.tokenizer.resolution == Resolution("t", 4.5)
    assert load_model(folder, options={"resolution": "t4.0"}).digest == load_model(folder).digest
    assert len({by_path.digest, deeper.digest, load_model(folder).digest}) == 3
    assert "t4.5" in " ".join(deeper.notes)
    with pytest.raises(CheckpointError, match=r"'rde'.*'gene'"):
        load_model(folder / "rde", options={"part": "gene"})
    with pytest.raises(ConfigError, match=r"dictionaries.*scfoundation.*geneformer"):
        load_model(folder, options={"dictionaries": tmp_path})
    with pytest.raises(ConfigError, match=r"part.*scgpt.*scfoundation"):
        load_model("mini", options={"part": "rde"})


def test_a_file_of_one_model_has_no_parts(write_scfoundation: Write) -> None:
    folder = write_scfoundation()
    content = torch.load(folder / "models.ckpt", weights_only=True)
    expected = load_model(folder, options={"part": "rde"}).state_dict()
    for path in (folder / "mine.ckpt", folder / "models.ckpt"):
        torch.save(content["rde"], path)
        for given in (path, folder) if path.name == "models.ckpt" else (path,):
            state = load_model(given).state_dict()
            assert all(torch.equal(state[key], value) for key, value in expected.items())
    with pytest.raises(CheckpointError, match=r"no part 'rde'"):
        load_model(folder, options={"part": "rde"})


class _Settings(dict[str, object]):
    """A config of some other package: a dictionary with attributes."""


def test_paths_numpy_scalars_and_other_dictionaries_in_the_config_are_read(write_scfoundation: Write) -> None:
    folder = write_scfoundation()
    content = torch.load(folder / "models.ckpt", weights_only=True)
    expected = load_model(folder).state_dict()
    for part in content.values():
        config = part["config"]
        sizes = config["model_config"]["mae_autobin"]
        sizes |= {"bin_num": np.int64(sizes["bin_num"]), "bin_alpha": np.float32(0.7), "save": Path("/data/runs")}
        sizes["encoder"] = _Settings(sizes["encoder"])
        part["config"] = _Settings(config, logger=argparse.Namespace(level=1), device=torch.device("cuda:0"))
        part["state_dict"] = OrderedDict(part["state_dict"])
    torch.save(content, folder / "models.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(folder / "models.ckpt", weights_only=True)
    state = load_model(folder).state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    ("name", "value"),
    [("seq_len", "many"), ("bin_num", [7]), ("bin_alpha", {}), ("encoder", 3), ("pad_token_id", None)],
)
def test_a_setting_of_another_kind_is_named(write_scfoundation: Write, name: str, value: object) -> None:
    folder = write_scfoundation()
    content = torch.load(folder / "models.ckpt", weights_only=True)
    content["cell"]["config"]["model_config"]["mae_autobin"] |= {name: value}
    content["cell"]["config"]["dataset_config"]["rnaseq"].pop(name, None)
    torch.save(content, folder / "models.ckpt")
    with pytest.raises(CheckpointError, match=name):
        load_model(folder)


def test_gene_embeddings_are_the_decoders_vectors_of_all_genes(
    write_scfoundation: Write, tokenize: Callable[..., Tokens]
) -> None:
    folder = write_scfoundation()
    model, w = load_model(folder, options={"part": "gene"}), weights_of(folder, "gene")
    assert isinstance(model, ScFoundation)
    tokens = tokenize(model)
    found = model.gene_embeddings(tokens)
    assert found.shape == (12, N_GENES, 8)
    assert found[tokens.lengths == 0].isnan().all()
    here = slice(*tokens.offsets[4:6])
    ids = torch.from_numpy(tokens.gene_id[here])
    full = model.token_emb(torch.zeros(N_GENES + 2)).detach().clone()
    full[ids] = by_torch(w, ids, torch.from_numpy(tokens.value[here]))[-1]
    full = F.linear(full + w["pos_emb.weight"][: N_GENES + 2], w["decoder_embed.weight"], w["decoder_embed.bias"])
    expected = F.layer_norm(performer_by_hand(w, full), (8,), w["norm.weight"], w["norm.bias"])[:N_GENES]
    torch.testing.assert_close(found[4], expected, atol=1e-5, rtol=1e-5)


def test_the_real_gene_list_is_read(scsae_data: Path) -> None:
    path = scsae_data.parent / "vocab" / "scfoundation" / "OS_scRNA_gene_index.19264.tsv"
    if not path.is_file():
        pytest.skip(f"{path} is no file: the real vocabularies lie beside SCSAE_DATA")
    vocabulary = read_gene_list(path, n_genes=19264)
    assert (vocabulary.n_genes, len(vocabulary)) == (19264, 19266)
    assert vocabulary.tokens[0] == "A1BG"
    assert vocabulary.id_of("<S>") == 19265
    assert vocabulary.match(["CD3D", "MS4A1", "LYZ"]).n_matched == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 228232\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"gene_name\tindex\nGENE\xff\t0\n", "cannot read"),
    ],
)
def test_a_gene_list_that_is_none_is_recognised(
    write_scfoundation: Callable[..., Path], content: bytes, message: str
) -> None:
    folder = write_scfoundation()
    (folder / "OS_scRNA_gene_index.19264.tsv").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"OS_scRNA_gene_index\.19264\.tsv.*{message}|{message}.*19264\.tsv"):
        load_model(folder)


def test_an_ensembl_id_that_leads_to_no_name_is_refused(write_scfoundation: Callable[..., Path]) -> None:
    folder = write_scfoundation()
    (folder / "vocab_ensembl.json").write_text('{"ENSG1": 5}')
    with pytest.raises(CheckpointError, match=r"vocab_ensembl\.json has 'ENSG1': 5"):
        load_model(folder)
