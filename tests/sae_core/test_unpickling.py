from __future__ import annotations

import argparse
import pickle
import struct
import sys
import time
import tracemalloc
import types
from collections import OrderedDict, defaultdict
from enum import Enum
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from sae_core.checkpoint_files import read_dictionary, read_torch_with_settings
from sae_core.errors import CheckpointError
from sae_core.unpickling import NUMBERS, Record, UnpicklingError, unpickle

if TYPE_CHECKING:
    from collections.abc import Callable

PROTO = b"\x80\x04"


def doubled(levels: int, make: bytes, *, as_key: bool) -> bytes:
    """A pickle in which each container holds the one before it twice."""
    nested = b")\x94" + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + make + b"\x94" for i in range(levels))
    return PROTO + nested + (b"0}(h" + bytes([levels]) + b"K\x01u." if as_key else b"0}(\x8c\x01ah\x1fu.")


HOSTILE: dict[str, bytes] = {
    "an index in the memo of 2^32 - 1": PROTO + b"}r\xff\xff\xff\xff].",
    "laughs as a value": doubled(60, b"\x86", as_key=False),
    "laughs as a key, whose hash takes 2^60 steps": doubled(60, b"\x86", as_key=True),
    "deep tuples as a key, whose hash recurses": PROTO + b")" + b"\x85" * 100_000 + b"}q\x00\x8c\x01aK\x01s0}(h\x00u.",
    "deep lists as a value": PROTO + b"}\x8c\x01a" + b"]" * 60_000 + b"a" * 59_999 + b"s.",
    "an integer of a million bytes": PROTO
    + b"}\x8c\x01a\x8b"
    + struct.pack("<i", 1_000_000)
    + b"\xff" * 1_000_000
    + b"s.",
    "an integer of a million digits": b"(dS'a'\nL" + b"9" * 1_000_000 + b"L\ns.",
    "an integer of a negative length": PROTO + b"}\x8c\x01a\x8b" + struct.pack("<i", -5) + b"s.",
    "a text of 2^40 bytes": PROTO + b"}\x8d" + struct.pack("<Q", 1 << 40) + b"aK\x01s.",
    "bytes of 2^62 bytes": PROTO + b"}\x8e" + struct.pack("<Q", 1 << 62) + b"aK\x01s.",
    "a big text encoded again and again": PROTO
    + b"X"
    + struct.pack("<I", 1_000_000)
    + b"a" * 1_000_000
    + b"\x94\x8c\x06latin1\x94"
    + b"c_codecs\nencode\nh\x00h\x01\x86R0" * 5_000
    + b"}.",
    "an empty stack": PROTO + b".",
    "items without a dictionary": PROTO + b"K\x01K\x02K\x03s.",
    "a key without a value": PROTO + b"}(\x8c\x01au.",
    "a mark as a value": PROTO + b"}\x8c\x01a(s.",
    "a memo that is not there": PROTO + b"h\x07.",
    "a number that is none": b"(dS'a'\nIx\ns.",
    "an unknown opcode": PROTO + b"\xff.",
    "a registered extension": PROTO + b"\x82\x01.",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_dictionary_ends_in_one_clear_error_and_in_bounded_memory(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "d.pkl"
    path.write_bytes(content)
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"d\.pkl") as raised:
        read_dictionary(path)
    seconds, peak = time.perf_counter() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400
    assert peak < 100 * len(content) + 1_000_000
    assert seconds < 60


def test_the_number_of_opcodes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    unpickle(PROTO + b"N0" * 600 + b"}.", NUMBERS)
    monkeypatch.setattr("sae_core.unpickling.MAX_OPCODES", 1000)
    with pytest.raises(UnpicklingError, match="1,000"):
        unpickle(PROTO + b"N0" * 600 + b"}.", NUMBERS)


class _Config(dict[str, Any]):
    """A dictionary whose items are also attributes, as several packages have one."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)
        self.__dict__.update(items)


class _ByItems(dict[str, Any]):
    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self), ({},), None, None, iter(self.items())


SETTINGS: dict[str, Any] = {
    "path": Path("/data/models"),
    "windows": PureWindowsPath("C:/data"),
    "number": np.float32(0.5),
    "flag": np.bool_(True),
    "name": np.str_("mae"),
    "array": np.arange(3),
    "config": _Config(depth=3, inner=_Config(heads=np.int64(2))),
    "by items": _ByItems(a=1),
    "namespace": argparse.Namespace(lr=0.1, out=Path("x")),
    "simple": types.SimpleNamespace(a=1),
    "ordered": OrderedDict(b=2),
    "default": defaultdict(list, a=[1]),
    "set": {1, 2},
    "dtype": torch.float16,
    "device": torch.device("cuda:1"),
    "shape": torch.Size([2, 3]),
    "none": None,
    "big": 1 << 80,
}
PLAIN = {
    "path": "/data/models",
    "windows": "C:\\data",
    "number": 0.5,
    "flag": True,
    "name": "mae",
    "config": {"depth": 3, "inner": {"heads": 2}},
    "by items": {"a": 1},
    "namespace": {"lr": 0.1, "out": "x"},
    "simple": {"a": 1},
    "ordered": {"b": 2},
    "default": {"a": [1]},
    "set": [1, 2],
    "device": "cuda:1",
    "shape": [2, 3],
    "none": None,
    "big": 1 << 80,
}


@pytest.fixture
def own_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes above as those of a package that is not installed where the file is read."""
    package = types.ModuleType("someones_config")
    for kind in (_Config, _ByItems):
        monkeypatch.setattr(kind, "__module__", "someones_config")
        setattr(package, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "someones_config", package)


@pytest.mark.parametrize(("protocol", "zipped"), [(2, True), (4, True), (2, False)])
@pytest.mark.usefixtures("own_classes")
def test_settings_of_other_packages_are_read_as_plain_values(tmp_path: Path, protocol: int, zipped: bool) -> None:
    whole = torch.arange(12, dtype=torch.float32).view(3, 4)
    tensors = {
        "whole": whole,
        "view": whole[1:, ::2],
        "half": torch.full((2,), 0.5, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "empty": torch.zeros(0, 5),
        "scalar": torch.tensor(7),
    }
    path = tmp_path / "models.ckpt"
    torch.save(
        {"tensors": OrderedDict(tensors), "settings": SETTINGS},
        path,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=zipped,
    )
    sys.modules.pop("someones_config")
    found = read_torch_with_settings(path)
    assert found["tensors"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found["tensors"][name].dtype == tensor.dtype
        assert torch.equal(found["tensors"][name], tensor)
    assert {name: found["settings"][name] for name in PLAIN} == PLAIN
    assert isinstance(found["settings"]["config"], Record)
    assert "someones_config" not in sys.modules


class _Calls:
    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.args


class _Kind(Enum):
    ONE = 1


def runs(flag: str) -> None:
    Path(flag).touch()


@pytest.mark.parametrize(
    "payload",
    [
        _Calls(Path.touch, Path("ran")),
        _Calls(eval, "open('ran', 'w')"),
        _Calls(exec, "open('ran', 'w')"),
        _Calls(getattr, "", "join"),
        _Calls(runs, "ran"),
        _Calls(torch.load, "ran"),
        _Calls(torch.hub.load, "a", "b"),
        _Calls(np.load, "ran"),
        _Calls(__import__, "os"),
        _Calls(torch.zeros, 1 << 40),
        _Calls(list, "abc"),
        runs,
        _Kind.ONE,
    ],
    ids=range(13),
)
def test_nothing_in_a_torch_file_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, payload: object) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "models.ckpt"
    for protocol in (2, 4):
        for zipped in (True, False):
            torch.save({"config": payload}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
            if payload is runs:  # a name of another package that is not called is a name
                assert read_torch_with_settings(path)["config"].path.endswith(".runs")
                continue
            with pytest.raises(CheckpointError, match=r"models\.ckpt"):
                read_torch_with_settings(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "edit",
    [
        lambda p: p.replace(b"K\x03K\x04\x86", b"K\x03K\x7f\x86", 1),  # a shape beyond the storage
        lambda p: p.replace(b"K\x04K\x01\x86", b"K\x00K\x00\x86", 1).replace(b"K\x03K\x04\x86", b"K\x7fK\x7f\x86", 1),
        lambda p: p.replace(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x007", 1),  # data that are not there
        lambda p: p.replace(b"FloatStorage", b"EvilyStorage", 1),
        lambda p: p.replace(b"K\x0c", b"K\x7f", 1),  # a storage beyond its data
    ],
)
def test_a_tensor_that_reaches_beyond_its_data_is_refused(tmp_path: Path, edit: Callable[[bytes], bytes]) -> None:
    import zipfile

    good, bad = tmp_path / "good.ckpt", tmp_path / "models.ckpt"
    torch.save({"a": torch.zeros(3, 4)}, good)
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(bad, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            edited = edit(content) if name.endswith("data.pkl") else content
            assert edited != content or not name.endswith("data.pkl")
            target.writestr(name, edited)
    with pytest.raises(CheckpointError, match=r"models\.ckpt"):
        read_torch_with_settings(bad)


def test_a_cut_torch_file_is_incomplete(tmp_path: Path) -> None:
    path = tmp_path / "models.ckpt"
    for zipped in (True, False):
        torch.save({"a": torch.zeros(300, 4)}, path, _use_new_zipfile_serialization=zipped)
        path.write_bytes(path.read_bytes()[:-700])
        with pytest.raises(CheckpointError, match=r"models\.ckpt is incomplete"):
            read_torch_with_settings(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_are_what_python_reads(protocol: int) -> None:
    value: Any = {
        "a": [1, -1, 255, 65536, -(1 << 40), 1 << 80, True, None],
        "b": (1.5, float("inf"), "é\n'\\", b"\x00\xff"),
    }
    value |= {"c": {"d": {"e": []}}, 7: (), "long" * 100: "x" * 70_000, "tuple": (1, (2, 3), (4, 5, 6, 7))}
    data = pickle.dumps(value, protocol=protocol)
    assert unpickle(data, NUMBERS).value == value
    for end in range(0, len(data), max(1, len(data) // 40)):
        with pytest.raises((UnpicklingError, EOFError)):
            unpickle(data[:end], NUMBERS)
