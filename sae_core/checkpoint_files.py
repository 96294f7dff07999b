"""Reads the files of checkpoints (weights, JSON, dictionaries) without running any code in them.

Weights come from safetensors or `torch.load(weights_only=True)`. Geneformer's dictionaries are pickles that hold numpy
scalars, and scFoundation's torch file holds settings beside its tensors; both are read by `sae_core.unpickling`, which
runs nothing.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import struct
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from sae_core.errors import CheckpointError
from sae_core.incomplete_files import check_complete
from sae_core.torch_files import read_torch_objects
from sae_core.unpickling import NUMBERS, UnpicklingError, unpickle

INDEX = ".index.json"
"""End of the name of the file that lists the parts of weights that are split over several files."""
_WRAPPERS = ("model_state_dict", "state_dict", "model")
"""Keys under which training scripts keep the state dict beside other values."""
_SHOWN = 8
_MAX_PICKLE_BYTES = 1 << 28
_MALFORMED = (struct.error, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError)
"""What torch raises on a file whose content is not as the format has it."""
_TRUNCATED = re.compile("EOF|truncated|ran out of input|central directory|requires a buffer", re.IGNORECASE)
_ADAPTER = re.compile(
    r"lora_|base_model\.model\.|\.base_layer\.|ia3_|prompt_embeddings|prefix_encoder|(^|[._])\w*adapter", re.IGNORECASE
)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        CheckpointError: the file cannot be read, is not whole (`check_complete`) or is not UTF-8.
    """
    check_complete(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file cannot be read, is not whole, is not JSON or does not hold an object.
    """
    text = read_text(path)
    try:
        value = json.loads(text)
    except RecursionError:
        raise CheckpointError(f"cannot read {path}: it is nested too deeply; allowed: a JSON object") from None
    except ValueError as error:
        if text.lstrip().startswith("{") and not text.rstrip().endswith("}"):
            raise _cut_off(path) from error
        raise CheckpointError(f"cannot read {path}: {error}; it begins {text.strip()[:40]!r}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; allowed: a JSON object")
    return value


class _YamlLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which also takes 1e-5 as a number, as OmegaConf and YAML 1.2 do."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The fields of a YAML file. Tags that would make objects are refused.

    Raises:
        CheckpointError: the file cannot be read, is not whole, is not YAML or does not hold names and values.
    """
    text = read_text(path)
    try:
        value = yaml.load(text, Loader=_YamlLoader)
    except RecursionError:
        raise CheckpointError(
            f"cannot read {path}: it is nested too deeply; allowed: fields and their values"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        raise CheckpointError(f"cannot read {path} as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; allowed: fields and their values")
    return value


def weight_files(path: Path) -> tuple[Path, ...]:
    """The files of weights: `path` itself, or the index `path` and the parts that it lists.

    Raises:
        CheckpointError: the index cannot be read or lists a file outside its folder.
    """
    if not path.name.endswith(INDEX):
        return (path,)
    of_tensor = read_json(path).get("weight_map")
    if not isinstance(of_tensor, dict) or not of_tensor or not all(isinstance(n, str) for n in of_tensor.values()):
        raise CheckpointError(f"{path} has no weight_map from tensors to files; fetch the file again")
    names = sorted(set(of_tensor.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{path} lists {outside[0]!r}; allowed: names of files in its own folder")
    return (path, *(path.parent / name for name in names))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name, from a .safetensors file, a torch file that holds nothing else, or an index of such files.

    Raises:
        CheckpointError: a file cannot be read, is not whole, holds other objects, or is not what the index says.
    """
    if path.name.endswith(INDEX):
        return _read_parts(path)
    weights = _read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    inner = (weights[name] for name in _WRAPPERS if name in weights) if isinstance(weights, dict) else ()
    found = next((held for held in (weights, *inner) if _is_state_dict(held)), None)
    if found is None:
        raise CheckpointError(
            f"{path.name} holds other objects than tensors by name; allowed: a bare state dict, or one under "
            f"{', '.join(_WRAPPERS)}"
        )
    return found


def weight_names(path: Path) -> list[str]:
    """Names of the tensors that `read_weights` gives, without their values where the format allows it.

    Raises:
        CheckpointError: as in `read_weights`.
    """
    if path.suffix != ".safetensors":
        return list(read_weights(path))
    check_complete(path)
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path.name} cannot be read as safetensors: {error}") from error


def _is_state_dict(held: object) -> TypeGuard[dict[str, Tensor]]:
    return isinstance(held, dict) and bool(held) and all(isinstance(value, Tensor) for value in held.values())


def _read_parts(index: Path) -> dict[str, Tensor]:
    """Tensors of all files that an index lists, exactly those that it names."""
    of_tensor = read_json(index).get("weight_map", {})
    weights: dict[str, Tensor] = {}
    for path in weight_files(index)[1:]:
        if not path.is_file():
            raise CheckpointError(f"{path.name}, which {index.name} lists, is not in {path.parent}; fetch it")
        for name, value in read_weights(path).items():
            if of_tensor.get(name) != path.name:
                raise CheckpointError(
                    f"{path.name} holds {name!r}, which {index.name} gives to {of_tensor.get(name)!r}; the files are "
                    "of different checkpoints: fetch all of them again"
                )
            weights[name] = value
    if missing := [name for name in of_tensor if name not in weights]:
        raise CheckpointError(
            f"{of_tensor[missing[0]]} lacks {missing[0]!r}, which {index.name} gives to it; the files are of different "
            "checkpoints: fetch all of them again"
        )
    return weights


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    check_complete(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path.name} cannot be read as safetensors: {error}") from error


def read_torch(path: Path) -> Any:
    """Tensors and plain containers in a torch file.

    Zip files (torch 1.6 and later) are memory-mapped, so only the tensors that are used are read.

    Raises:
        CheckpointError: the file cannot be read, is not whole, or holds other objects.
    """
    check_complete(path)
    try:
        with warnings.catch_warnings():
            # torch warns of an unusual pickle protocol before it refuses the file; the error below is enough
            warnings.simplefilter("ignore", UserWarning)
            mapped = _starts_as_zip(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, *_MALFORMED) as error:
        if _TRUNCATED.search(str(error)) or isinstance(error, EOFError):
            raise _cut_off(path) from error
        raise CheckpointError(
            f"{path.name} cannot be read as plain tensors ({type(error).__name__}); pickled code is never run; save "
            "the bare state dict or convert it to model.safetensors"
        ) from error


def _cut_off(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is incomplete: it ends after {path.stat().st_size:,} bytes in the middle of its content; fetch the "
        "file again"
    )


def _starts_as_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def renamed(name: str, renames: Iterable[tuple[re.Pattern[str], str]]) -> str:
    """The name of a weight after the renames, one after another."""
    for pattern, replacement in renames:
        name = pattern.sub(replacement, name)
    return name


def load_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    what: str,
    official: Callable[[str], str] = str,
    assign: bool = False,
) -> None:
    """Load all `weights` by name into `model`.

    Args:
        model: receives the weights.
        weights: by the names of `model.state_dict()`.
        what: the file or config that determines the expected shapes, for error messages.
        official: translates a name into that of the checkpoint file, for error messages.
        assign: take the tensors themselves and not copies, so that the weights are in memory once.

    Raises:
        CheckpointError: a weight is missing, unexpected, of another shape or not finite; the message names it.
    """
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    refuse_adapters(weights)
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
    bad = [official(key) for key, value in weights.items() if not _is_finite(value)]
    if bad:
        raise CheckpointError(
            f"{len(bad)} weights hold values that are not finite (nan or inf): {', '.join(bad[:_SHOWN])}; the file was "
            "damaged, converted wrongly or saved from a training that diverged; fetch or convert it again"
        )
    model.load_state_dict(dict(weights), assign=assign)


def wrong_rows(table: str, n_rows: int, file: str, n_names: int, *, what: str, likely: str) -> CheckpointError:
    """The error for a table that has more or fewer rows than there are names by which its rows are looked up.

    Args:
        table: name of the tensor or file that has the rows.
        n_rows: its number of rows.
        file: name of the file of names.
        n_names: how many it names.
        what: what the names are of.
        likely: the file that probably belongs to the table.
    """
    return CheckpointError(
        f"{table} has {n_rows} rows but {file} names {n_names} {what}, so names would get the rows of others; give "
        f"{likely}"
    )


def refuse_adapters(names: Iterable[str]) -> None:
    """Check that no name of a tensor is that of an adapter, which would have to be added to the base model.

    Raises:
        CheckpointError: one is; the message names it and says what to do.
    """
    found = [name for name in names if _ADAPTER.search(name)]
    if found:
        raise CheckpointError(
            f"the weights hold an adapter ({len(found)} tensors, e.g. {found[0]!r}), which changes the network; merge "
            "LoRA into the base model (in peft: model.merge_and_unload(), then save the state dict), or give the "
            "checkpoint without adapters"
        )


def _is_finite(weight: Tensor) -> bool:
    # one pass without a copy: a nan is both the smallest and the largest value (0.1 s for 500 MB)
    return not weight.is_floating_point() or not weight.numel() or all(map(torch.isfinite, weight.aminmax()))


def read_dictionary(path: Path) -> dict[str, Any]:
    """Dictionary from names to numbers or names, in a .json or .pkl file. Pickled code is never run.

    Raises:
        CheckpointError: the file cannot be read, or it holds anything else.
    """
    if path.suffix == ".json":
        found: Any = read_json(path)
    else:
        found = _read_pickle(path)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}; allowed: a dictionary of names and numbers")
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, str | int | float):
            raise CheckpointError(
                f"{path} holds {type(key).__name__} {str(key)[:40]!r}: {type(value).__name__}; "
                "allowed: names to numbers or names"
            )
    return dict(found)


def _read_pickle(path: Path) -> Any:
    check_complete(path)
    try:
        if (size := path.stat().st_size) > _MAX_PICKLE_BYTES:
            raise UnpicklingError(f"it has {size:,} bytes; allowed: {_MAX_PICKLE_BYTES:,}")
        return unpickle(path.read_bytes(), NUMBERS).value
    except EOFError as error:
        raise _cut_off(path) from error
    except (OSError, UnpicklingError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a dictionary of names and numbers ({error}); pickled code is never run"
        ) from error


def read_torch_with_settings(path: Path) -> Any:
    """Tensors, plain values and settings of other packages in a torch file (`sae_core.torch_files`).

    Raises:
        CheckpointError: the file cannot be read, is not whole, or holds what could run.
    """
    check_complete(path)
    try:
        return read_torch_objects(path)
    except EOFError as error:
        raise _cut_off(path) from error
    except (OSError, UnpicklingError) as error:
        raise CheckpointError(
            f"{path} cannot be read as tensors and settings ({error}); pickled code is never run; give the file as its "
            "authors publish it"
        ) from error


def digest_names(names: Sequence[str]) -> str:
    """Digest of names in their order, by which an official vocabulary is recognised."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def digest_files(paths: Sequence[Path], *, salt: str = "") -> str:
    """Sha256 of names, sizes and contents of files, in the order given, after `salt`; about 1 GB/s."""
    digest = hashlib.sha256(salt.encode())
    for path in paths:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
