from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from feature_store.activations import ActivationReader, ActivationWriter, cell_means, to_float32, to_stored
from feature_store.errors import IncompleteRunError, InputError, IntegrityError
from feature_store.storage import filesystem

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

METADATA = {"dtype": "f32", "site": "layer.2", "plan_sha": "abc"}


def write(path: Path, act: np.ndarray, dtype: str) -> int:
    with ActivationWriter(path, act.shape[1], {**METADATA, "dtype": dtype}) as writer:
        writer.write(*(np.arange(len(act)),) * 3, act)
    return writer.n_tokens


@pytest.mark.parametrize("dtype", ["f16", "f32", "bf16"])
def test_a_run_comes_back_row_group_by_row_group_as_it_was_written(
    store_activations: Callable[..., Any], dtype: str
) -> None:
    stored = store_activations(dtype=dtype)
    reader = stored.reader
    assert (reader.n_tokens, reader.d_model, reader.dtype, reader.site) == (300, 4, dtype, "layer.2")
    assert [group.n_tokens for group in reader.row_groups] == [16, 16, 16, 16, 16, 16, 4] * 3
    blocks = [reader.read(group.shard, group.group) for group in reader.row_groups]
    for name in ("cell_idx", "token_pos", "gene_id"):
        assert (np.concatenate([getattr(block, name) for block in blocks]) == getattr(stored, name)).all()
    act = np.concatenate([block.act_f32() for block in blocks])
    assert act.dtype == np.float32
    assert all(block.act_f32().flags.writeable for block in blocks)
    tolerance = {"f16": 2**-11, "f32": 0.0, "bf16": 2**-8}[dtype]
    assert np.allclose(act, stored.act, rtol=tolerance, atol=0 if dtype == "f32" else 1e-7)


def test_the_cell_column_alone_equals_that_of_the_whole_read(store_activations: Callable[..., Any]) -> None:
    reader = store_activations().reader
    for group in reader.row_groups:
        assert (reader.cells(group.shard, group.group) == reader.read(group.shard, group.group).cell_idx).all()


def test_a_part_has_the_columns_encodings_and_row_groups_that_the_module_describes(tmp_path: Path) -> None:
    write(tmp_path / "p", np.ones((20_000, 3)), "f16")
    footer = pq.read_metadata(tmp_path / "p")
    schema = footer.schema.to_arrow_schema()
    assert [(field.name, str(field.type), field.nullable) for field in schema] == [
        ("cell_idx", "int64", False),
        ("token_pos", "int32", False),
        ("gene_id", "int32", False),
        ("act", "fixed_size_binary[6]", False),
    ]
    assert schema.metadata == {b"dtype": b"f16", b"site": b"layer.2", b"plan_sha": b"abc", b"d_model": b"3"}
    assert [footer.row_group(i).num_rows for i in range(footer.num_row_groups)] == [8192, 8192, 3616]
    column = footer.row_group(0).column(3)
    assert column.compression == "UNCOMPRESSED"
    assert not column.has_dictionary_page
    assert footer.row_group(0).column(0).statistics.max == 8191


def test_the_same_tokens_give_the_same_bytes(tmp_path: Path, rng: np.random.Generator) -> None:
    act = rng.normal(size=(100, 8))
    for name in ("one", "two"):
        write(tmp_path / name, act, "f16")
    one, two = (hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("one", "two"))
    assert one == two


def test_a_part_without_tokens_is_allowed(store_activations: Callable[..., Any], tmp_path: Path) -> None:
    assert write(tmp_path / "p", np.empty((0, 4), np.float32), "f32") == 0
    reader = store_activations(cells_per_shard=0, n_shards=2).reader
    assert reader.n_tokens == 0
    assert reader.d_model == 4


def test_bf16_rounds_to_nearest_with_ties_to_even_like_torch(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    special = np.array([1.0, 1.00390625, 1.01171875, -1.00390625, 0.0, -0.0, 3e38, 1e-40], dtype=np.float32)
    act = np.concatenate([special, rng.normal(size=1000).astype(np.float32) * 100]).reshape(-1, 8)
    expected = torch.from_numpy(act).to(torch.bfloat16).view(torch.uint16).numpy()
    assert (to_stored(act, "bf16") == expected).all()
    assert (to_float32(expected) == torch.from_numpy(act).to(torch.bfloat16).float().numpy()).all()


def test_bf16_bits_are_stored_as_they_are(tmp_path: Path) -> None:
    bits = np.array([[0x3F80, 0xBF80]], dtype=np.uint16)
    assert (to_stored(bits, "bf16") == bits).all()
    assert to_float32(bits).tolist() == [[1.0, -1.0]]
    with pytest.raises(InputError, match="f16"):
        to_stored(bits, "f16")


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (70_000.0, "f16", "70000 of token 5, dimension 2.*--dtype bf16"),
        (-70_000.0, "f16", "-70000 .*--dtype bf16"),
        (3.4e38, "bf16", "--dtype f32"),
        (1e300, "f32", r"1e\+300 of token 5"),
        (np.inf, "f32", "inf of token 5"),
        (-np.inf, "bf16", "-inf of token 5"),
        (np.nan, "f16", "nan of token 5, dimension 2"),
    ],
)
def test_what_the_dtype_cannot_hold_is_an_error_and_never_an_infinity(
    tmp_path: Path, value: float, dtype: str, message: str
) -> None:
    act = np.zeros((9, 4))
    act[5, 2] = value
    with pytest.raises(InputError, match=message):
        write(tmp_path / "p", act, dtype)
    assert not (tmp_path / "p").exists()


def test_infinite_halves_and_bf16_bits_are_refused() -> None:
    for act in (
        np.full((2, 2), np.inf, np.float16),
        np.full((2, 2), 0x7F80, np.uint16),
        np.full((2, 2), 0xFFC0, np.uint16),
    ):
        with pytest.raises(InputError, match="of token 0, dimension 0"):
            to_stored(act, "bf16")


@pytest.mark.parametrize("values", [65504.0, -65504.0, 6e-8, 0.0])
def test_the_largest_and_smallest_halves_are_kept(values: float) -> None:
    assert to_stored(np.full((1, 1), values), "f16")[0, 0] == np.float16(values)


def test_bad_arguments_are_refused_with_what_was_received(tmp_path: Path) -> None:
    act = np.zeros((3, 2), np.float32)
    keys = (np.arange(3),) * 3
    with pytest.raises(InputError, match="plan_sha"):
        ActivationWriter(tmp_path / "p", 2, {"dtype": "f32", "site": "s"})
    with pytest.raises(InputError, match=r"'f8'.*f16, f32, bf16"):
        ActivationWriter(tmp_path / "p", 2, {**METADATA, "dtype": "f8"})
    with (
        pytest.raises(InputError, match=r"act \(3, 2\), cell_idx 2"),
        ActivationWriter(tmp_path / "p", 2, METADATA) as writer,
    ):
        writer.write(np.arange(2), *keys[1:], act)
    with pytest.raises(InputError, match="int64"), ActivationWriter(tmp_path / "p", 2, METADATA) as writer:
        writer.write(*keys, np.zeros((3, 2), np.int64))


def test_an_unfinished_run_is_not_read(store_activations: Callable[..., Any]) -> None:
    run = store_activations().run
    (run.path / "MANIFEST.json").unlink()
    with pytest.raises(IncompleteRunError):
        ActivationReader(run)


def test_a_flipped_byte_is_found_when_its_row_group_is_read(
    store_activations: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # the end of a part, which is hashed when the run is opened, is its footer here
    monkeypatch.setattr(filesystem, "END_BYTES", 64)
    stored = store_activations()
    path = stored.run.part(1)
    data = bytearray(path.read_bytes())
    place = data.find(stored.act[100:116].tobytes())
    assert place > 0
    data[place + 3] ^= 1
    path.write_bytes(data)
    reader = ActivationReader(stored.run)
    with pytest.raises(IntegrityError, match=r"part-00001\.parquet, row group 0 .*run its stage again"):
        reader.read(1, 0)
    assert len(reader.read(1, 1).act) == 16
    assert stored.run.pending() == [1], "what is to be computed again is on record"


def test_a_flipped_byte_of_a_footer_is_found_when_the_run_is_opened(store_activations: Callable[..., Any]) -> None:
    stored = store_activations()
    path = stored.run.part(1)
    data = path.read_bytes()
    for place in range(len(data) - 8 - int.from_bytes(data[-8:-4], "little"), len(data), 97):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(IntegrityError, match=r"part-00001\.parquet"):
            ActivationReader(stored.run)


def test_a_truncated_part_is_named(store_activations: Callable[..., Any]) -> None:
    stored = store_activations()
    stored.run.part(2).write_bytes(stored.run.part(2).read_bytes()[:-40])
    with pytest.raises(IntegrityError, match=r"part-00002\.parquet: .* bytes where"):
        ActivationReader(stored.run)


def test_a_part_written_in_pieces_has_the_bytes_of_one_written_at_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    act = rng.normal(size=(1000, 8)).astype(np.float32)
    keys = [np.arange(1000) // 7, np.arange(1000) % 7, np.arange(1000) % 31]
    with ActivationWriter(tmp_path / "whole", 8, METADATA, row_group_rows=64) as writer:
        writer.write(*keys, act)
    for cuts in ([1, 2, 63, 64, 65, 700], [], [0, 0, 1000], list(range(0, 1000, 3))):
        with ActivationWriter(tmp_path / "pieces", 8, METADATA, row_group_rows=64) as writer:
            for low, high in pairwise([0, *cuts, 1000]):
                writer.write(*(key[low:high] for key in keys), act[low:high])
        assert writer.n_tokens == 1000
        assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()


def test_the_mean_of_a_cell_is_over_its_tokens_in_all_row_groups(store_activations):
    stored = store_activations()
    cells = np.array([41, 3, 3, 70, 19, 20])
    means = cell_means(stored.reader, cells)
    for row, cell in zip(means, cells, strict=True):
        of_cell = stored.act[stored.cell_idx == cell]
        expected = of_cell.astype(np.float64).mean(axis=0) if len(of_cell) else np.full(4, np.nan)
        np.testing.assert_allclose(row, expected, rtol=1e-6)
    assert np.isnan(means[3]).all()
    assert cell_means(stored.reader, cells[:0]).shape == (0, 4)
