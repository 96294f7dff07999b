"""Every weight of an official file is read or named, by every family: names, unknown heads, weights changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import KINDS, write_tiny

from sae_core.errors import CheckpointError
from sae_core.scfm import UCE, load_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

Weights = dict[str, torch.Tensor]
BOTH = ("weight", "bias")


def weights_in(content: Any) -> list[Weights]:
    """Every state dict inside the content of a weights file."""
    if not isinstance(content, dict):
        return []
    if "state_dict" in content:
        return weights_in(content["state_dict"])
    if content and all(isinstance(value, torch.Tensor) for value in content.values()):
        return [content]
    return [found for value in content.values() for found in weights_in(value)]


def weights_file(folder: Path) -> Path:
    """The one file of weights in a folder."""
    (file,) = [f for f in folder.iterdir() if f.suffix in {".safetensors", ".pt", ".torch", ".ckpt"}]
    return file


def edit_weights(folder: Path, edit: Callable[[Weights], None]) -> None:
    """Change every state dict of the weights file of a folder in place."""
    file = weights_file(folder)
    if file.suffix == ".safetensors":
        weights = load_file(file)
        edit(weights)
        save_file(weights, file)
        return
    content = torch.load(file, weights_only=True)
    found = weights_in(content)
    assert found, f"{file.name} holds no weights"
    for weights in found:
        edit(weights)
    torch.save(content, file)


def names_in(folder: Path) -> set[str]:
    """The names of all weights of a folder."""
    names: set[str] = set()
    edit_weights(folder, names.update)
    return names


def state_of(folder: Path) -> Weights:
    """What the network of a folder took from its weights file."""
    model = load_model(folder)
    table = {"table": model.table.rows} if isinstance(model, UCE) else {}
    return {name: value.clone() for name, value in (model.state_dict() | table).items()}


def tensors(names: Iterable[str]) -> set[str]:
    """Weight and bias of each layer."""
    return {f"{name}.{which}" for name in names for which in BOTH}


def scgpt_names(n_layers: int) -> set[str]:
    """The names in `best_model.pt` of the whole-human scGPT, in the naming of flash attention."""
    parts = ("self_attn.Wqkv", "self_attn.out_proj", "linear1", "linear2", "norm1", "norm2")
    layers = {f"transformer_encoder.layers.{i}.{part}" for i in range(n_layers) for part in parts}
    embedding = {"encoder.enc_norm", "value_encoder.linear1", "value_encoder.linear2", "value_encoder.norm"}
    heads = {"decoder.fc.0", "decoder.fc.2", "decoder.fc.4", "mvc_decoder.gene2query"}
    return tensors(layers | embedding | heads) | {"encoder.embedding.weight", "mvc_decoder.W.weight"}


def geneformer_names(n_layers: int) -> set[str]:
    """The names in the file of a `BertForMaskedLM` whose decoder is tied, and therefore absent."""
    attention = tuple(f"attention.{part}" for part in ("self.query", "self.key", "self.value", "output.dense"))
    parts = (*attention, "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm")
    layers = {f"bert.encoder.layer.{i}.{part}" for i in range(n_layers) for part in parts}
    head = {"cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"}
    tables = {f"bert.embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type")}
    return tensors(layers | head | {"bert.embeddings.LayerNorm"}) | tables | {"cls.predictions.bias"}


def scfoundation_names(n_layers: int, n_decoder_layers: int) -> set[str]:
    """The names in a part of `models.ckpt`, an encoder of stock layers and a Performer as the decoder."""
    parts = ("self_attn.out_proj", "linear1", "linear2", "norm1", "norm2")
    names = {f"encoder.transformer_encoder.{i}.{part}" for i in range(n_layers) for part in parts}
    performer = ("0.norm", "1.norm", "1.fn.fn.w1", "1.fn.fn.w2", *(f"0.fn.to_{to}" for to in ("q", "k", "v", "out")))
    layers = [f"decoder.performer.net.layers.{i}" for i in range(n_decoder_layers)]
    names |= {f"{layer}.{part}" for layer in layers for part in performer}
    names |= {"token_emb.mlp", "token_emb.mlp2", "encoder.norm", "decoder.norm", "norm", "decoder_embed", "to_final"}
    tables = {f"token_emb.{name}.weight" for name in ("emb", "emb_mask", "emb_pad")} | {"pos_emb.weight"}
    joined = {f"encoder.transformer_encoder.{i}.self_attn.in_proj_{b}" for i in range(n_layers) for b in BOTH}
    buffers = {f"{layer}.0.fn.fast_attention.projection_matrix" for layer in layers}
    buffers |= {"decoder.performer.calls_since_last_redraw"}
    return {f"model.{name}" for name in tensors(names) | tables | joined | buffers}


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("scgpt", scgpt_names(3)),
        ("geneformer-v1", geneformer_names(3)),
        ("geneformer-v2", geneformer_names(3)),
        ("scfoundation", scfoundation_names(3, 2)),
    ],
)
def test_the_names_of_an_official_file_are_these_and_all_are_read(tmp_path: Path, kind: str, names: set[str]) -> None:
    folder = write_tiny(tmp_path, kind)
    assert names_in(folder) == names
    assert load_model(folder).ignored_weights == ()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_of_the_file_changes_the_network_or_is_named_as_unread(tmp_path: Path, kind: str) -> None:
    folder = write_tiny(tmp_path, kind)
    unread, original = set(load_model(folder).ignored_weights), state_of(folder)
    file = weights_file(folder)
    content, wrong = file.read_bytes(), []
    for name in sorted(names_in(folder)):

        def add_one(weights: Weights, name: str = name) -> None:
            if name in weights:
                weights[name] = weights[name] + 1

        edit_weights(folder, add_one)
        try:
            changed = state_of(folder)
            is_read = any(not torch.equal(value, original[own]) for own, value in changed.items())
        except CheckpointError:  # because another weight has to be equal to it
            is_read = True
        file.write_bytes(content)
        if is_read == (name in unread or name.endswith(tuple(f".{other}" for other in unread))):
            wrong.append(name)
    assert not wrong


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_head_does_not_block_reading_and_is_named(tmp_path: Path, kind: str) -> None:
    folder = write_tiny(tmp_path, kind)
    before = set(load_model(folder).ignored_weights)
    prefix = "model." if kind == "scfoundation" else ""
    head = {f"{prefix}cell_state_head.{part}": torch.ones(4, 3) for part in ("0.weight", "2.weight")}
    edit_weights(folder, lambda weights: weights.update(head))
    model = load_model(folder)
    assert len(set(model.ignored_weights) - before) == 2
    assert all("cell_state_head" in name for name in set(model.ignored_weights) - before)
    assert any("cell_state_head" in note for note in model.notes), model.notes
