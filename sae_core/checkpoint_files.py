"""Reads the files of checkpoints (weights, JSON, dictionaries) without running any code in them.

Weights come from safetensors or `torch.load(weights_only=True)`. Geneformer's dictionaries are pickles that hold numpy
scalars; they are read by an unpickler that allows a few harmless constructors and refuses every other name, so a pickle
can build a dictionary of names and numbers and nothing else.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sae_core.errors import CheckpointError

_SHOWN = 8


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file cannot be read, is not JSON or does not hold an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; allowed: a JSON object")
    return value


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name, from a .safetensors file or a torch file that holds nothing else.

    Raises:
        CheckpointError: the file cannot be read, or it holds other objects.
    """
    weights = _read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"{path.name} holds other objects than tensors by name; allowed: a bare state dict")
    return weights


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path.name} cannot be read as safetensors: {error}") from error


def read_torch(path: Path) -> Any:
    """Tensors and plain containers in a torch file.

    Zip files (torch 1.6 and later) are memory-mapped, so only the tensors that are used are read.

    Raises:
        CheckpointError: the file cannot be read, or it holds other objects.
    """
    try:
        with warnings.catch_warnings():
            # torch warns of an unusual pickle protocol before it refuses the file; the error below is enough
            warnings.simplefilter("ignore", UserWarning)
            mapped = _starts_as_zip(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path.name} cannot be read as plain tensors ({type(error).__name__}); pickled code is never run; save "
            "the bare state dict or convert it to model.safetensors"
        ) from error


def _starts_as_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def load_weights(
    model: nn.Module, weights: Mapping[str, Tensor], *, what: str, official: Callable[[str], str] = str
) -> None:
    """Load all `weights` by name into `model`.

    Args:
        model: receives the weights.
        weights: by the names of `model.state_dict()`.
        what: the file or config that determines the expected shapes, for error messages.
        official: translates a name into that of the checkpoint file, for error messages.

    Raises:
        CheckpointError: a weight is missing, unexpected or of another shape; the message names it.
    """
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    problems = [f"missing {official(key)}" for key in expected if key not in weights]
    problems += [f"unexpected {official(key)}" for key in weights if key not in expected]
    problems += [
        f"{official(key)} is {tuple(value.shape)} instead of {expected[key]}"
        for key, value in weights.items()
        if key in expected and tuple(value.shape) != expected[key]
    ]
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(f"the weights do not fit {what}: {'; '.join(problems[:_SHOWN])}{more}")
    model.load_state_dict(dict(weights))


def read_dictionary(path: Path) -> dict[str, Any]:
    """Dictionary from names to numbers or names, in a .json or .pkl file. Pickled code is never run.

    Raises:
        CheckpointError: the file cannot be read, or it holds anything else.
    """
    if path.suffix == ".json":
        found: Any = read_json(path)
    else:
        try:
            found = _DictionaryUnpickler(io.BytesIO(path.read_bytes())).load()
        except (OSError, EOFError, ValueError, TypeError, IndexError, AttributeError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{path} cannot be read as a dictionary of names and numbers ({error}); pickled code is never run"
            ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}; allowed: a dictionary of names and numbers")
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, str | int | float):
            raise CheckpointError(
                f"{path} holds {type(key).__name__} {str(key)[:40]!r}: {type(value).__name__}; "
                "allowed: names to numbers or names"
            )
    return dict(found)


class _Dtype:
    """Replaces numpy.dtype while unpickling: holds a type code and a byte order, and has no other behaviour."""

    def __init__(self, code: str, *_: object) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: Sequence[Any]) -> None:
        self.order = state[1]


def _scalar(dtype: _Dtype, raw: bytes) -> int | float:
    kind = np.dtype(dtype.code).newbyteorder(">" if dtype.order == ">" else "<" if dtype.order == "<" else "=")
    if kind.kind not in "iufb":
        raise pickle.UnpicklingError(f"a numpy scalar of type {dtype.code!r} is not a number")
    number: int | float = np.frombuffer(raw, dtype=kind, count=1)[0].item()
    return number


def _latin1(text: str, encoding: str) -> bytes:
    """Bytes of a scalar, which pickle protocol 2 writes as text."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r} is not allowed")
    return text.encode("latin1")


class _DictionaryUnpickler(pickle.Unpickler):
    allowed: Mapping[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "dtype"): _Dtype,
        ("numpy.core.multiarray", "scalar"): _scalar,
        ("numpy._core.multiarray", "scalar"): _scalar,
        ("_codecs", "encode"): _latin1,
        ("collections", "OrderedDict"): OrderedDict,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not allowed")
        return self.allowed[module, name]


def digest_files(paths: Sequence[Path], *, salt: str = "") -> str:
    """Sha256 of names, sizes and contents of files, in the order given, after `salt`; about 1 GB/s."""
    digest = hashlib.sha256(salt.encode())
    for path in paths:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
