"""Checkpoint folders: which family a folder holds, and its model.

A family is one record of `FAMILIES`; nothing else names it. Weights are read without unpickling code: safetensors, or
`torch.load(weights_only=True)`. The shipped `mini` model is an ordinary scGPT folder inside this package; its weights
are stored as float16 and widened to float32 on loading.
"""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sae_core.errors import CheckpointError
from sae_core.scfm.foundation import FoundationModel
from sae_core.scfm.scgpt import ScGPT, ScGPTConfig, init_weights, scgpt_from_weights
from sae_core.scfm.vocabulary import read_json, read_vocabulary

MINI = Path(__file__).parent / "mini"
_WEIGHTS = ("model.safetensors", "best_model.pt")


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a family's folder is known and read; `files` is for people."""

    name: str
    files: str
    matches: Callable[[Path], bool]
    load: Callable[[Path, bool, int], FoundationModel]


def load_model(
    path: str | Path = "mini",
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    random_init: bool = False,
    seed: int = 0,
) -> FoundationModel:
    """Model in a checkpoint folder, ready to be run; "mini" is the shipped one ("./mini" a folder of that name).

    `random_init` keeps the architecture and vocabulary and draws the weights from `seed`: the control for whatever a
    pretrained model is said to show. `dtype` None is float32.

    Raises:
        CheckpointError: no folder, no known family, or files that do not fit together.
    """
    folder = MINI if str(path) == "mini" else Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; allowed: 'mini' or a checkpoint folder. {_known()}")
    family = next((family for family in FAMILIES if family.matches(folder)), None)
    if family is None:
        held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(f"{folder} is the folder of no known family; it holds {held}. {_known()}")
    model = family.load(folder, random_init, seed)
    model.name = "mini" if folder == MINI else folder.resolve().name
    if random_init:
        model.digest = hashlib.sha256(f"{model.digest} random:{seed}".encode()).hexdigest()
    return model.to(device=device, dtype=dtype or torch.float32).eval().requires_grad_(False)


def _load_scgpt(folder: Path, random_init: bool, seed: int) -> ScGPT:
    weights_path = next(folder / name for name in _WEIGHTS if (folder / name).is_file())
    ensembl_path = folder / "vocab_ensembl.json"
    ensembl = ensembl_path if ensembl_path.is_file() else None
    try:
        model = scgpt_from_weights(
            ScGPTConfig.from_args(read_json(folder / "args.json")),
            read_vocabulary(folder / "vocab.json", ensembl_path=ensembl),
            read_weights(weights_path),
        )
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    if random_init:
        init_weights(model, seed=seed)
    model.digest = _digest([folder / "args.json", folder / "vocab.json", *([ensembl] if ensembl else []), weights_path])
    return model


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file or of a torch file, which may hold tensors only.

    Raises:
        CheckpointError: unreadable, or the file holds anything besides tensors by name.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            # torch warns of an unusual pickle protocol before it refuses the file; the error below says it all
            warnings.simplefilter("ignore", UserWarning)
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise CheckpointError(
            f"{path.name} cannot be read as plain tensors ({type(error).__name__}); pickled code is never run: save "
            "the bare state dict, or convert it to model.safetensors"
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"{path.name} holds more than tensors by name; allowed: a bare state dict")
    return weights


def _digest(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _is_scgpt(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("args.json", "vocab.json")) and any(
        (folder / name).is_file() for name in _WEIGHTS
    )


def _known() -> str:
    return "Known folders: " + "; ".join(f"{family.name}: {family.files}" for family in FAMILIES)


FAMILIES = (
    Family(
        name="scgpt",
        files="args.json, vocab.json and best_model.pt (or model.safetensors)",
        matches=_is_scgpt,
        load=_load_scgpt,
    ),
)
