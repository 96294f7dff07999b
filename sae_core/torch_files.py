"""Reads torch files that hold more than tensors: settings with paths, numpy scalars and objects of other packages.

`torch.load(weights_only=True)` refuses such files, and without it a file can run anything. Here the pickle in the file
is read by `sae_core.unpickling`: tensors are made from the file's storages, paths become text, numpy scalars numbers,
and objects of classes outside Python's library (the configs of other packages) dictionaries of their items and
attributes. Any other call is refused. Zip files (torch 1.6 and later) are memory-mapped, older ones are read into
memory.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_core.unpickling import NUMBERS, Name, Record, Table, Unpickled, UnpicklingError, unpickle

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_PICKLE_BYTES = 1 << 26
_LOCAL_HEADER = 30
_DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}


class _Storage(NamedTuple):
    memory: torch.UntypedStorage
    dtype: torch.dtype
    n_items: int


def read_torch_objects(path: Path) -> Any:
    """Tensors, plain values and `Record`s in a torch file; tensors of a zip file are mapped, not read.

    Raises:
        UnpicklingError: the file is no torch file, or it holds what is not allowed.
        EOFError: it ends too early.
        OSError: it cannot be read.
    """
    if zipfile.is_zipfile(path):
        return _read_zip(path)
    return _read_legacy(path)


def _read_zip(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {info.filename: info for info in archive.infolist()}
            home = next((name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")), None)
            if home is None:
                raise UnpicklingError("it is a zip file without data.pkl, so no torch file")
            if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()):
                raise UnpicklingError("it is a compressed zip file, which torch does not write")
            if entries[f"{home}data.pkl"].file_size > _MAX_PICKLE_BYTES:
                raise UnpicklingError(f"its data.pkl has more than {_MAX_PICKLE_BYTES:,} bytes")
            order = archive.read(f"{home}byteorder") if f"{home}byteorder" in entries else b"little"
            if order != b"little":
                raise UnpicklingError(f"its byte order is {order[:8]!r}; allowed: little")
            data = archive.read(f"{home}data.pkl")
    except zipfile.BadZipFile as error:
        raise UnpicklingError(f"its table of contents is damaged ({error})") from error
    size = path.stat().st_size
    whole = torch.UntypedStorage.from_file(str(path), False, size)

    def memory(key: str, n_bytes: int) -> torch.UntypedStorage:
        info = entries.get(f"{home}data/{key}")
        if info is None or info.file_size < n_bytes:
            raise UnpicklingError(f"tensor data {key[:40]!r} is missing or too short")
        with path.open("rb") as file:
            file.seek(info.header_offset)
            header = file.read(_LOCAL_HEADER)
        if len(header) < _LOCAL_HEADER or not header.startswith(b"PK\x03\x04"):
            raise UnpicklingError(f"tensor data {key[:40]!r} has no header")
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = info.header_offset + _LOCAL_HEADER + lengths
        if start + n_bytes > size:
            raise EOFError("it is truncated")
        part: torch.UntypedStorage = whole[start : start + n_bytes]
        return part

    return unpickle(data, _calls(), with_records=True, persistent=_storages(memory)).value


def _read_legacy(path: Path) -> Any:
    """Value in a file of torch before 1.6: four pickles, then the data of the storages in the order of the last one."""
    data = path.read_bytes()
    made: dict[str, torch.UntypedStorage] = {}
    left = len(data)

    def memory(key: str, n_bytes: int) -> torch.UntypedStorage:
        nonlocal left
        if key not in made:
            left -= n_bytes
            if left < 0:
                raise EOFError("it is truncated")
            made[key] = torch.empty(n_bytes, dtype=torch.uint8).untyped_storage()
        if made[key].nbytes() < n_bytes:
            raise UnpicklingError(f"tensor data {key[:40]!r} has two sizes")
        return made[key]

    items: dict[str, int] = {}
    magic = unpickle(data, {})
    if magic.value != _LEGACY_MAGIC:
        raise UnpicklingError("it begins with no number of torch's, so it is no torch file")
    version = unpickle(data, {}, start=magic.end)
    system = unpickle(data, {}, start=version.end)
    if not isinstance(system.value, dict) or system.value.get("little_endian") is not True:
        raise UnpicklingError("its byte order is not stated as little-endian")
    found = unpickle(data, _calls(), start=system.end, with_records=True, persistent=_storages(memory, items))
    keys = unpickle(data, {}, start=found.end)
    _fill(data, keys, made, items)
    return found.value


def _fill(data: bytes, keys: Unpickled, made: dict[str, torch.UntypedStorage], items: dict[str, int]) -> None:
    """Copy into each storage its data, which follow a number of items."""
    at = keys.end
    if not isinstance(keys.value, list) or set(map(str, keys.value)) != set(made):
        raise UnpicklingError("its tensors and the list of its data differ")
    for key in map(str, keys.value):
        size = made[key].nbytes()
        if int.from_bytes(data[at : at + 8], "little") != items[key]:
            raise UnpicklingError(f"tensor data {key[:40]!r} has another size than its tensor")
        at += 8
        if at + size > len(data):
            raise EOFError("it is truncated")
        if size:
            target = torch.empty(0, dtype=torch.uint8).set_(made[key])
            target.copy_(torch.frombuffer(bytearray(data[at : at + size]), dtype=torch.uint8))
        at += size


def _storages(
    memory: Callable[[str, int], torch.UntypedStorage], items: dict[str, int] | None = None
) -> Callable[[Any], _Storage]:
    """What a persistent id stands for: ("storage", type, key, device, number of items), and a view in older files."""

    def storage(identifier: Any) -> _Storage:
        match identifier:
            case ("storage", Name(path), str(key), str(), int(n_items)) if n_items >= 0:
                pass
            case ("storage", Name(path), str(key), str(), int(n_items), None) if n_items >= 0:
                pass
            case _:
                raise UnpicklingError("a persistent id is no storage of a tensor")
        dtype = _DTYPES.get(path.removeprefix("torch.").removesuffix("Storage"))
        if dtype is None:
            raise UnpicklingError(f"tensors of {path} are not allowed")
        if items is not None:
            items[key] = n_items
        return _Storage(memory(key, n_items * dtype.itemsize), dtype, n_items)

    return storage


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """Tensor on a storage; it may not reach beyond the storage or repeat its items."""
    if type(storage) is not _Storage or type(offset) is not int or not (_is_shape(size) and _is_shape(stride)):
        raise UnpicklingError("a tensor is malformed")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    n_items = math.prod(size)
    if offset < 0 or n_items > storage.n_items or (n_items > 0 and last >= storage.n_items):
        raise UnpicklingError(f"a tensor of shape {size} reaches beyond its {storage.n_items} items")
    return torch.empty(0, dtype=storage.dtype).set_(storage.memory, offset, size, stride)


def _is_shape(values: Any) -> bool:
    return isinstance(values, tuple) and len(values) <= 16 and all(type(n) is int and 0 <= n < 1 << 48 for n in values)


def _parameter(tensor: Any, *_: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise UnpicklingError("a parameter is no tensor")
    return tensor


def _texts(*parts: Any) -> tuple[str, ...]:
    if not all(isinstance(part, str) for part in parts):
        raise UnpicklingError("a path is no text")
    return parts


def _posix(*parts: Any) -> str:
    return str(PurePosixPath(*_texts(*parts)))


def _windows(*parts: Any) -> str:
    return str(PureWindowsPath(*_texts(*parts)))


def _device(*parts: Any) -> str:
    return ":".join(map(str, parts[:2]))


def _record(*_: Any) -> Record:
    return Record()


def _reconstructed(_class: Any, _base: Any, state: Any = None) -> Record:
    """An object as protocols 0 and 1 write it: its class, the built-in class below it, and that one's content."""
    return Record(state if isinstance(state, dict) else {})


def _list(values: Any = ()) -> list[Any]:
    if not isinstance(values, list | tuple):
        raise UnpicklingError("a set is malformed")
    return list(values)


def _refused(*_: Any) -> Any:
    raise UnpicklingError("it calls a class that may only be named")


def _calls() -> Table:
    paths: dict[str, Callable[..., Any]] = {}
    for module in ("pathlib", "pathlib._local"):
        paths |= {f"{module}.{name}": _posix for name in ("PosixPath", "PurePosixPath", "Path", "PurePath")}
        paths |= {f"{module}.{name}": _windows for name in ("WindowsPath", "PureWindowsPath")}
    named = [f"torch.{name}Storage" for name in _DTYPES] + ["torch.storage.UntypedStorage", "numpy.ndarray"]
    named += [f"torch.{str(dtype).removeprefix('torch.')}" for dtype in _DTYPES.values()]
    named += [f"builtins.{name}" for name in ("dict", "list", "tuple", "int", "float", "str", "bool", "object")]
    return {
        **dict.fromkeys(named, _refused),
        **NUMBERS,
        **paths,
        "numpy.core.multiarray._reconstruct": _record,
        "numpy._core.multiarray._reconstruct": _record,
        "torch._utils._rebuild_tensor": _tensor,
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_parameter": _parameter,
        "torch.Size": _list,
        "torch.device": _device,
        "builtins.set": _list,
        "builtins.frozenset": _list,
        "argparse.Namespace": _record,
        "types.SimpleNamespace": _record,
        "collections.defaultdict": _record,
        "collections.Counter": lambda items=None: Record(items if isinstance(items, dict) else {}),
        "copyreg._reconstructor": _reconstructed,
    }
