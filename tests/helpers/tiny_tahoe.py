"""Tiny checkpoints of Tahoe-x1 with random weights, in the layout of the published folders."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

D, LAYERS, HEADS, RATIO, BITS = 16, 3, 2, 2, 6
DRUGS = {"<pad>": 0, "Bortezomib": 1, "Talc": 2, "Trametinib (DMSO_TF solvate)": 3}
SMALL = {"activation": "relu", "head": "leaky_relu", "attn_impl": "triton"}
"""What 70M and 1.3B have."""
LARGE = {"activation": "gelu", "head": "gelu", "attn_impl": "flash", "use_attn_mask": False}
"""What 3B has."""


def tahoe_settings(*, large: bool, n_rows: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of model_config.yml and collator_config.yml."""
    own = LARGE if large else SMALL
    attention = {"attn_type": "grouped_query_attention", "kv_nheads": HEADS, "attn_pdrop": 0.0}
    attention |= {name: own[name] for name in ("attn_impl", "use_attn_mask") if name in own}
    value = {"input_emb_style": "continuous", "dropout": 0.1, "max_value": 512, "use_norm": True}
    model: dict[str, Any] = {"name": "tahoe_x1", "d_model": D, "n_layers": LAYERS, "n_heads": HEADS}
    model |= {"vocab_size": n_rows, "expansion_ratio": RATIO, "norm_scheme": "pre", "use_glu": False}
    model |= {"init_device": "cpu", "standard_scale_outputs": False, "use_generative_training": False}
    model |= {"transformer_activation": own["activation"], "attn_config": attention, "cell_emb_style": "cls"}
    model |= {"norm_config": {"norm_type": "layernorm", "eps": 1e-5}, "gene_encoder": {"use_norm": True}}
    model |= {"expression_encoder": {**value, "activation": own["activation"]}, "precision": "amp_bf16"}
    model |= {"expression_decoder": {"n_outputs": 1, "n_layers": 1, "activation": own["head"]}}
    model["mvc"] = {"arch_style": "inner product", "query_activation": "sigmoid", "scaled_dot_product": True}
    collator: dict[str, Any] = {"pad_token_id": 0, "pad_value": -2, "mask_value": -1, "num_bins": 51}
    collator |= {"do_padding": True, "do_mlm": True, "do_binning": True, "mlm_probability": 0.5, "data_style": "both"}
    collator |= {"right_binning": False, "max_length": 32, "sampling": True, "use_junk_tokens": not large}
    if large:
        place = {"local": "drug_fps_pad.npy", "remote": "s3://bucket/drug_fps_pad.npy"}
        model["chemical_encoder"] = {"drug_fps_path": place, "activation": "gelu", "padding_idx": 0, "freeze": False}
        collator |= {"use_chem_token": True, "keep_first_n_tokens": 2}
        collator["drug_to_id_path"] = {"local": "drug_to_id_pad.json", "remote": "s3://bucket/drug_to_id_pad.json"}
    return model, collator


def tahoe_shapes(*, large: bool, n_rows: int, d: int = D, n_layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of an official file, by its name."""
    linear = {"expression_encoder.linear1": (d, 1), "expression_encoder.linear2": (d, d)}
    norms = ["gene_encoder.enc_norm", "expression_encoder.norm", "transformer_encoder.norm"]
    for i in range(n_layers):
        layer = f"transformer_encoder.layers.{i}."
        linear |= {f"{layer}self_attn.Wqkv": (3 * d, d), f"{layer}self_attn.out_proj": (d, d)}
        linear |= {f"{layer}up_proj": (RATIO * d, d), f"{layer}down_proj": (d, RATIO * d)}
        norms += [f"{layer}norm1", f"{layer}norm2"]
    linear |= {"expression_decoder.linear_layers.0": (d, d), "expression_decoder.out_proj": (1, d)}
    linear |= {"mvc_decoder.gene2query": (d, d)}
    shapes: dict[str, tuple[int, ...]] = {"gene_encoder.embedding.weight": (n_rows, d), "flag_encoder.weight": (2, d)}
    if large:
        shapes["chem_encoder.embedding.weight"] = (len(DRUGS), BITS)
        linear |= {"chem_encoder.fc": (d, BITS), "chem_encoder.proj": (d, d)}
        norms.append("chem_encoder.norm")
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (d,), f"{name}.bias": (d,)}
    return {f"model.{name}": shape for name, shape in (shapes | {"mvc_decoder.W.weight": (d, d)}).items()}


def write_tahoe(
    parent: Path,
    name: str = "tahoe",
    *,
    genes: Sequence[str] = tuple(f"GENE{i}" for i in range(40)),
    large: bool = False,
    with_drug: bool = True,
    edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
    model: dict[str, Any] | None = None,
    collator: dict[str, Any] | None = None,
) -> Path:
    """A folder such as `70m-model`, or with `large` such as `3b-model`, with the drugs' rows beside it.

    `with_drug`: whether vocab.json of a large model has `<drug>`. `model` and `collator` replace fields.
    """
    tokens = ["<pad>", "<cls>", "<eoc>", *genes, *([] if large else [f"<junk{i}>" for i in range(7)])]
    n_rows = len(tokens) + large
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for key, shape in sorted(tahoe_shapes(large=large, n_rows=n_rows).items()):
        is_norm_weight = "norm" in key and key.endswith("weight")
        weights[key] = torch.randn(shape, generator=generator) * 0.3 + (1.0 if is_norm_weight else 0.0)
    model_fields, collator_fields = tahoe_settings(large=large, n_rows=n_rows)
    folder = parent / name
    folder.mkdir(parents=True)
    save_file(edit(weights) if edit else weights, folder / "model.safetensors")
    in_file = [*tokens, "<drug>"] if large and with_drug else tokens
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(in_file)}, indent=2))
    (folder / "model_config.yml").write_text(yaml.safe_dump(model_fields | (model or {})))
    (folder / "collator_config.yml").write_text(yaml.safe_dump(collator_fields | (collator or {})))
    if large:
        (folder / "drug_to_id_pad.json").write_text(json.dumps(DRUGS))
    return folder
