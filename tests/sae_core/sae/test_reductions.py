"""Streamed reductions against numpy on the whole shard: every table, for many shapes, however the tokens are cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import codes_oracle as oracle
import numpy as np
import pytest
import torch
from scipy import sparse

from sae_core.errors import ConfigError
from sae_core.sae import SparseCodes
from sae_core.sae.reductions import CellCodes, ShardReduction, ShardStatistics, pooling
from sae_core.sae.reductions.counts import FeatureGeneCounts
from sae_core.sae.reductions.largest import largest_of_each
from sae_core.sae.reductions.ordering import add_in_order, add_in_order_by_sorting
from sae_core.sae.reductions.top_values import TopValues

if TYPE_CHECKING:
    from collections.abc import Callable

on_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def make_tokens(
    tokens_per_cell: list[int], n_features: int, *, density: float, levels: int | None = None, n_genes: int = 7
) -> oracle.TokenCodes:
    """Random codes; `levels` is the number of distinct values. Cells are numbered with gaps, positions too."""
    rng = np.random.default_rng([len(tokens_per_cell), n_features])
    n = sum(tokens_per_cell)
    value = rng.exponential(size=(n, n_features)).astype(np.float32) + np.float32(0.01)
    if levels is not None:
        value = (1 + rng.integers(levels, size=(n, n_features))).astype(np.float32)
    codes = sparse.csr_array(np.where(rng.random((n, n_features)) < density, value, np.float32(0)))
    cells = 3 + 2 * np.arange(len(tokens_per_cell))
    position = [np.sort(rng.choice(2 * size, size, replace=False)) for size in tokens_per_cell]
    return oracle.TokenCodes(
        codes=codes,
        cell_idx=np.repeat(cells, tokens_per_cell).astype(np.int64),
        token_pos=np.concatenate([np.empty(0, int), *position]).astype(np.int32),
        gene_id=rng.integers(n_genes, size=n).astype(np.int32),
        split=np.repeat(rng.integers(3, size=len(cells)), tokens_per_cell).astype(np.uint8),
    )


def reduce_in_blocks(
    tokens: oracle.TokenCodes, cuts: list[int], *, device: str = "cpu", **options: Any
) -> tuple[CellCodes, ShardStatistics]:
    """The codes and statistics of tokens that arrive in blocks, cut at `cuts`; between equal cuts a block is empty."""
    n, n_features = tokens.codes.shape
    defaults = {"pooling": "max", "keep": None, "level": "cell", "n_top_cells": 3, "n_top_tokens": 4, "by_gene": True}
    reduction = ShardReduction(n_features=n_features, **{**defaults, **options})
    parts = []
    for low, high in zip([0, *cuts], [*cuts, n], strict=True):
        block = tokens.codes[low:high]
        codes = SparseCodes(
            crow=torch.from_numpy(block.indptr.astype(np.int64)).to(device),
            col=torch.from_numpy(block.indices.astype(np.int32)).to(device),
            value=torch.from_numpy(block.data).to(device),
            n_features=n_features,
        )
        keys = {name: getattr(tokens, name)[low:high] for name in ("cell_idx", "token_pos", "gene_id", "split")}
        found = reduction.add(codes, **keys)
        if found is not None:
            parts.append(found)
    last, statistics = reduction.finish()
    columns = [[part[i] for part in [*parts, last]] for i in range(5 if options.get("level") == "token" else 3)]
    return CellCodes(*(np.concatenate(column) for column in columns)), statistics


def assert_same(found: Any, expected: tuple[Any, ...], rtol: float = 0.0) -> None:
    """Equal columns, to the bit or, for floats, to `rtol`."""
    assert len(found) == len(expected)
    for name, a, b in zip(found._fields, found, expected, strict=True):
        if rtol and a.dtype.kind == "f":
            np.testing.assert_allclose(a, b, rtol=rtol, atol=0, err_msg=name)
        else:
            np.testing.assert_array_equal(a, b, err_msg=name)


def assert_equals_oracle(
    tokens: oracle.TokenCodes, found: CellCodes, statistics: ShardStatistics, **options: Any
) -> None:
    """All tables of a reduction with `options` equal those that numpy computes of the whole shard."""
    how, keep = options.get("pooling", "max"), options.get("keep")
    kept = oracle.keep_largest(oracle.pool(tokens, how), keep)
    if options.get("level") == "token":
        assert_same(found, oracle.token_codes_of(tokens, kept))
    else:
        assert_same(found, (*kept, None, None))
    assert_same(statistics.firing, oracle.firing(tokens, 3))
    assert_same(statistics.cells, oracle.cell_statistics(tokens))
    assert_same(statistics.top_cells, oracle.top_cells(tokens, how, options.get("n_top_cells", 3)))
    assert_same(statistics.top_tokens, oracle.top_tokens(tokens, options.get("n_top_tokens", 4)))
    assert statistics.gene_tokens is not None
    assert statistics.feature_gene is not None
    assert_same(statistics.gene_tokens, oracle.gene_statistics(tokens))
    assert_same(statistics.feature_gene, oracle.feature_gene_statistics(tokens))


def random_cuts(n: int, n_cuts: int, seed: int) -> list[int]:
    """Places to cut n tokens at, some of them equal."""
    return np.sort(np.random.default_rng(seed).integers(0, n + 1, size=n_cuts)).tolist()


SHARDS: dict[str, Callable[[], oracle.TokenCodes]] = {
    "many cells": lambda: make_tokens([1 + (7 * i) % 11 for i in range(14)], 13, density=0.3),
    "ties everywhere": lambda: make_tokens([4] * 12, 9, density=0.5, levels=2),
    "all values equal": lambda: make_tokens([3] * 15, 6, density=0.8, levels=1),
    "one cell": lambda: make_tokens([40], 12, density=0.2),
    "one feature": lambda: make_tokens([5, 1, 7], 1, density=0.6),
    "features that never fire": lambda: make_tokens([4] * 6, 200, density=0.01),
    "no nonzero": lambda: make_tokens([3, 2], 5, density=0.0),
    "no token": lambda: make_tokens([], 5, density=0.5),
    "more than 65,536 features": lambda: make_tokens([2, 3, 1], 70_001, density=0.0003),
    "genes far apart": lambda: make_tokens([5] * 8, 8, density=0.4, n_genes=60_000),
}


@pytest.mark.parametrize("name", SHARDS)
@pytest.mark.parametrize("how", ["max", "mean"])
@on_device
def test_every_table_equals_numpy_however_the_tokens_are_cut(name, how, device):
    tokens = SHARDS[name]()
    n = tokens.codes.shape[0]
    for cuts, options in (
        ([], {"keep": None}),
        (random_cuts(n, 3, 0), {"keep": None}),
        (random_cuts(n, 12, 1), {"keep": 2}),
        (random_cuts(n, 12, 2), {"level": "token"}),
        (list(range(1, n)), {"keep": 2, "level": "token"}),
    ):
        found, statistics = reduce_in_blocks(tokens, cuts, device=device, pooling=how, **options)
        assert_equals_oracle(tokens, found, statistics, pooling=how, **options)


@pytest.mark.parametrize("keep", [1, 3, 8, 9, 1000])
def test_of_equal_codes_the_first_features_are_kept(keep):
    tokens = make_tokens([4] * 20, 9, density=0.5, levels=2)
    found, _ = reduce_in_blocks(tokens, [7, 30], keep=keep)
    assert_same(found, (*oracle.keep_largest(oracle.pool(tokens, "max"), keep), None, None))
    rows = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [0.0, 0.0, 3.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    assert largest_of_each(rows, 2).tolist() == [
        [False, True, True, False, False],
        [False, False, True, False, False],
        [True, True, False, False, False],
    ]


@pytest.mark.parametrize("dense_entries", [1, 26, 100])
def test_small_dense_pieces_give_the_same_tables(monkeypatch, dense_entries):
    monkeypatch.setattr(pooling, "DENSE_ENTRIES", dense_entries)
    tokens = SHARDS["many cells"]()
    for options in ({"pooling": "max"}, {"pooling": "mean"}, {"keep": 2, "level": "token"}):
        found, statistics = reduce_in_blocks(tokens, [30, 31, 60], **options)
        assert_equals_oracle(tokens, found, statistics, **options)


def test_a_mean_is_the_float64_sum_in_the_order_of_the_tokens():
    tokens = make_tokens([700, 300], 3, density=0.9)
    found, _ = reduce_in_blocks(tokens, [1, 123, 650, 900], pooling="mean")
    dense = tokens.codes.toarray().astype(np.float64)
    expected = [sum(dense[:700, f].tolist()) / 700 for f in range(3)]
    assert found.value[:3].tolist() == np.array(expected, np.float32).tolist()


@pytest.mark.parametrize("add", [add_in_order, add_in_order_by_sorting])
@on_device
def test_sums_by_key_are_sequential_also_on_two_threads(add, device):
    generator = torch.Generator().manual_seed(0)
    key = torch.randint(50, (40_000,), generator=generator)
    value = torch.exp(8 * torch.randn(40_000, generator=generator))
    expected = np.zeros(50)
    np.add.at(expected, key.numpy(), value.double().numpy())
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for cut in (0, 1, 12_345):
            total = torch.zeros(50, dtype=torch.float64, device=device)
            for part in (slice(0, cut), slice(cut, None)):
                add(total, key[part].to(device), value[part].to(device))
            assert total.tolist() == expected.tolist()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("buffer", [1, 100, 10**6])
def test_pairs_of_feature_and_gene_are_the_same_for_every_buffer(buffer):
    tokens = make_tokens([9] * 20, 11, density=0.4, n_genes=300)
    counts = FeatureGeneCounts(11, 3, buffer=buffer)
    for low in range(0, 180, 30):
        span = slice(low, low + 30)
        block = SparseCodes.from_dense(torch.from_numpy(tokens.codes[span].toarray()))
        split, gene = (torch.from_numpy(a[span].astype(np.int64)) for a in (tokens.split, tokens.gene_id))
        counts.add(block, split=split, gene=gene, top=int(gene.max()))
    assert_same(counts.rows(), oracle.feature_gene_statistics(tokens))


def test_pairs_whose_keys_need_64_bits_are_counted():
    counts = FeatureGeneCounts(70_000, 3)
    codes = SparseCodes.from_flat(torch.tensor([5, 69_999, 70_005]), torch.ones(2, 70_000))
    for gene in ([1, 2], [1, 50_000], [60_000, 2]):
        counts.add(codes, split=torch.tensor([0, 2]), gene=torch.tensor(gene), top=max(gene))
    rows = counts.rows()
    assert list(zip(*(column.tolist() for column in rows), strict=True)) == [
        *[(5, 0, 1, 2), (5, 0, 60_000, 1), (5, 2, 2, 2), (5, 2, 50_000, 1)],
        *[(69_999, 0, 1, 2), (69_999, 0, 60_000, 1)],
    ]


def test_counting_begins_anew_once_the_rows_are_given():
    counts = FeatureGeneCounts(4, 1)
    codes = SparseCodes.from_flat(torch.tensor([2]), torch.ones(1, 4))
    for n_tokens in (2, 1):
        for _ in range(n_tokens):
            counts.add(codes, split=torch.tensor([0]), gene=torch.tensor([7]), top=7)
        assert [column.tolist() for column in counts.rows()] == [[2], [0], [7], [n_tokens]]
    assert [len(column) for column in counts.rows()] == [0, 0, 0, 0]


@pytest.mark.parametrize("buffer", [1, 64, 10**6])
@pytest.mark.parametrize("n", [1, 5, 300, 3000])
def test_the_largest_values_are_the_same_for_every_buffer_and_ties_keep_the_first(n, buffer):
    rng = np.random.default_rng(0)
    feature, value = rng.integers(0, 6, size=2000), rng.integers(1, 40, size=2000).astype(np.float32)
    top = TopValues(7, n, (torch.int64,), torch.device("cpu"), buffer=buffer)
    for low in range(0, 2000, 100):
        place = torch.arange(low, low + 100)
        of, values = torch.from_numpy(feature)[place], torch.from_numpy(value)[place]
        chosen = top.candidates(of, values)
        top.add(of[chosen], values[chosen], place[chosen])
    expected = oracle.largest_of_feature(feature, value, n)
    found = top.rows()
    assert found.columns[0].tolist() == expected.tolist()
    assert found.feature.tolist() == feature[expected].tolist()
    assert found.value.tolist() == value[expected].tolist()


def test_no_top_rows_and_no_genes_are_given_if_none_are_wanted():
    tokens = SHARDS["many cells"]()
    found, statistics = reduce_in_blocks(tokens, [20], n_top_cells=0, n_top_tokens=0, by_gene=False)
    assert_same(found, (*oracle.pool(tokens, "max"), None, None))
    assert len(statistics.top_cells.value) == len(statistics.top_tokens.value) == 0
    assert statistics.gene_tokens is None
    assert statistics.feature_gene is None


def test_a_cell_is_returned_when_the_next_one_begins():
    tokens = make_tokens([4, 4], 5, density=0.9)
    reduction = ShardReduction(
        n_features=5, pooling="max", keep=None, level="cell", n_top_cells=1, n_top_tokens=1, by_gene=False
    )
    cells = []
    for low, high in ((0, 2), (2, 4), (4, 5), (5, 8)):
        codes = SparseCodes.from_dense(torch.from_numpy(tokens.codes[low:high].toarray()))
        found = reduction.add(
            codes, **{n: getattr(tokens, n)[low:high] for n in ("cell_idx", "token_pos", "gene_id", "split")}
        )
        cells.append(None if found is None else np.unique(found.cell_idx).tolist())
    assert cells == [None, None, [3], None]
    assert np.unique(reduction.finish()[0].cell_idx).tolist() == [5]
    with pytest.raises(ConfigError, match="finished"):
        reduction.finish()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cell_idx": [7, 7, 5]}, "order of cell and position"),
        ({"token_pos": [2, 1, 0]}, "order of cell and position"),
        ({"split": [0, 1, 0]}, "one split"),
        ({"split": [3, 3, 0]}, "got split 3"),
        ({"gene_id": [1, -1, 2]}, "got -1"),
        ({"gene_id": [1, 2]}, "one cell, position, gene and split"),
        ({"value": [1.0, 0.0, 2.0]}, r"values from 0\.0"),
        ({"value": [1.0, float("nan"), 2.0]}, "nan"),
        ({"value": [1.0, float("inf"), 2.0]}, "inf"),
        ({"n_features": 5}, "5 features"),
    ],
)
def test_codes_and_keys_that_do_not_fit_are_refused(change, said):
    given = {"cell_idx": [5, 5, 7], "token_pos": [0, 1, 0], "gene_id": [1, 2, 3], "split": [0, 0, 1]}
    given |= {name: value for name, value in change.items() if name in given}
    dtypes = {"cell_idx": np.int64, "token_pos": np.int32, "gene_id": np.int32, "split": np.uint8}
    codes = SparseCodes(
        crow=torch.tensor([0, 1, 2, 3]),
        col=torch.tensor([0, 3, 1]),
        value=torch.tensor(change.get("value", [1.0, 1.5, 2.0])),
        n_features=change.get("n_features", 4),
    )
    reduction = ShardReduction(
        n_features=4, pooling="max", keep=None, level="cell", n_top_cells=1, n_top_tokens=1, by_gene=False
    )
    with pytest.raises(ConfigError, match=said):
        reduction.add(codes, **{name: np.array(value, dtypes[name]) for name, value in given.items()})


@pytest.mark.parametrize("wrong", [{"keep": 0}, {"n_features": 0}, {"n_splits": 0}, {"n_top_cells": -1}])
def test_options_out_of_range_are_refused(wrong):
    options = {"n_features": 4, "pooling": "max", "keep": None, "level": "cell"}
    options |= {"n_top_cells": 1, "n_top_tokens": 1, "by_gene": False}
    with pytest.raises(ConfigError, match=rf"{next(iter(wrong))} is at least"):
        ShardReduction(**{**options, **wrong})
