"""Autoencoders and training states on disk: tensors as safetensors, everything else as JSON, nothing pickled.

A folder holds `sae.safetensors` and `config.json` (a training state: `trainer.safetensors` and `trainer.json`). Each
file is written under a temporary name, flushed and renamed. The JSON is written last and holds the sha256 of the
tensors, so a folder has either the old content or the new, and an interrupted save is detected. Weights are saved with
the normaliser folded in.

Version 2 holds one threshold for each feature. Version 1, with one threshold for all features and no learned
thresholds, can still be read.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from sae_core.checkpoint_files import read_text
from sae_core.errors import CheckpointError, ConfigError
from sae_core.incomplete_files import check_complete
from sae_core.sae.autoencoder import SparseAutoencoder
from sae_core.sae.config import SAEConfig
from sae_core.sae.trainer import TrainerState

SAE_FORMAT, TRAINER_FORMAT, VERSION = "scsae.sae", "scsae.trainer", 2
_WEIGHTS = ("W_enc", "W_dec", "b_enc", "b_dec", "theta")


class SAEInfo(NamedTuple):
    """The content of `config.json`."""

    config: SAEConfig
    extra: dict[str, Any]
    weights_sha256: str


def save_sae(sae: SparseAutoencoder, folder: str | Path, extra: Mapping[str, Any] | None = None) -> None:
    """Write an autoencoder with the normaliser folded in, and `extra` JSON values such as its metrics."""
    state = sae.folded().state_dict()
    header = {"config": sae.config.to_dict(), "extra": dict(extra or {})}
    _write(Path(folder), "sae.safetensors", "config.json", SAE_FORMAT, {name: state[name] for name in _WEIGHTS}, header)


def load_sae(folder: str | Path, *, device: str = "cpu") -> SparseAutoencoder:
    """The autoencoder in a folder, without gradients; a `CheckpointError` if the folder does not hold a complete one.

    >>> sae = load_sae("scsae-store/saes/RUN")  # RUN: the id that `scsae train` shows
    >>> codes = sae.encode(activations)  # activations [token d_model]
    """
    info = read_info(folder)
    tensors = _read_tensors(Path(folder) / "sae.safetensors", info.weights_sha256)
    shape = (info.config.n_features, info.config.d_model)
    if "theta" in tensors and "W_dec" in tensors and tensors["W_dec"].shape == shape:
        _repeat_theta(tensors, "theta", info.config)
    # before an autoencoder is built, which may not fit into memory where the configuration has a wrong size
    expected = {"W_enc": shape, "W_dec": shape, "b_enc": shape[:1], "b_dec": shape[1:], "theta": shape[:1]}
    wrong = sorted(set(_WEIGHTS) ^ set(tensors)) or [n for n in _WEIGHTS if tensors[n].shape != expected[n]]
    if wrong:
        raise CheckpointError(
            f"{folder}: the tensors {', '.join(wrong)} are missing, unexpected or misshapen for {info.config}. "
            "Save the autoencoder again with save_sae."
        )
    sae = SparseAutoencoder(info.config)
    sae.load_state_dict(sae.state_dict() | tensors)
    return sae.requires_grad_(False).to(device)


def read_info(folder: str | Path) -> SAEInfo:
    """The configuration and extra values of a saved autoencoder, without reading its weights.

    Raises:
        CheckpointError: `config.json` is missing or not valid.
    """
    header = _read_header(Path(folder) / "config.json", SAE_FORMAT)
    try:
        config = SAEConfig.from_dict(header["config"])
    except ConfigError as error:
        raise CheckpointError(f"{folder}/config.json does not hold a valid configuration: {error}") from error
    return SAEInfo(config, header["extra"], header["weights_sha256"])


def save_training(state: TrainerState, folder: str | Path, extra: Mapping[str, Any] | None = None) -> None:
    """Write the state of a trainer, and `extra` JSON values such as the position in the data stream."""
    header = {"meta": state.meta, "extra": dict(extra or {})}
    _write(Path(folder), "trainer.safetensors", "trainer.json", TRAINER_FORMAT, state.tensors, header)


def load_training(folder: str | Path) -> tuple[TrainerState, dict[str, Any]]:
    """The state of a trainer and the extra values that were saved with it.

    Raises:
        CheckpointError: the folder does not hold a complete training state.
    """
    header = _read_header(Path(folder) / "trainer.json", TRAINER_FORMAT)
    tensors, meta = _read_tensors(Path(folder) / "trainer.safetensors", header["weights_sha256"]), header["meta"]
    if header["version"] == 1:
        config = SAEConfig.from_dict(meta["sae_config"])
        _repeat_theta(tensors, "sae.theta", config)
        tensors["r_mag"] = torch.zeros(config.n_features)
        meta = meta | {"n_dead_before": 0}
    return TrainerState(tensors, meta), header["extra"]


def _repeat_theta(tensors: dict[str, Tensor], name: str, config: SAEConfig) -> None:
    """Repeat the one threshold of version 1 for every feature."""
    if name in tensors and tensors[name].ndim == 0:
        tensors[name] = tensors[name].repeat(config.n_features)


def _write(
    folder: Path, weights: str, header: str, kind: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    data = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    body = {"format": kind, "version": VERSION, "weights_sha256": hashlib.sha256(data).hexdigest(), **values}
    try:
        text = json.dumps(body, indent=1, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the extra values of {folder / header} are not plain JSON: {error}.") from error
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / weights, data)
    write_atomically(folder / header, text.encode())


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name in its folder, flush it and rename it, so that it is never incomplete."""
    temporary = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read_header(path: Path, kind: str) -> dict[str, Any]:
    if not path.exists() and not path.is_symlink():
        raise CheckpointError(f"{path} does not exist: give a folder that `scsae train` or save_sae has written.")
    try:
        header = json.loads(read_text(path))
    except (RecursionError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Save it again.") from error
    found = (header.get("format"), header.get("version")) if isinstance(header, dict) else (None, None)
    if found not in [(kind, version) for version in range(1, VERSION + 1)]:
        raise CheckpointError(
            f"{path} has format {found}; this version of scsae reads {kind!r}, versions 1 to {VERSION}. Save it again."
        )
    content = "config" if kind == SAE_FORMAT else "meta"
    for name, expected in {"weights_sha256": str, "extra": dict, content: dict}.items():
        if name not in header:
            raise CheckpointError(f"{path} lacks {name}. Save it again.")
        if not isinstance(header[name], expected):
            allowed = "a text" if expected is str else "a JSON object"
            raise CheckpointError(f"{path} has {name} {header[name]!r}; allowed: {allowed}. Save it again.")
    return dict(header)


def _read_tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    check_complete(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Save it again.") from error
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise CheckpointError(
            f"{path} does not match the JSON file in its folder (sha256 {found[:12]}..., expected {sha256[:12]}...): "
            "it is damaged, or a save was interrupted. Save it again."
        )
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}. Save it again.") from error
