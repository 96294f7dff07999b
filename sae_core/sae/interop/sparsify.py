"""Folders of sparsify (EleutherAI): `cfg.json` and `sae.safetensors`, versions 0 (as `sae`) and 1.

The one architecture is TopK over each token: encoder.weight and W_dec are [feature d_model], b_dec is subtracted from
the input, and the k largest entries of relu(pre) are kept. There is no threshold, so no other architecture can be
written. Transcoders, skip connections, groupmax, signed codes and other additions are errors; each shows as a field of
the JSON that is set, or as an additional tensor. A training writes a folder for each site, named as the module is, such
as `layers.5` or `layers.5.mlp`.
"""

import re
from pathlib import Path

import safetensors.torch

from sae_core.checkpoint_files import read_json, read_weights
from sae_core.sae.architectures import architecture
from sae_core.sae.autoencoder import SparseAutoencoder
from sae_core.sae.interop.conversion import (
    CONFIG_KEY,
    ORIGIN_KEY,
    ForeignSAE,
    Origin,
    StatedConfig,
    TensorFormat,
    as_float32,
    build_autoencoder,
    check_agreement,
    checked_tensors,
    folded_weights,
    own_entries,
    own_origin,
    shift_b_enc,
    unsupported,
    whole_number,
    write_files,
)
from sae_core.sae.objectives import Weights

HEADER, WEIGHTS = "cfg.json", "sae.safetensors"
FORMAT = TensorFormat(
    arch="topk",
    shapes={
        "encoder.weight": "feature d_model",
        "encoder.bias": "feature",
        "W_dec": "feature d_model",
        "b_dec": "d_model",
    },
    to_weights=lambda t: Weights(
        t["encoder.weight"], t["W_dec"], t["encoder.bias"], t["b_dec"], t["encoder.bias"].new_zeros(len(t["W_dec"]))
    ),
    from_weights=lambda w, _: {
        "encoder.weight": w.W_enc,
        "encoder.bias": w.b_enc,
        "W_dec": w.W_dec,
        "b_dec": w.b_dec,
    },
    centred=True,
)
# fields that are read, or that say nothing more
_DESCRIBED = {"activation", "d_in", "expansion_factor", "k", "num_latents", CONFIG_KEY, ORIGIN_KEY}
_OF_TRAINING = {"multi_topk", "normalize_decoder"}  # without effect on a code
_MODULE = re.compile(r"(\w+\.)*\d+(\.\w+)*")
"""A path of a module in a stack of layers, as which a training names the folder of a site."""


def read_sparsify(folder: str | Path, *, input_scale: float | None = None) -> ForeignSAE:
    """The autoencoder in a folder of sparsify, whose name may be that of its site.

    `input_scale`: the number by which activations were multiplied before training (None: 1).

    Raises:
        CheckpointError: the folder cannot be read, or something in it has no exact counterpart here.
    """
    folder = Path(folder)
    cfg = read_json(folder / HEADER)
    if cfg.get("activation", "topk") != "topk":
        raise unsupported(folder, "activation", cfg["activation"], "topk")
    for name in sorted(set(cfg) - _DESCRIBED - _OF_TRAINING):
        if cfg[name]:
            raise unsupported(folder, name, cfg[name], "a plain autoencoder, in which it is false or absent")
    tensors = read_weights(folder / WEIGHTS)
    weights = FORMAT.to_weights(checked_tensors(folder, tensors, FORMAT))
    n_features, d_model = weights.W_dec.shape
    expected = cfg.get("num_latents")
    if not expected and cfg.get("expansion_factor") is not None:
        expected = d_model * whole_number(folder, "expansion_factor", cfg["expansion_factor"])
    check_agreement(folder, d_in=(cfg.get("d_in"), d_model), num_latents=(expected or None, n_features))
    sae = build_autoencoder(
        folder,
        shift_b_enc(weights, -1),
        arch=FORMAT.arch,
        stated=StatedConfig(k=whole_number(folder, "k", cfg.get("k")), own=cfg.get(CONFIG_KEY)),
        precision=tensors["W_dec"].dtype,
        input_scale=input_scale,
    )
    name = folder.resolve().name
    origin = own_origin(folder, cfg) or Origin(site=name if _MODULE.fullmatch(name) and "." in name else None)
    return ForeignSAE(sae, True, origin, "sparsify does not scale its input")


def write_sparsify(sae: SparseAutoencoder, folder: str | Path, *, origin: Origin | None = None) -> None:
    """Write `sae`, folded, so that sparsify computes the same codes and reconstructions from raw activations.

    `origin` and our own configuration are further entries of the JSON, which sparsify leaves out when it reads.

    Raises:
        CheckpointError: the architecture is not topk; the format has no thresholds.
    """
    config, folder = sae.config, Path(folder)
    if sae.architecture.infer is not architecture("topk").infer:
        raise unsupported(
            folder, "arch", config.arch, "topk, as sparsify has no thresholds; write it for SAELens instead"
        )
    assert FORMAT.from_weights is not None
    cfg = {
        "activation": "topk",
        "expansion_factor": max(1, config.n_features // config.d_model),
        "normalize_decoder": True,
        "num_latents": config.n_features,
        "k": config.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": config.d_model,
        **own_entries(sae, origin),
    }
    data = safetensors.torch.save(as_float32(FORMAT.from_weights(shift_b_enc(folded_weights(sae), +1), config)))
    write_files(folder, WEIGHTS, data, HEADER, cfg)
