"""Folders of dictionary_learning: `config.json` and `ae.pt`, a state dict that `torch.load(weights_only=True)` reads.

| dict_class | here | what is particular |
|---|---|---|
| AutoEncoder | standard | b_dec, named `bias`, is subtracted from the input; not written |
| AutoEncoderNew | standard | no centring, decoder rows of any length |
| GatedAutoEncoder | gated | centred |
| JumpReluAutoEncoder | jumprelu | not centred; W_enc is [d_model feature] |
| AutoEncoderTopK | topk | centred; its running `threshold` is not used unless asked for, and not read |
| BatchTopKSAE, MatryoshkaBatchTopKSAE | batchtopk, matryoshka | centred; one `threshold`, negative until fitted |

Decoders are [d_model feature], except where W_dec is a parameter of its own. The factor that activations are divided by
in training is already in the biases and in the threshold of a finished training.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sae_core.readers import read_json, read_weights
from sae_core.sae.autoencoder import SparseAutoencoder
from sae_core.sae.config import SAEConfig
from sae_core.sae.interop.parts import (
    STAMP,
    Layout,
    Stated,
    Tensors,
    agree,
    autoencoder,
    gated,
    layout_for,
    layout_of,
    no_threshold,
    one_threshold,
    refuse,
    section,
    shaped,
    shifted,
    stored,
    weights_of,
    whole,
    write_files,
)
from sae_core.sae.objectives import Weights

HEADER, WEIGHTS = "config.json", "ae.pt"
_LINEAR = {"encoder.weight": "feature d_model", "encoder.bias": "feature", "decoder.weight": "d_model feature"}
_OWN = {"W_enc": "d_model feature", "W_dec": "feature d_model", "b_enc": "feature", "b_dec": "d_model"}
_COUNT = {"k": ""}
_UNFITTED = -1.0  # the threshold that was never fitted


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
    return gated(t, t["encoder.weight"], t["gate_bias"], t["mag_bias"], t["decoder.weight"].T, t["decoder_bias"])


def _gate_of(w: Weights, _: SAEConfig) -> Tensors:
    maps = {"encoder.weight": w.W_enc, "decoder.weight": w.W_dec.T, "decoder_bias": w.b_dec}
    return maps | {"r_mag": torch.zeros_like(w.b_enc), "mag_bias": w.b_enc, "gate_bias": w.b_enc - w.theta}


def _counted(config: SAEConfig, threshold: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"k": torch.tensor(config.k, dtype=torch.int32), "threshold": threshold}


def _group_sizes(config: SAEConfig) -> torch.Tensor:
    return torch.tensor(config.group_stops).diff(prepend=torch.zeros(1, dtype=torch.int64))


LAYOUTS = {
    "AutoEncoder": Layout(
        arch="standard", shapes=_LINEAR | {"bias": "d_model"}, ours=lambda t: _linear(t, "bias"), centred=True
    ),
    "AutoEncoderNew": Layout(
        arch="standard",
        shapes=_LINEAR | {"decoder.bias": "d_model"},
        ours=lambda t: _linear(t, "decoder.bias"),
        theirs=lambda w, _: _linear_of(w, "decoder.bias"),
        fits=no_threshold,
    ),
    "GatedAutoEncoder": Layout(
        arch="gated",
        shapes={
            "encoder.weight": "feature d_model",
            "decoder.weight": "d_model feature",
            "decoder_bias": "d_model",
            "r_mag": "feature",
            "gate_bias": "feature",
            "mag_bias": "feature",
        },
        ours=_gate,
        theirs=_gate_of,
        centred=True,
    ),
    "JumpReluAutoEncoder": Layout(
        arch="jumprelu",
        shapes=_OWN | {"threshold": "feature"},
        ours=_own,
        theirs=lambda w, _: _own_of(w) | {"threshold": w.theta},
    ),
    "AutoEncoderTopK": Layout(
        arch="topk",
        shapes=_LINEAR | {"b_dec": "d_model"},
        counted=True,
        optional=_COUNT | {"threshold": ""},
        ours=lambda t: _linear(t, "b_dec"),
        theirs=lambda w, config: _linear_of(w, "b_dec") | _counted(config, torch.tensor(_UNFITTED)),
        centred=True,
    ),
    "BatchTopKSAE": Layout(
        arch="batchtopk",
        shapes=_LINEAR | {"b_dec": "d_model", "threshold": ""},
        counted=True,
        optional=_COUNT,
        ours=lambda t: _linear(t, "b_dec")._replace(theta=t["threshold"].expand_as(t["encoder.bias"])),
        theirs=lambda w, config: _linear_of(w, "b_dec") | _counted(config, w.theta[0]),
        centred=True,
        fits=one_threshold,
    ),
    "MatryoshkaBatchTopKSAE": Layout(
        arch="matryoshka",
        shapes=_OWN | {"threshold": "", "group_sizes": "group"},
        counted=True,
        optional=_COUNT,
        ours=_own,
        theirs=lambda w, config: _own_of(w) | _counted(config, w.theta[0]) | {"group_sizes": _group_sizes(config)},
        centred=True,
        fits=one_threshold,
    ),
}


def read_dictionary_learning(folder: str | Path) -> SparseAutoencoder:
    """The autoencoder in a folder of dictionary_learning; k of the configuration is 1 where it does not say it.

    Raises:
        CheckpointError: unreadable, or something in it has no exact counterpart here.
    """
    folder = Path(folder)
    header = read_json(folder / HEADER)
    trainer = section(folder, header, "trainer")
    layout = layout_of(folder, LAYOUTS, "dict_class", trainer.get("dict_class"))
    tensors = read_weights(folder / WEIGHTS)
    found = shaped(folder, tensors, layout)
    if "threshold" in found and "threshold" in layout.shapes and not bool((found["threshold"] >= 0).all()):
        raise refuse(folder, "threshold", found["threshold"].tolist(), "one >= 0, which a whole training has fitted")
    weights = layout.ours(found)
    n_features, d_model = weights.W_dec.shape
    agree(
        folder,
        activation_dim=(trainer.get("activation_dim"), d_model),
        dict_size=(trainer.get("dict_size"), n_features),
    )
    k = whole(folder, "k", trainer.get("k")) if layout.counted else None
    agree(folder, k=(k, int(found["k"]) if "k" in found else k))
    sizes = found.get("group_sizes")
    return autoencoder(
        folder,
        shifted(weights, -1) if layout.centred else weights,
        arch=layout.arch,
        stated=Stated(
            k=k,
            group_stops=None if sizes is None else [int(stop) for stop in sizes.cumsum(0)],
            own=header.get(STAMP),
        ),
        precision=tensors["W_dec" if "W_dec" in tensors else "decoder.weight"].dtype,
    )


def write_dictionary_learning(
    sae: SparseAutoencoder, folder: str | Path, *, trainer: Mapping[str, Any] | None = None
) -> None:
    """Write `sae`, folded, so that dictionary_learning computes the same codes and reconstructions.

    Each architecture is written as its counterpart if that can hold its thresholds (none for standard, one for
    batchtopk and matryoshka), else as JumpReluAutoEncoder. `trainer`: further fields of that name in the JSON (`layer`,
    `lm_name`). Our own configuration travels with it, so that `read_dictionary_learning` gives it back.
    """
    weights, config = weights_of(sae), sae.config
    name = layout_for(LAYOUTS, config.arch, weights)
    layout, theirs = LAYOUTS[name], LAYOUTS[name].theirs
    assert theirs is not None
    sizes = {"activation_dim": config.d_model, "dict_size": config.n_features, "k": config.k}
    tensors = stored(theirs(shifted(weights, +1) if layout.centred else weights, config))
    data = io.BytesIO()
    torch.save(tensors, data)
    header = {"trainer": {**(trainer or {}), "dict_class": name, **sizes}, STAMP: config.to_dict()}
    write_files(Path(folder), WEIGHTS, data.getvalue(), HEADER, header)
