"""A tiny checkpoint of AIDO.Cell with random weights: the folder of the hub, and the gene list beside it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

D, HIDDEN, LAYERS, HEADS, BINS = 16, 24, 3, 2, 7
SETTINGS: dict[str, Any] = {"hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
SETTINGS |= {"intermediate_size": HIDDEN, "hidden_act": "swiglu", "layer_norm_eps": 1e-5, "add_linear_bias": True}
SETTINGS |= {"position_embedding_type": "absolute", "bin_num": BINS, "bin_alpha": 0.7, "mask_token_id": -1.0}
SETTINGS |= {"pad_token_id": -2.0, "normalization_type": "RMSNorm", "_use_flash_attention_2": True}


def shapes(*, n_genes: int, norm: str, bias: bool, n_layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    """Every weight of the authors' class for masked values."""

    def linear(name: str, n_out: int, n_in: int, *, with_bias: bool = True) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (n_out, n_in)} | ({f"{name}.bias": (n_out,)} if with_bias else {})

    def norms(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (D,)} | ({f"{name}.bias": (D,)} if norm == "LayerNorm" else {})

    found = linear("bert.gene_embedding.linear1", BINS, 1, with_bias=False)
    found |= linear("bert.gene_embedding.linear2", BINS, BINS, with_bias=False)
    found |= {"bert.gene_embedding.lookup_table.weight": (BINS, D), "bert.gene_embedding.mask_embedding.weight": (1, D)}
    found |= {"bert.gene_embedding.pad_embedding.weight": (1, D), "bert.position_embedding.weight": (n_genes + 2, D)}
    for i in range(n_layers):
        layer = f"bert.encoder.layer.{i}"
        for part in ("query", "key", "value"):
            found |= linear(f"{layer}.attention.self.{part}", D, D, with_bias=bias)
        found |= linear(f"{layer}.attention.output.dense", D, D, with_bias=bias)
        found |= linear(f"{layer}.mlp.gate_proj", HIDDEN, D, with_bias=bias)
        found |= linear(f"{layer}.mlp.up_proj", HIDDEN, D, with_bias=bias)
        found |= linear(f"{layer}.mlp.down_proj", D, HIDDEN, with_bias=bias)
        found |= norms(f"{layer}.attention.ln") | norms(f"{layer}.ln")
    found |= norms("bert.encoder.ln") | linear("cls.predictions.transform.dense", D, D)
    found |= norms("cls.predictions.transform.LayerNorm") | linear("cls.predictions.decoder", 1, D)
    return found


def write_aido_cell(
    parent: Path,
    name: str = "aido-cell",
    *,
    genes: Sequence[str],
    config: dict[str, Any] | None = None,
    edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
) -> Path:
    """Write the folder; `config` replaces fields of config.json, `edit` changes the weights."""
    settings = SETTINGS | {"max_position_embeddings": len(genes)} | (config or {})
    generator = torch.Generator().manual_seed(11)
    sizes = shapes(n_genes=len(genes), norm=settings["normalization_type"], bias=settings["add_linear_bias"])
    weights = {}
    for key, shape in sizes.items():
        is_norm = "ln." in key or "LayerNorm" in key
        weights[key] = torch.randn(shape, generator=generator) * 0.3 + (is_norm and key.endswith("weight"))
    weights["cls.predictions.bias"] = weights["cls.predictions.decoder.bias"].clone()
    folder = parent / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(edit(weights) if edit else weights, folder / "model.safetensors")
    rows = "".join(f"{gene}\t{i}\n" for i, gene in enumerate(genes))
    (folder / "OS_scRNA_gene_index.19264.tsv").write_text("gene_name\tindex\n" + rows)
    return folder
