"""Tiny checkpoints of Nicheformer with random weights: the folder of the hub, and a Lightning checkpoint."""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import torch
from safetensors.torch import save_file
from tiny_checkpoints import SYMBOLS, draw, ensembl, is_norm, norm_shapes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

D, HIDDEN, LAYERS, HEADS, PLACES = 16, 24, 3, 2, 30
MOUSE = ["ENSMUSG00000000001", "ENSMUSG00000000003"]
IDS = [*(ensembl(i) for i in range(len(SYMBOLS))), *MOUSE]
N_TOKENS = 30 + len(IDS)
TECHNOLOGIES = ("dissociated", "merfish", "cosmx", "xenium")
SETTINGS: dict[str, Any] = {"dim_model": D, "nheads": HEADS, "dim_feedforward": HIDDEN, "nlayers": LAYERS}
SETTINGS |= {"dropout": 0.0, "batch_first": True, "masking_p": 0.15, "n_tokens": N_TOKENS, "context_length": PLACES}
SETTINGS |= {"cls_classes": 164, "supervised_task": None, "learnable_pe": True}
SETTINGS |= {"specie": True, "assay": True, "modality": True}


def raw_means(technology: str, n_genes: int = len(IDS)) -> np.ndarray:
    """Means between 0 and 5 with halves and NaN, and a negative one of MERFISH."""
    mean = np.round(np.random.default_rng(TECHNOLOGIES.index(technology)).uniform(0, 5, n_genes) * 4) / 4
    mean[3] = np.nan
    if technology == "merfish":
        mean[7] = -1.75
    return mean


def layer_shapes(name: str, *, d: int = D, hidden: int = HIDDEN) -> dict[str, tuple[int, ...]]:
    """The weights of one layer of torch's `nn.TransformerEncoderLayer`."""
    shapes: dict[str, tuple[int, ...]] = {f"{name}.self_attn.in_proj_weight": (3 * d, d)}
    shapes |= {f"{name}.self_attn.in_proj_bias": (3 * d,), f"{name}.self_attn.out_proj.weight": (d, d)}
    shapes |= {f"{name}.self_attn.out_proj.bias": (d,), f"{name}.linear1.weight": (hidden, d)}
    shapes |= {f"{name}.linear1.bias": (hidden,), f"{name}.linear2.weight": (d, hidden), f"{name}.linear2.bias": (d,)}
    return shapes | norm_shapes(f"{name}.norm1", d) | norm_shapes(f"{name}.norm2", d)


def lightning_weights(
    *, n_layers: int = LAYERS, n_tokens: int = N_TOKENS, d: int = D, hidden: int = HIDDEN, places: int = PLACES
) -> dict[str, torch.Tensor]:
    """Every weight of the authors' Lightning class, and the buffer that only some files have."""
    shapes = {"embeddings.weight": (n_tokens + 5, d), "positional_embedding.weight": (places, d)}
    shapes |= layer_shapes("encoder_layer", d=d, hidden=hidden)
    for i in range(n_layers):
        shapes |= layer_shapes(f"encoder.layers.{i}", d=d, hidden=hidden)
    shapes |= {"classifier_head.weight": (n_tokens, d), "classifier_head.bias": (n_tokens,)}
    shapes |= {
        "pooler_head.weight": (d, d),
        "pooler_head.bias": (d,),
        "cls_head.weight": (164, d),
        "cls_head.bias": (164,),
    }
    weights = {key: draw(key, *shape) + (1.0 if is_norm(key) else 0.0) for key, shape in shapes.items()}
    return weights | {"pos": torch.arange(places)}


def hub_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights as the hub's class has them: no other head than the classifier, and a name before the rest."""
    kept = {key: value for key, value in weights.items() if not key.startswith(("pooler_head.", "cls_head."))}
    return {key if key.startswith("classifier_head.") else f"nicheformer.{key}": value for key, value in kept.items()}


def write_reference(path: Path, ids: Sequence[str] = IDS) -> None:
    """An .h5ad of one cell whose var names are `ids`."""
    with h5py.File(path, "w") as file:
        var = file.create_group("var")
        var.attrs["_index"] = "gene"
        var.create_dataset("gene", data=list(ids), dtype=h5py.string_dtype())
        file.create_dataset("X", data=np.zeros((1, len(ids)), dtype=np.float32))


def write_nicheformer(
    parent: Path,
    name: str = "nicheformer",
    *,
    is_lightning: bool = False,
    edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
    settings: dict[str, Any] | None = None,
    ids: Sequence[str] = IDS,
    technologies: Sequence[str] = TECHNOLOGIES,
    place: str = ".",
) -> Path:
    """A folder of Nicheformer: `settings` replace fields, `place` is where the reference and the means lie in it."""
    folder = parent / name
    beside = folder / place
    beside.mkdir(parents=True)
    fields, weights = SETTINGS | (settings or {}), lightning_weights()
    weights = weights if is_lightning else hub_weights(weights)
    weights = edit(weights) if edit else weights
    if is_lightning:
        content = {"epoch": 1, "pytorch-lightning_version": "2.1.0", "state_dict": OrderedDict(weights)}
        content |= {
            "hyper_parameters": fields,
            "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(1.5)}},
        }
        torch.save(
            content | {"optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}]}, folder / "nicheformer.ckpt"
        )
    else:
        (folder / "config.json").write_text(json.dumps({"model_type": "nicheformer", **fields}))
        save_file(weights, folder / "model.safetensors")
        context = {"[PAD]": 0, "[MASK]": 1, "[CLS]": 2, "[MODALITY_dissociated]": 3, "[MODALITY_spatial]": 4}
        rows = context | {gene: 30 + i for i, gene in enumerate(ids)}
        (folder / "vocab.json").write_text(json.dumps(rows))
    write_reference(beside / "model.h5ad", ids)
    for technology in technologies:
        np.save(beside / f"{technology}_mean_script.npy", raw_means(technology, len(ids)))
    (folder / "vocab_ensembl.json").write_text(json.dumps(dict(zip(IDS, SYMBOLS, strict=False))))
    return folder
