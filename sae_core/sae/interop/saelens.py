"""Folders of SAELens: `cfg.json` and `sae_weights.safetensors`, versions 3 to 6.

| architecture | here | details |
|---|---|---|
| standard | standard | |
| jumprelu | jumprelu | one `threshold` for each feature; older training checkpoints have `log_threshold` |
| topk | topk | may rank pre-activations times the lengths of decoder rows (`rescale_acts_by_decoder_norm`) |
| gated | gated | |
| batchtopk, matryoshka_batchtopk | the same | training checkpoints with one `topk_threshold`; not written |

SAELens saves a finished BatchTopK as jumprelu. W_enc is [d_model feature] in the file. `apply_b_dec_to_input`, which is
true where the JSON does not state it, subtracts b_dec from the input. `normalize_activations = none` takes raw
activations; a factor of the data set was folded into the weights at the end of training. Where the JSON still says
`expected_average_only_in`, it was not, and the folder does not hold it: `input_scale` has to be given. Scaling each
token by its own norm has no counterpart here. Before version 6 topk was an activation function of the standard
architecture. `hook_z` folders take the concatenated heads, [token n_heads * d_head].
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from sae_core.checkpoint_files import read_json, read_weights
from sae_core.errors import UnknownScaleError
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
    flag,
    folded_weights,
    format_for,
    format_named,
    gated_weights,
    has_no_threshold,
    is_whole_number,
    json_object,
    own_entries,
    own_origin,
    shift_b_enc,
    unsupported,
    whole_number,
    write_files,
)
from sae_core.sae.objectives import Weights

HEADER, WEIGHTS = "cfg.json", "sae_weights.safetensors"
SCALED = "expected_average_only_in"  # activations times sqrt(d_in) / their mean length, over the whole data set
WRITTEN_VERSION = "6.0.0"  # the version whose format is written; SAELens takes a folder without one for an older
_LINEAR = {"W_enc": "d_model feature", "W_dec": "feature d_model", "b_enc": "feature", "b_dec": "d_model"}


def _ours(t: Tensors) -> Weights:
    threshold = t.get("threshold", t.get("topk_threshold", torch.zeros((), dtype=torch.float64)))
    return Weights(t["W_enc"].T, t["W_dec"], t["b_enc"], t["b_dec"], threshold.expand_as(t["b_enc"]))


def _theirs(w: Weights, config: SAEConfig) -> Tensors:
    return {"W_enc": w.W_enc.T, "W_dec": w.W_dec, "b_enc": w.b_enc, "b_dec": w.b_dec}


def _gate_ours(t: Tensors) -> Weights:
    return gated_weights(t, t["W_enc"].T, t["b_gate"], t["b_mag"], t["W_dec"], t["b_dec"])


def _gate_theirs(w: Weights, config: SAEConfig) -> Tensors:
    shared = {"W_enc": w.W_enc.T, "W_dec": w.W_dec, "b_dec": w.b_dec, "r_mag": torch.zeros_like(w.b_enc)}
    return shared | {"b_mag": w.b_enc, "b_gate": w.b_enc - w.theta}


_GATE = {name: axes for name, axes in _LINEAR.items() if name != "b_enc"}
_TRAINED = _LINEAR | {"topk_threshold": ""}
FORMATS = {
    "standard": TensorFormat(
        arch="standard", shapes=_LINEAR, to_weights=_ours, from_weights=_theirs, can_hold=has_no_threshold
    ),
    "jumprelu": TensorFormat(
        arch="jumprelu",
        shapes=_LINEAR | {"threshold": "feature"},
        to_weights=_ours,
        from_weights=lambda w, config: {**_theirs(w, config), "threshold": w.theta},
    ),
    "topk": TensorFormat(arch="topk", shapes=_LINEAR, to_weights=_ours, from_weights=_theirs, states_k=True),
    "gated": TensorFormat(
        arch="gated",
        shapes=_GATE | {"b_gate": "feature", "b_mag": "feature", "r_mag": "feature"},
        to_weights=_gate_ours,
        from_weights=_gate_theirs,
    ),
    "batchtopk": TensorFormat(arch="batchtopk", shapes=_TRAINED, to_weights=_ours, states_k=True),
    "matryoshka_batchtopk": TensorFormat(arch="matryoshka", shapes=_TRAINED, to_weights=_ours, states_k=True),
}


def read_saelens(folder: str | Path, *, input_scale: float | None = None) -> ForeignSAE:
    """The autoencoder in a folder of SAELens; its configuration has k = 1 where it states no k.

    `input_scale`: the number by which activations were multiplied before training, where the weights do not hold it.

    Raises:
        UnknownScaleError: the folder states that there is such a number, and it was not given.
        CheckpointError: the folder cannot be read, or something in it has no exact counterpart here.
    """
    folder = Path(folder)
    cfg = _renamed(folder, read_json(folder / HEADER))
    tensors = _current(folder, read_weights(folder / WEIGHTS))
    tensor_format = format_named(folder, FORMATS, "architecture", cfg["architecture"])
    _check_input(folder, cfg)
    found = checked_tensors(folder, tensors, tensor_format)
    if "topk_threshold" in found and not found["topk_threshold"] > 0:
        raise unsupported(
            folder, "topk_threshold", float(found["topk_threshold"]), "one that training has moved from 0"
        )
    weights = tensor_format.to_weights(found)
    check_agreement(folder, d_in=(cfg.get("d_in"), len(weights.b_dec)), d_sae=(cfg.get("d_sae"), len(weights.b_enc)))
    stated = _stated(folder, cfg, tensor_format, len(weights.b_enc))
    scaled = cfg.get("normalize_activations") == SCALED
    if scaled and input_scale is None:
        raise UnknownScaleError(
            f"{folder}: normalize_activations is {SCALED!r}: activations were multiplied by sqrt(d_in) / their mean "
            "length before training, and the folder does not hold this number; give it as --input-scale "
            "(input_scale)"
        )
    sae = build_autoencoder(
        folder,
        shift_b_enc(weights, -1) if flag(folder, cfg, "apply_b_dec_to_input", True) else weights,
        arch=tensor_format.arch,
        stated=stated,
        precision=tensors["W_dec"].dtype,
        ranks_lengths=tensor_format.states_k and flag(folder, cfg, "rescale_acts_by_decoder_norm", False),
        input_scale=input_scale,
    )
    said = f"normalize_activations is {cfg.get('normalize_activations', 'not stated')!r}"
    return ForeignSAE(sae, stated.has_k, _origin(folder, cfg), said)


def write_saelens(
    sae: SparseAutoencoder,
    folder: str | Path,
    *,
    origin: Origin | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write `sae`, folded, so that SAELens 6 computes the same codes and reconstructions from raw activations.

    topk and gated keep their architecture, as does standard without thresholds; all others become jumprelu, the form in
    which SAELens itself saves BatchTopK. Model and site of `origin` are its `model_name` and `hook_name`; `metadata`
    holds further entries of SAELens. Our own configuration is written too, so that `read_saelens` restores it.
    """
    weights = folded_weights(sae)
    name = format_for(FORMATS, sae.config.arch, weights)
    theirs = FORMATS[name].from_weights
    assert theirs is not None
    cfg: dict[str, Any] = {
        "architecture": name,
        "d_in": sae.config.d_model,
        "d_sae": sae.config.n_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if name == "topk":
        cfg |= {"k": sae.config.k, "rescale_acts_by_decoder_norm": False}
    versions = {"sae_lens_version": WRITTEN_VERSION, "sae_lens_training_version": None}
    named = {} if origin is None else {"model_name": origin.model, "hook_name": origin.site}
    cfg["metadata"] = {**named, **(metadata or {}), **versions, **own_entries(sae, origin)}
    data = safetensors.torch.save(as_float32(theirs(weights, sae.config)))
    write_files(Path(folder), WEIGHTS, data, HEADER, cfg)


def _renamed(folder: Path, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON with an `architecture`, also from versions in which topk was an activation function."""
    activation = cfg.get("activation_fn", cfg.get("activation_fn_str", "relu"))
    named = {"architecture": "standard"} | dict(cfg) | {"activation_fn": activation}
    if activation == "topk" and named["architecture"] in ("standard", "topk"):
        k = json_object(folder, cfg, "activation_fn_kwargs").get("k", cfg.get("k"))
        return named | {"architecture": "topk", "k": k, "activation_fn": "relu"}
    return named


def _current(folder: Path, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The tensors as in version 6: thresholds instead of their logarithms, without factors equal to 1."""
    current = dict(tensors)
    if "log_threshold" in current:
        current["threshold"] = current.pop("log_threshold").double().exp()
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        factor = current.pop(name, torch.ones(1))
        if not bool((factor == 1).all()):
            raise unsupported(folder, name, factor.flatten()[:4].tolist(), "1 (codes not rescaled after training)")
    return current


def _check_input(folder: Path, cfg: Mapping[str, Any]) -> None:
    """Raise a `CheckpointError` if activations or codes are changed by more than the five tensors."""
    allowed: dict[str, tuple[object, ...]] = {
        "normalize_activations": ("none", None, False, SCALED),
        "reshape_activations": ("none", "hook_z", None),
        "activation_fn": ("relu",),
    }
    for name, values in allowed.items():
        if cfg.get(name) not in values:
            raise unsupported(folder, name, cfg[name], ", ".join(repr(value) for value in values))


def _stated(folder: Path, cfg: Mapping[str, Any], tensor_format: TensorFormat, n_features: int) -> StatedConfig:
    metadata = json_object(folder, cfg, "metadata")
    own, stops = metadata.get(CONFIG_KEY), None
    if tensor_format.arch == "matryoshka":
        widths = cfg.get("matryoshka_widths") or []
        if not isinstance(widths, list):
            raise unsupported(folder, "matryoshka_widths", widths, "a list of whole numbers")
        stops = [whole_number(folder, "matryoshka_widths", stop) for stop in widths if stop != n_features]
        stops.append(n_features)
    if tensor_format.states_k:
        return StatedConfig(k=whole_number(folder, "k", cfg.get("k")), group_stops=stops, own=own)
    details = json_object(folder, metadata, "training_architecture_details")
    target = details.get("k", details.get("target_l0"))
    return StatedConfig(k=int(target) if own is None and is_whole_number(target) else None, own=own)


def _origin(folder: Path, cfg: Mapping[str, Any]) -> Origin:
    """Model and site: in the metadata, before version 6 beside the other entries, where a site was a `hook_point`."""
    metadata = json_object(folder, cfg, "metadata")
    return own_origin(folder, metadata) or Origin(
        model=first_text(metadata.get("model_name"), cfg.get("model_name")),
        site=first_text(metadata.get("hook_name"), cfg.get("hook_name"), cfg.get("hook_point")),
    )
