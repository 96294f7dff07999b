"""Tiny checkpoints of every family with random weights, in their official layouts; SYMBOLS are their genes."""

from __future__ import annotations

import functools
import json
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from tiny_aido_cell import write_aido_cell
from tiny_tahoe import write_tahoe
from tiny_transcriptformer import write_transcriptformer
from tiny_uce import write_uce

from sae_core.scfm import ScGPT, ScGPTConfig, Vocabulary
from sae_core.scfm.scgpt.network import init_weights

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

N_GENES = 40
SYMBOLS = [f"GENE{i}" for i in range(N_GENES)]
TINY_ARGS = {"nlayers": 3, "nheads": 2, "embsize": 16, "d_hid": 24, "n_bins": 51, "max_seq_len": 32}
TINY_ARGS |= {"pad_value": -2, "mask_value": -1, "input_emb_style": "continuous", "dropout": 0.2, "n_layers_cls": 3}


@functools.cache
def tiny_weights() -> dict[str, torch.Tensor]:
    """The weights of the scGPT checkpoint; do not write to them."""
    tokens = (*SYMBOLS, "<pad>", "<cls>", "<eoc>")
    config = ScGPTConfig.from_args(TINY_ARGS)
    model = ScGPT.empty(config, Vocabulary(tokens=tokens), n_tokens=len(tokens))
    init_weights(model, seed=3)
    return {key: value.clone() for key, value in model.state_dict().items()}


def write_scgpt(
    parent: Path,
    name: str = "tiny",
    *,
    args: dict[str, Any] | None = None,
    weights: dict[str, torch.Tensor] | None = None,
    file: str = "best_model.pt",
) -> Path:
    """Write a folder of scGPT: `args` replace entries of args.json, `weights` the tensors, `file` names their file."""
    folder = parent / name
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps(TINY_ARGS | (args or {})))
    vocabulary = {token: i for i, token in enumerate([*SYMBOLS, "<pad>", "<cls>", "<eoc>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    weights = tiny_weights() if weights is None else weights
    if file.endswith(".pt"):
        torch.save(weights, folder / file)
    else:
        save_file(weights, folder / file)
    return folder


def write_finetuned_scgpt(
    parent: Path, name: str = "finetuned", *, batch_label: int | None = 1, norm: str = "dsbn"
) -> Path:
    """An scGPT checkpoint with three batches, a norm per batch, a classifier and an adversarial head."""
    d = TINY_ARGS["embsize"]
    weights = dict(tiny_weights())
    for i in range(3):
        bn = f"dsbn.bns.{i}." if norm == "dsbn" else "bn."
        weights |= {bn + "running_mean": draw(bn + "m", d), bn + "running_var": draw(bn + "v", d).abs() + 0.5}
        weights |= {bn + "weight": draw(bn + "w", d) + 1, bn + "bias": draw(bn + "b", d)}
        weights |= {bn + "num_batches_tracked": torch.tensor(7)}
    weights |= {"batch_encoder.embedding.weight": draw("batches", 3, d)}
    weights |= {"batch_encoder.enc_norm.weight": draw("bw", d) + 1, "batch_encoder.enc_norm.bias": draw("bb", d)}
    weights |= {"decoder.fc.0.weight": draw("wide", d, 2 * d), "mvc_decoder.W.weight": draw("mvc", 2 * d, d)}
    weights |= {"cls_decoder.out_layer.bias": torch.zeros(4)}
    weights |= {"grad_reverse_discriminator.out_layer.bias": torch.zeros(3)}
    args = {"DSBN": True} | ({} if batch_label is None else {"batch_label": batch_label})
    return write_scgpt(parent, name, args=args, weights=weights)


def ensembl(i: int) -> str:
    return f"ENSG{i + 1:011d}"


def draw(name: str, *shape: int, scale: float = 0.25) -> torch.Tensor:
    """A normal tensor seeded by its name, so that a weight does not depend on the others."""
    seed = sum(map(ord, name)) * 131 + len(shape)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def write_geneformer(
    parent: Path,
    name: str = "geneformer",
    *,
    version: int = 2,
    edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
    dictionaries: str = ".",
    config: dict[str, Any] | None = None,
    file: str = "model.safetensors",
) -> Path:
    """A Hugging Face folder and its dictionaries as pickles; `version` 2 has <cls>, <eos> and a mapping."""
    special = ["<pad>", "<mask>", "<cls>", "<eos>"][: 2 * version]
    n_tokens, d, hidden, positions = len(special) + N_GENES, 16, 24, 30
    settings: dict[str, Any] = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_act": "relu"}
    settings |= {"hidden_size": d, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": hidden}
    settings |= {"vocab_size": n_tokens, "max_position_embeddings": positions, "layer_norm_eps": 1e-12}
    shapes = {"bert.embeddings.word_embeddings.weight": (n_tokens, d)}
    shapes |= {"bert.embeddings.position_embeddings.weight": (positions, d)}
    shapes |= {"bert.embeddings.token_type_embeddings.weight": (2, d)}
    shapes |= norm_shapes("bert.embeddings.LayerNorm", d)
    for i in range(3):
        layer = f"bert.encoder.layer.{i}."
        for part in (
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
        ):
            shapes |= {f"{layer}{part}.weight": (d, d), f"{layer}{part}.bias": (d,)}
        shapes |= norm_shapes(f"{layer}attention.output.LayerNorm", d) | norm_shapes(f"{layer}output.LayerNorm", d)
        shapes |= {f"{layer}intermediate.dense.weight": (hidden, d), f"{layer}intermediate.dense.bias": (hidden,)}
        shapes |= {f"{layer}output.dense.weight": (d, hidden), f"{layer}output.dense.bias": (d,)}
    head = "cls.predictions."
    shapes |= {f"{head}bias": (n_tokens,), f"{head}transform.dense.weight": (d, d)}
    shapes |= {f"{head}transform.dense.bias": (d,), **norm_shapes(f"{head}transform.LayerNorm", d)}
    weights = {key: draw(key, *shape) + (1.0 if is_norm(key) else 0.0) for key, shape in shapes.items()}
    folder = parent / name
    folder.mkdir(parents=True)
    place = folder / dictionaries
    place.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings | (config or {})))
    weights = edit(weights) if edit else weights
    if file.endswith(".bin"):
        torch.save(weights, folder / file)
    else:
        save_file(weights, folder / file)
    tokens = {token: i for i, token in enumerate([*special, *map(ensembl, range(N_GENES))])}
    # numpy scalars, as in the official files
    medians = {ensembl(i): np.float64(1 + i % 3) for i in range(N_GENES)}
    names = {symbol: ensembl(i) for i, symbol in enumerate(SYMBOLS)}
    tail = {1: "gc30M", 2: "gc104M"}[version]
    found: dict[str, Any] = {"token_dictionary": {k: np.int64(v) for k, v in tokens.items()}}
    found |= {"gene_median_dictionary": medians, "gene_name_id_dict": names}
    if version == 2:
        current = {name.upper(): gene for name, gene in names.items()} | {gene: gene for gene in names.values()}
        found["ensembl_mapping_dict"] = current | {"ENSG99999999999": ensembl(0), "OLDNAME": ensembl(1)}
    for kind, content in found.items():
        (place / f"{kind}_{tail}.pkl").write_bytes(pickle.dumps(content))
    return folder


def norm_shapes(name: str, d: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (d,), f"{name}.bias": (d,)}


def is_norm(key: str) -> bool:
    return "norm" in key.lower() and key.endswith("weight")


def write_scfoundation(
    parent: Path,
    name: str = "scfoundation",
    *,
    edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
    parts: tuple[str, ...] = ("cell", "rde", "gene"),
    config: dict[str, Any] | None = None,
) -> Path:
    """`models.ckpt` with its three parts, a Performer decoder included, and the gene list."""
    d, bins, decoder_d, d_head = 16, 7, 8, 4
    encoder = {"module_type": "transformer", "hidden_dim": d, "depth": 3, "heads": 2, "dim_head": 8}
    decoder = {"module_type": "performer", "hidden_dim": decoder_d, "depth": 2, "heads": 2, "dim_head": d_head}
    sizes = {"encoder": encoder, "decoder": decoder, "n_class": 104, "bin_num": bins, "bin_alpha": 0.7}
    sizes |= {"pad_token_id": 5.0, "mask_token_id": 6.0} | (config or {})
    data = {"rnaseq": {"seq_len": N_GENES + 2, "pad_token_id": 103, "mask_token_id": 102}}
    settings = {"model": "mae_autobin", "model_config": {"mae_autobin": sizes}, "dataset_config": data}
    shapes: dict[str, tuple[int, ...]] = {"pos_emb.weight": (N_GENES + 3, d), "token_emb.mlp.weight": (bins, 1)}
    shapes |= {"token_emb.mlp.bias": (bins,), "token_emb.mlp2.weight": (bins, bins), "token_emb.mlp2.bias": (bins,)}
    shapes |= {"token_emb.emb.weight": (bins, d), "token_emb.emb_mask.weight": (1, d)}
    shapes |= {"token_emb.emb_pad.weight": (1, d), **norm_shapes("encoder.norm", d)}
    for i in range(3):
        layer = f"encoder.transformer_encoder.{i}."
        shapes |= {f"{layer}self_attn.in_proj_weight": (3 * d, d), f"{layer}self_attn.in_proj_bias": (3 * d,)}
        shapes |= {f"{layer}self_attn.out_proj.weight": (d, d), f"{layer}self_attn.out_proj.bias": (d,)}
        shapes |= {f"{layer}linear1.weight": (4 * d, d), f"{layer}linear1.bias": (4 * d,)}
        shapes |= {f"{layer}linear2.weight": (d, 4 * d), f"{layer}linear2.bias": (d,)}
        shapes |= norm_shapes(f"{layer}norm1", d) | norm_shapes(f"{layer}norm2", d)
    for i in range(2):
        layer = f"decoder.performer.net.layers.{i}."
        for part in ("to_q", "to_k", "to_v", "to_out"):
            shapes |= {f"{layer}0.fn.{part}.weight": (8, 8), f"{layer}0.fn.{part}.bias": (8,)}
        shapes |= {f"{layer}0.fn.fast_attention.projection_matrix": (5, d_head)}
        shapes |= {f"{layer}1.fn.fn.w1.weight": (32, 8), f"{layer}1.fn.fn.w1.bias": (32,)}
        shapes |= {f"{layer}1.fn.fn.w2.weight": (8, 32), f"{layer}1.fn.fn.w2.bias": (8,)}
        shapes |= norm_shapes(f"{layer}0.norm", 8) | norm_shapes(f"{layer}1.norm", 8)
    shapes |= {**norm_shapes("decoder.norm", 8), **norm_shapes("norm", 8), "decoder_embed.weight": (8, d)}
    shapes |= {"decoder_embed.bias": (8,), "to_final.weight": (1, 8), "to_final.bias": (1,)}
    folder = parent / name
    folder.mkdir()
    content = {}
    for part in parts:
        weights = {k: draw(part + k, *shape) + (1.0 if is_norm(k) else 0.0) for k, shape in shapes.items()}
        weights["decoder.performer.calls_since_last_redraw"] = torch.tensor(4)
        weights = edit(weights) if edit else weights
        content[part] = {"config": settings, "state_dict": {f"model.{k}": v for k, v in weights.items()}}
    torch.save(content, folder / "models.ckpt")
    rows = "".join(f"{symbol}\t{i}\n" for i, symbol in enumerate(SYMBOLS))
    (folder / "OS_scRNA_gene_index.19264.tsv").write_text("gene_name\tindex\n" + rows)
    return folder


KINDS = (
    "scgpt",
    "scgpt-finetuned",
    "geneformer-v1",
    "geneformer-v2",
    "scfoundation",
    "tahoe",
    "tahoe-3b",
    "transcriptformer",
    "nicheformer",
    "nicheformer-ckpt",
    "uce",
    "aido-cell",
)
"""Every kind of folder that a reader takes."""


def write_tiny(parent: Path, kind: str) -> Path:
    """A tiny checkpoint of a kind."""
    match kind:
        case "scgpt":
            return write_scgpt(parent, kind)
        case "scgpt-finetuned":
            return write_finetuned_scgpt(parent, kind)
        case "geneformer-v1" | "geneformer-v2":
            return write_geneformer(parent, kind, version=int(kind[-1]))
        case "scfoundation":
            return write_scfoundation(parent, kind)
        case "tahoe" | "tahoe-3b":
            return write_tahoe(parent, kind, large=kind == "tahoe-3b")
        case "nicheformer" | "nicheformer-ckpt":
            from tiny_nicheformer import write_nicheformer

            return write_nicheformer(parent, kind, is_lightning=kind.endswith("ckpt"))
        case "uce":
            return write_uce(parent, kind)
        case "aido-cell":
            return write_aido_cell(parent, kind, genes=SYMBOLS)
        case "transcriptformer":
            return write_transcriptformer(parent, kind)
    raise ValueError(kind)
