"""A tiny TranscriptFormer checkpoint with random weights, in the official layout."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

SPECIAL = ["unknown", "[PAD]", "[START]", "[END]", "[RD]", "[CELL]", "[MASK]"]
ASSAYS = {"unknown": 0, "10x 3' v3": 1, "10x 3' v2": 2, "Smart-seq2": 3}
D_PROTEIN = 10


def draw(name: str, *shape: int, scale: float = 0.25) -> torch.Tensor:
    """A normal tensor seeded by its name; sizes alone do not tell the tensors of two names apart."""
    seed = sum(ord(letter) * (place + 1) for place, letter in enumerate(name)) % 2**31
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def mlp_shapes(name: str, d_in: int, d_hidden: int, d_out: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.layers.0.weight": (d_hidden, d_in),
        f"{name}.layers.0.bias": (d_hidden,),
    }
    shapes |= {f"{name}.layers.2.weight": (d_hidden,), f"{name}.layers.2.bias": (d_hidden,)}
    return shapes | {f"{name}.layers.4.weight": (d_out, d_hidden), f"{name}.layers.4.bias": (d_out,)}


def shapes_of(
    *, n_rows: int, d_protein: int, d: int, d_hidden: int, n_layers: int, n_assays: int, gene_head: int, biases: bool
) -> dict[str, tuple[int, ...]]:
    """The names and shapes of an official state dict."""
    shapes: dict[str, tuple[int, ...]] = {"gene_embeddings.embedding.weight": (n_rows, d_protein)}
    shapes |= mlp_shapes("gene_embeddings.mlp", d_protein, d, d)
    shapes |= {"aux_embeddings.assay.weight": (n_assays, d)}
    for i in range(n_layers):
        layer = f"transformer_encoder.encoder_layers.{i}."
        for part in range(4):
            shapes[f"{layer}self_attn.linears.{part}.weight"] = (d, d)
        shapes |= {f"{layer}linear1.weight": (d_hidden, d), f"{layer}linear2.weight": (d, d_hidden)}
        if biases:
            shapes |= {f"{layer}self_attn.linears.{part}.bias": (d,) for part in range(4)}
            shapes |= {f"{layer}linear1.bias": (d_hidden,), f"{layer}linear2.bias": (d,)}
        for norm in ("norm1", "norm2"):
            shapes |= {f"{layer}{norm}.weight": (d,), f"{layer}{norm}.bias": (d,)}
    shapes |= {"mu.gene_embedding.weight": (n_rows, 1), **mlp_shapes("mu.mlp", 2 * d, d // 2, 1)}
    return shapes | mlp_shapes("gene_id_head", d, gene_head, n_rows)


def is_unit(name: str) -> bool:
    """Whether a weight is that of a norm, about 1."""
    return name.endswith(("norm1.weight", "norm2.weight", "layers.2.weight"))


def write_h5(path: Path, genes: Sequence[str], *, d_protein: int = D_PROTEIN) -> Path:
    """Names and vectors of genes as the authors publish them."""
    with h5py.File(path, "w") as file:
        file.create_dataset("keys", data=np.array(genes, dtype="S"))
        arrays = file.create_group("arrays")
        for gene in dict.fromkeys(genes):
            arrays.create_dataset(gene, data=draw(f"esm {gene}", d_protein, scale=1.0).numpy())
    return path


def write_transcriptformer(
    parent: Path,
    name: str = "transcriptformer",
    *,
    genes: Sequence[str] | None = None,
    edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
    settings: dict[str, dict[str, Any]] | None = None,
    assays: dict[str, int] | None = None,
    seq_len: int = 31,
) -> Path:
    """`config.json`, `model_weights.pt` and `vocabs`; `settings` replace fields of the tables of config.json."""
    genes = [f"GENE{i}" for i in range(40)] if genes is None else list(genes)
    assays = ASSAYS if assays is None else assays
    folder = parent / name
    (folder / "vocabs").mkdir(parents=True)
    half = len(genes) // 2
    # the second file repeats genes of the first
    write_h5(folder / "vocabs" / "homo_sapiens_gene.h5", genes[:half])
    write_h5(folder / "vocabs" / "mus_musculus_gene.h5", [genes[0], *genes[half:], genes[half]])
    (folder / "vocabs" / "assay_vocab.json").write_text(json.dumps(assays))
    sizes = {"embed_dim": 16, "model_dim": 24, "num_layers": 3, "num_heads": 2, "seq_len": seq_len, "aux_len": 1}
    sizes |= {"softcap": 10, "log_counts_eps": 1e-6, "activation": "gelu", "attn_bias": False, "fw_bias": False}
    sizes |= {"mu_link_fn": "softmax", "gene_head_hidden_dim": 12, "dropout": 0.1, "block_len": 128}
    data: dict[str, Any] = {"special_tokens": SPECIAL, "aux_cols": "assay", "clip_counts": None, "pad_zeros": True}
    data |= {"esm2_mappings": ["homo_sapiens_gene.h5", "mus_musculus_gene.h5"], "gene_pad_token": "[PAD]"}
    loss = {"gene_id_loss_weight": 1.0, "softplus_approx": True}
    tables = {"model_config": sizes, "data_config": data, "loss_config": loss}
    tables = {key: table | (settings or {}).get(key, {}) for key, table in tables.items()}
    (folder / "config.json").write_text(json.dumps({"model": {"model_type": "transcriptformer", **tables}}))
    shapes = shapes_of(
        n_rows=len(SPECIAL) + len(genes),
        d_protein=D_PROTEIN,
        d=16,
        d_hidden=24,
        n_layers=3,
        n_assays=len(assays),
        gene_head=12,
        biases=bool(tables["model_config"]["fw_bias"]),
    )
    weights = {key: draw(key, *shape) + (1.0 if is_unit(key) else 0.0) for key, shape in shapes.items()}
    vectors = [draw(f"special {i}", D_PROTEIN) for i in range(len(SPECIAL))]
    vectors += [draw(f"esm {gene}", D_PROTEIN, scale=1.0) for gene in genes]
    weights["gene_embeddings.embedding.weight"] = torch.stack(vectors)
    torch.save(edit(weights) if edit else weights, folder / "model_weights.pt")
    return folder
