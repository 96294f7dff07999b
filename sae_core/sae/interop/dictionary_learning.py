"""Folders of dictionary_learning: `config.json` and `ae.pt`, a state dict that `torch.load(weights_only=True)` reads.

| dict_class | here | details |
|---|---|---|
| AutoEncoder | standard | b_dec, named `bias`, is subtracted from the input; not written |
| AutoEncoderNew | standard | no centring, decoder rows of any length |
| GatedAutoEncoder | gated | centred |
| JumpReluAutoEncoder | jumprelu | not centred; W_enc is [d_model feature] |
| AutoEncoderTopK | topk | centred; its running `threshold` is not used unless asked for, and not read |
| BatchTopKSAE, MatryoshkaBatchTopKSAE | batchtopk, matryoshka | centred; one `threshold`, negative until fitted |

Decoders are [d_model feature] in the file, except where W_dec is a separate parameter. The factor by which activations
are divided during training is already included in the biases and the threshold of a finished training.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sae_core.checkpoint_files import read_json, read_weights
from sae_core.sae.autoencoder import SparseAutoencoder
from sae_core.sae.config import SAEConfig
from sae_core.sae.interop.conversion import (
    CONFIG_KEY,
    ForeignSAE,
    Origin,
    StatedConfig,
    TensorFormat,
    Tensors,
    as_float32,
    build_autoencoder,
    check_agreement,
    checked_tensors,
    first_text,
    folded_weights,
    format_for,
    format_named,
    gated_weights,
    has_no_threshold,
    has_one_threshold,
    json_object,
    own_entries,
    own_origin,
    shift_b_enc,
    unsupported,
    whole_number,
    write_files,
)
from sae_core.sae.objectives import Weights

HEADER, WEIGHTS = "config.json", "ae.pt"
_LINEAR = {"encoder.weight": "feature d_model", "encoder.bias": "feature", "decoder.weight": "d_model feature"}
_OWN = {"W_enc": "d_model feature", "W_dec": "feature d_model", "b_enc": "feature", "b_dec": "d_model"}
_COUNT = {"k": ""}
_UNFITTED = -1.0  # the value of a threshold that was never fitted


def _linear(t: Tensors, b_dec: str) -> Weights:
    b_enc = t["encoder.bias"]
    return Weights(t["encoder.weight"], t["decoder.weight"].T, b_enc, t[b_dec], torch.zeros_like(b_enc))


def _linear_of(w: Weights, b_dec: str) -> dict[str, torch.Tensor]:
    return {"encoder.weight": w.W_enc, "encoder.bias": w.b_enc, "decoder.weight": w.W_dec.T, b_dec: w.b_dec}


def _own(t: Tensors) -> Weights:
    return Weights(t["W_enc"].T, t["W_dec"], t["b_enc"], t["b_dec"], t["threshold"].expand_as(t["b_enc"]))


def _own_of(w: Weights) -> dict[str, torch.Tensor]:
    return {"W_enc": w.W_enc.T, "W_dec": w.W_dec, "b_enc": w.b_enc, "b_dec": w.b_dec}


def _gate(t: Tensors) -> Weights:
    return gated_weights(
        t, t["encoder.weight"], t["gate_bias"], t["mag_bias"], t["decoder.weight"].T, t["decoder_bias"]
    )


def _gate_of(w: Weights, _: SAEConfig) -> Tensors:
    maps = {"encoder.weight": w.W_enc, "decoder.weight": w.W_dec.T, "decoder_bias": w.b_dec}
    return maps | {"r_mag": torch.zeros_like(w.b_enc), "mag_bias": w.b_enc, "gate_bias": w.b_enc - w.theta}


def _counted(config: SAEConfig, threshold: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"k": torch.tensor(config.k, dtype=torch.int32), "threshold": threshold}


def _group_sizes(config: SAEConfig) -> torch.Tensor:
    return torch.tensor(config.group_stops).diff(prepend=torch.zeros(1, dtype=torch.int64))


FORMATS = {
    "AutoEncoder": TensorFormat(
        arch="standard", shapes=_LINEAR | {"bias": "d_model"}, to_weights=lambda t: _linear(t, "bias"), centred=True
    ),
    "AutoEncoderNew": TensorFormat(
        arch="standard",
        shapes=_LINEAR | {"decoder.bias": "d_model"},
        to_weights=lambda t: _linear(t, "decoder.bias"),
        from_weights=lambda w, _: _linear_of(w, "decoder.bias"),
        can_hold=has_no_threshold,
    ),
    "GatedAutoEncoder": TensorFormat(
        arch="gated",
        shapes={
            "encoder.weight": "feature d_model",
            "decoder.weight": "d_model feature",
            "decoder_bias": "d_model",
            "r_mag": "feature",
            "gate_bias": "feature",
            "mag_bias": "feature",
        },
        to_weights=_gate,
        from_weights=_gate_of,
        centred=True,
    ),
    "JumpReluAutoEncoder": TensorFormat(
        arch="jumprelu",
        shapes=_OWN | {"threshold": "feature"},
        to_weights=_own,
        from_weights=lambda w, _: _own_of(w) | {"threshold": w.theta},
    ),
    "AutoEncoderTopK": TensorFormat(
        arch="topk",
        shapes=_LINEAR | {"b_dec": "d_model"},
        states_k=True,
        optional=_COUNT | {"threshold": ""},
        to_weights=lambda t: _linear(t, "b_dec"),
        from_weights=lambda w, config: _linear_of(w, "b_dec") | _counted(config, torch.tensor(_UNFITTED)),
        centred=True,
    ),
    "BatchTopKSAE": TensorFormat(
        arch="batchtopk",
        shapes=_LINEAR | {"b_dec": "d_model", "threshold": ""},
        states_k=True,
        optional=_COUNT,
        to_weights=lambda t: _linear(t, "b_dec")._replace(theta=t["threshold"].expand_as(t["encoder.bias"])),
        from_weights=lambda w, config: _linear_of(w, "b_dec") | _counted(config, w.theta[0]),
        centred=True,
        can_hold=has_one_threshold,
    ),
    "MatryoshkaBatchTopKSAE": TensorFormat(
        arch="matryoshka",
        shapes=_OWN | {"threshold": "", "group_sizes": "group"},
        states_k=True,
        optional=_COUNT,
        to_weights=_own,
        from_weights=lambda w, config: (
            _own_of(w) | _counted(config, w.theta[0]) | {"group_sizes": _group_sizes(config)}
        ),
        centred=True,
        can_hold=has_one_threshold,
    ),
}


def read_dictionary_learning(folder: str | Path, *, input_scale: float | None = None) -> ForeignSAE:
    """The autoencoder in a folder of dictionary_learning; its configuration has k = 1 where it states no k.

    `input_scale`: the number by which activations were multiplied before training, where the weights do not hold it.

    Raises:
        CheckpointError: the folder cannot be read, or something in it has no exact counterpart here.
    """
    folder = Path(folder)
    header = read_json(folder / HEADER)
    trainer = json_object(folder, header, "trainer")
    tensor_format = format_named(folder, FORMATS, "dict_class", trainer.get("dict_class"))
    tensors = read_weights(folder / WEIGHTS)
    found = checked_tensors(folder, tensors, tensor_format)
    if "threshold" in found and "threshold" in tensor_format.shapes and not bool((found["threshold"] >= 0).all()):
        raise unsupported(
            folder, "threshold", found["threshold"].tolist(), "one >= 0, which a whole training has fitted"
        )
    weights = tensor_format.to_weights(found)
    n_features, d_model = weights.W_dec.shape
    check_agreement(
        folder,
        activation_dim=(trainer.get("activation_dim"), d_model),
        dict_size=(trainer.get("dict_size"), n_features),
    )
    k = whole_number(folder, "k", trainer.get("k")) if tensor_format.states_k else None
    check_agreement(folder, k=(k, int(found["k"]) if "k" in found else k))
    sizes = found.get("group_sizes")
    stated = StatedConfig(
        k=k,
        group_stops=None if sizes is None else [int(stop) for stop in sizes.cumsum(0)],
        own=header.get(CONFIG_KEY),
    )
    sae = build_autoencoder(
        folder,
        shift_b_enc(weights, -1) if tensor_format.centred else weights,
        arch=tensor_format.arch,
        stated=stated,
        precision=tensors["W_dec" if "W_dec" in tensors else "decoder.weight"].dtype,
        input_scale=input_scale,
    )
    origin = own_origin(folder, header) or _origin(trainer)
    return ForeignSAE(sae, stated.has_k, origin, "dictionary_learning folds its factor into biases and threshold")


def write_dictionary_learning(
    sae: SparseAutoencoder,
    folder: str | Path,
    *,
    origin: Origin | None = None,
    trainer: Mapping[str, Any] | None = None,
) -> None:
    """Write `sae`, folded, so that dictionary_learning computes the same codes and reconstructions.

    Each architecture is written as its counterpart if that can hold its thresholds (none for standard, one for
    batchtopk and matryoshka), else as JumpReluAutoEncoder. Model and site of `origin` are its `lm_name` and
    `submodule_name`; `trainer` holds further entries of `trainer` in the JSON. Our own configuration is written too, so
    that `read_dictionary_learning` restores it.
    """
    weights, config = folded_weights(sae), sae.config
    name = format_for(FORMATS, config.arch, weights)
    tensor_format, theirs = FORMATS[name], FORMATS[name].from_weights
    assert theirs is not None
    sizes = {"activation_dim": config.d_model, "dict_size": config.n_features, "k": config.k}
    tensors = as_float32(theirs(shift_b_enc(weights, +1) if tensor_format.centred else weights, config))
    data = io.BytesIO()
    torch.save(tensors, data)
    named = {} if origin is None else {"lm_name": origin.model, "submodule_name": origin.site}
    header = {"trainer": {**named, **(trainer or {}), "dict_class": name, **sizes}, **own_entries(sae, origin)}
    write_files(Path(folder), WEIGHTS, data.getvalue(), HEADER, header)


def _origin(trainer: Mapping[str, Any]) -> Origin:
    """Model and site of a training; a layer without a submodule is the output of that layer."""
    layer = trainer.get("layer")
    of_layer = f"layer.{layer}" if isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 else None
    return Origin(model=first_text(trainer.get("lm_name")), site=first_text(trainer.get("submodule_name"), of_layer))
