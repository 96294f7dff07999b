from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sae_core.checkpoint_files import digest_files, read_dictionary, read_json, read_weights, weight_files
from sae_core.errors import CheckpointError
from sae_core.json_fields import JsonFields

if TYPE_CHECKING:
    from collections.abc import Callable

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


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 205379072\n"
PAGE = b"\n<!DOCTYPE html><html><head><title>Sign in</title></head></html>"
WEIGHTS = {"a": torch.arange(600.0), "b": torch.ones(3, 4)}


def write_weights(path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(WEIGHTS, path)
    else:
        torch.save(WEIGHTS, path, _use_new_zipfile_serialization=path.suffix != ".bin")
    return path


def read_any(path: Path) -> object:
    if path.suffix == ".pkl":
        return read_dictionary(path)
    return read_json(path) if path.suffix == ".json" else read_weights(path)


EVERY_KIND = ["model.safetensors", "best_model.pt", "pytorch_model.bin", "args.json", "token_dictionary.pkl"]


@pytest.mark.parametrize("name", EVERY_KIND)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, r"Git LFS pointer .*205,379,072 bytes.*git lfs pull"),
        (b"/annex/objects/SHA256E-s9--4d7a\n", "git annex get"),
        (PAGE, r"web page of \d+ bytes"),
        (b"", r"empty \(0 bytes\).*fetch"),
        (bytes(5000), r"zero bytes.*5,000 bytes.*fetch"),
        (b"Entry not found", r"'Entry not found'"),
        (b"\x1b]0;title\x07 not found", r"\w"),
    ],
)
def test_what_lies_in_the_place_of_a_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_any(path)
    assert name in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "best_model.pt", "pytorch_model.bin"])
@pytest.mark.parametrize("share", [0.01, 0.2, 0.7, 0.99])
def test_half_a_download_of_weights_says_how_many_bytes_there_are(tmp_path: Path, name: str, share: float) -> None:
    path = write_weights(tmp_path / name)
    whole = path.read_bytes()
    assert read_weights(path)["a"].tolist() == WEIGHTS["a"].tolist()
    held = int(len(whole) * share)
    path.write_bytes(whole[:held])
    with pytest.raises(CheckpointError, match=rf"{name} is incomplete.*\b{held:,}\b.*fetch"):
        read_weights(path)


def test_an_incomplete_safetensors_file_says_how_many_bytes_it_should_have(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "model.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=rf"{len(whole) - 1:,} of {len(whole):,} bytes"):
        read_weights(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(CheckpointError, match=rf"{len(whole) + 1:,} bytes.*{len(whole):,}"):
        read_weights(path)


@pytest.mark.parametrize("text", ['{"a": 1, "b"', '{"a": "x', '{"a": tru', '{"a": {"b": 2}, '])
def test_half_a_json_file_is_incomplete(tmp_path: Path, text: str) -> None:
    path = tmp_path / "args.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=rf"args\.json is incomplete.*{len(text)} bytes"):
        read_json(path)


def test_half_a_pickled_dictionary_is_incomplete(tmp_path: Path) -> None:
    path = tmp_path / "d.pkl"
    whole = pickle.dumps({f"g{i}": i for i in range(100)})
    path.write_bytes(whole[:200])
    with pytest.raises(CheckpointError, match=r"d\.pkl is incomplete.*200 bytes"):
        read_dictionary(path)


def test_json_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "args.json"
    path.write_text('{"a":' * 100_000)
    with pytest.raises(CheckpointError, match=r"args\.json"):
        read_json(path)


def test_json_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "args.json"
    path.write_text('{"nlayers": 3}', encoding="utf-8-sig")
    assert read_json(path) == {"nlayers": 3}


def test_a_link_to_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.symlink_to("blobs/4d7a")
    with pytest.raises(CheckpointError, match=r"link to blobs/4d7a"):
        read_weights(path)


def write_parts(folder: Path, ending: str) -> Path:
    names = {"a": f"model-00001-of-00002.{ending}", "b": f"model-00002-of-00002.{ending}"}
    for tensor, name in names.items():
        if ending == "safetensors":
            save_file({tensor: WEIGHTS[tensor]}, folder / name)
        else:
            torch.save({tensor: WEIGHTS[tensor]}, folder / name)
    index = folder / f"model.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 9}, "weight_map": names}))
    return index


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_weights_in_several_files_are_read_through_their_index(tmp_path: Path, ending: str) -> None:
    index = write_parts(tmp_path, ending)
    found = read_weights(index)
    assert {name: value.tolist() for name, value in found.items()} == {n: v.tolist() for n, v in WEIGHTS.items()}
    assert [path.name for path in weight_files(index)][1:] == sorted(p.name for p in tmp_path.glob("model-*"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(), r"model-00002.*not in"),
        (lambda folder: (folder / "model-00001-of-00002.safetensors").write_bytes(POINTER), "Git LFS pointer"),
        (lambda folder: save_file({"c": torch.ones(2)}, folder / "model-00002-of-00002.safetensors"), r"'c'.*again"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "weight_map"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.bin"}}'),
            r"'\.\./x\.bin'",
        ),
    ],
)
def test_parts_that_do_not_fit_their_index_are_refused(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    index = write_parts(tmp_path, "safetensors")
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        read_weights(index)


@pytest.mark.parametrize("value", ["many", "51", -3, 0, 2.5, True, [51], float("nan"), 1e300])
def test_a_field_of_another_type_is_an_error_that_names_file_field_and_value(value: object) -> None:
    fields = JsonFields({"n_bins": value}, file="args.json")
    with pytest.raises(CheckpointError, match=r"args\.json has n_bins .*allowed"):
        fields.whole("n_bins", 51)


@pytest.mark.parametrize("value", ["low", True, [1], float("inf"), float("nan")])
def test_a_number_is_finite_and_no_word(value: object) -> None:
    with pytest.raises(CheckpointError, match=r"args\.json has pad_value .*allowed"):
        JsonFields({"pad_value": value}, file="args.json").number("pad_value", -2.0)


def test_a_null_field_is_its_default_and_noted() -> None:
    fields = JsonFields({"n_bins": None, "pad_value": None, "size": 3.0, "nheads": None}, file="args.json")
    assert (fields.whole("n_bins", 51), fields.number("pad_value", -2.0), fields.whole("size")) == (51, -2, 3)
    assert [note.split()[2] for note in fields.notes] == ["n_bins", "pad_value"]
    with pytest.raises(CheckpointError, match=r"args\.json has nheads null"):
        fields.whole("nheads")
    with pytest.raises(CheckpointError, match=r"args\.json lacks d_hid"):
        fields.whole("d_hid")
