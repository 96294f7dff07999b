from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from sae_core.checkpoint_files import digest_files, read_dictionary
from sae_core.errors import CheckpointError

PLAIN = {"ENSG1": 3, "ENSG2": 2.5, "TP53": "ENSG3"}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_numpy_scalars_of_any_kind_are_read_from_any_protocol(tmp_path: Path, protocol: int) -> None:
    kinds = (np.int64, np.int32, np.uint16, np.float64, np.float32, np.dtype(">f8").type)
    content: dict[str, object] = {f"g{i}": kind(i + 1) for i, kind in enumerate(kinds)}
    path = tmp_path / "d.pkl"
    path.write_bytes(pickle.dumps(OrderedDict(content) if protocol else content, protocol=protocol))
    found = read_dictionary(path)
    assert found == {f"g{i}": i + 1 for i in range(len(kinds))}
    assert {type(value) for value in found.values()} == {int, float}


def test_plain_dictionaries_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "d.pkl"
    path.write_bytes(pickle.dumps(PLAIN))
    assert read_dictionary(path) == PLAIN


class _Touch:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("run-by-pickle"),)  # type: ignore[return-value]


class _Named:
    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return getattr, ("", "join")  # type: ignore[return-value]


@pytest.mark.parametrize("payload", [_Touch(), _Named(), np.arange(3), {1, 2}, np.float64(2), {"a": np.arange(2)}])
def test_any_other_pickle_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, payload: object
) -> None:
    monkeypatch.chdir(tmp_path)
    for content in (payload, {"a": payload} if not isinstance(payload, dict | np.float64) else payload):
        path = tmp_path / "d.pkl"
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(CheckpointError, match=r"d\.pkl"):
            read_dictionary(path)
    assert not (tmp_path / "run-by-pickle").exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps(PLAIN)[:-9], b"\x80\x04K\x01."])
def test_damaged_files_are_refused_with_their_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "d.pkl"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"d\.pkl"):
        read_dictionary(path)


def test_names_that_lead_to_lists_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text('{"a": [1]}')
    with pytest.raises(CheckpointError, match="'a': list"):
        read_dictionary(path)


def test_a_digest_depends_on_names_contents_and_order(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"x")
    b.write_bytes(b"x")
    digests = {digest_files(paths) for paths in ([a], [b], [a, b], [b, a])} | {digest_files([a], salt="cell")}
    assert len(digests) == 5
