from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import pytest
from scipy import sparse

from feature_store.codes import TokenCodes, token_codes, token_statistics
from feature_store.errors import InputError
from feature_store.storage import schemas

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def tokens(random_tokens: Callable[..., TokenCodes]) -> TokenCodes:
    return random_tokens(100, 130)


@pytest.fixture
def split(tokens: TokenCodes) -> np.ndarray:
    return np.array(["train", "select", "test"])[tokens.cell_idx % 3]


def brute_force_cells(tokens: TokenCodes, how: str) -> dict[tuple[int, int], float]:
    dense = tokens.codes.toarray()
    cells = {}
    for cell in np.unique(tokens.cell_idx):
        rows = dense[tokens.cell_idx == cell].astype(np.float64)
        pooled = rows.max(axis=0) if how == "max" else rows.mean(axis=0)
        cells |= {(int(cell), int(feature)): float(pooled[feature]) for feature in np.flatnonzero(pooled)}
    return cells


@pytest.mark.parametrize("block", [1, 30, 1 << 22])
@pytest.mark.parametrize("how", ["max", "mean"])
def test_pooling_equals_a_dense_loop_over_cells(
    tokens: TokenCodes, how: token_codes.Pooling, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_codes, "_BLOCK_ENTRIES", block)
    cell_idx, feature_id, value = token_codes.pool(tokens, how)
    expected = brute_force_cells(tokens, how)
    assert list(zip(cell_idx.tolist(), feature_id.tolist(), strict=True)) == sorted(expected)
    assert np.allclose(value, [expected[key] for key in sorted(expected)], rtol=1e-6)
    assert value.dtype == np.float32


def test_max_pooling_keeps_values_exactly(tokens: TokenCodes) -> None:
    assert set(token_codes.pool(tokens).value.tolist()) <= set(tokens.codes.data.tolist())


def test_pooling_does_not_depend_on_the_order_of_the_tokens(tokens: TokenCodes, rng: np.random.Generator) -> None:
    order = rng.permutation(tokens.n_tokens)
    shuffled = TokenCodes(
        cell_idx=tokens.cell_idx[order],
        token_pos=tokens.token_pos[order],
        gene_id=tokens.gene_id[order],
        codes=tokens.codes[order],
    )
    for one, two in zip(token_codes.pool(tokens), token_codes.pool(shuffled), strict=True):
        assert (one == two).all()
    assert token_statistics.top_tokens(tokens, 3).equals(token_statistics.top_tokens(shuffled, 3))


def test_explicit_zeros_do_not_fire() -> None:
    codes = sparse.csr_array((np.array([0.0, 2.0], np.float32), np.array([0, 1]), np.array([0, 2])), shape=(1, 3))
    tokens = TokenCodes(cell_idx=np.array([5]), token_pos=np.array([0]), gene_id=np.array([9]), codes=codes)
    assert codes.nnz == 2
    assert tokens.codes.nnz == 1
    assert token_codes.pool(tokens).feature_id.tolist() == [1]
    assert token_statistics.feature_gene_statistics(tokens, np.array(["test"]))["n_tokens"].to_list() == [1]


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_negative_and_non_finite_codes_are_refused(value: float) -> None:
    codes = sparse.csr_array(np.array([[1.0, value]]))
    with pytest.raises(InputError, match=r"-1|nan|inf"):
        TokenCodes(cell_idx=np.zeros(1), token_pos=np.zeros(1), gene_id=np.zeros(1), codes=codes)


def test_arrays_of_different_length_are_refused() -> None:
    with pytest.raises(InputError, match=r"2, 1, 1 .*\(1, 4\)"):
        TokenCodes(cell_idx=np.zeros(2), token_pos=np.zeros(1), gene_id=np.zeros(1), codes=sparse.csr_array((1, 4)))


def test_an_unknown_pooling_is_refused(tokens: TokenCodes) -> None:
    with pytest.raises(InputError, match=r"'median'.*max, mean"):
        token_codes.pool(tokens, "median")  # type: ignore[arg-type]


def test_selected_tokens_are_those_of_the_mask(tokens: TokenCodes) -> None:
    keep = tokens.token_pos > 0
    chosen = tokens.select(keep)
    assert (chosen.cell_idx == tokens.cell_idx[keep]).all()
    assert (chosen.codes.toarray() == tokens.codes.toarray()[keep]).all()


def test_statistics_by_gene_equal_polars_over_the_single_nonzeros(tokens: TokenCodes, split: np.ndarray) -> None:
    coo = tokens.codes.tocoo()
    expected = (
        pl.DataFrame(
            {
                "split": split[coo.row],
                "feature_id": coo.col.astype(np.int32),
                "gene_id": tokens.gene_id[coo.row],
                "value": coo.data,
            }
        )
        .group_by("split", "feature_id", "gene_id")
        .agg(
            n_tokens=pl.len().cast(pl.Int64),
            sum=pl.col("value").cast(pl.Float64).sum(),
            sum_sq=(pl.col("value").cast(pl.Float64) ** 2).sum(),
            max=pl.col("value").max(),
        )
        .sort("split", "gene_id", "feature_id")
    )
    result = token_statistics.feature_gene_statistics(tokens, split)
    schemas.check("token_feature_gene", result)
    assert result.select("split", "feature_id", "gene_id", "n_tokens", "max").equals(
        expected.select("split", "feature_id", "gene_id", "n_tokens", "max")
    )
    for column in ("sum", "sum_sq"):
        assert np.allclose(result[column].to_numpy(), expected[column].to_numpy(), rtol=1e-12)


def test_tokens_by_gene_count_all_tokens_whether_a_feature_fires_or_not(tokens: TokenCodes, split: np.ndarray) -> None:
    result = token_statistics.gene_statistics(tokens, split)
    schemas.check("token_gene", result)
    assert result["n_tokens"].sum() == tokens.n_tokens
    for name, gene, n in result.iter_rows():
        assert n == ((split == name) & (tokens.gene_id == gene)).sum()


def test_top_tokens_are_the_largest_with_ties_in_the_order_of_the_tokens(tokens: TokenCodes) -> None:
    coarse = tokens.codes.copy()
    coarse.data = np.ceil(coarse.data * 3)
    tied = TokenCodes(cell_idx=tokens.cell_idx, token_pos=tokens.token_pos, gene_id=tokens.gene_id, codes=coarse)
    result = token_statistics.top_tokens(tied, 4)
    schemas.check("token_top", result)
    coo = coarse.tocoo()
    rows = sorted(
        (int(f), -float(v), int(tied.cell_idx[t]), int(tied.token_pos[t]), int(tied.gene_id[t]))
        for t, f, v in zip(coo.row, coo.col, coo.data, strict=True)
    )
    expected = [row for i, row in enumerate(rows) if sum(other[0] == row[0] for other in rows[:i]) < 4]
    assert [(f, -v, c, p, g) for f, c, p, g, v in result.iter_rows()] == expected


def merged_and_whole(
    random_tokens: Callable[..., TokenCodes],
) -> tuple[list[TokenCodes], TokenCodes, Callable[[TokenCodes], np.ndarray]]:
    parts = [random_tokens(10 * i, 10 * i + 10) for i in range(5)]
    whole = TokenCodes(
        cell_idx=np.concatenate([part.cell_idx for part in parts]),
        token_pos=np.concatenate([part.token_pos for part in parts]),
        gene_id=np.concatenate([part.gene_id for part in parts]),
        codes=sparse.vstack([part.codes for part in parts]).tocsr(),
    )
    return parts, whole, lambda part: np.array(["train", "test"])[part.cell_idx % 2]


def test_statistics_of_shards_merge_to_those_of_the_whole(random_tokens: Callable[..., TokenCodes]) -> None:
    parts, whole, split = merged_and_whole(random_tokens)
    merged = token_statistics.merge_feature_gene([token_statistics.feature_gene_statistics(p, split(p)) for p in parts])
    direct = token_statistics.feature_gene_statistics(whole, split(whole))
    exact = ("split", "feature_id", "gene_id", "n_tokens", "max")
    assert merged.select(exact).equals(direct.select(exact))
    for column in ("sum", "sum_sq"):
        assert np.allclose(merged[column].to_numpy(), direct[column].to_numpy(), rtol=1e-13)
    genes = token_statistics.merge_gene([token_statistics.gene_statistics(p, split(p)) for p in parts])
    assert genes.equals(token_statistics.gene_statistics(whole, split(whole)))
    top = token_statistics.merge_top([token_statistics.top_tokens(p, 3) for p in parts], 3)
    assert top.equals(token_statistics.top_tokens(whole, 3))


def test_merging_gives_the_same_bits_every_time(rng: np.random.Generator) -> None:
    n = 50_000
    parts = [
        schemas.conform(
            "token_feature_gene",
            pl.DataFrame(
                {
                    "split": "test",
                    "feature_id": rng.integers(0, 50, n),
                    "gene_id": rng.integers(0, 20, n),
                    "n_tokens": 1,
                    "sum": rng.exponential(size=n),
                    "sum_sq": rng.exponential(size=n),
                    "max": rng.random(n),
                }
            ),
        )
        for _ in range(3)
    ]
    first = token_statistics.merge_feature_gene(parts)
    assert first.height == 1000
    for _ in range(5):
        assert token_statistics.merge_feature_gene(parts).equals(first)


def test_merging_nothing_gives_empty_tables() -> None:
    schemas.check("token_feature_gene", token_statistics.merge_feature_gene([]))
    schemas.check("token_gene", token_statistics.merge_gene([]))
    schemas.check("token_top", token_statistics.merge_top([], 3))


def test_tokens_on_which_nothing_fires_give_no_codes_but_are_counted() -> None:
    tokens = TokenCodes(
        cell_idx=np.array([1, 1]), token_pos=np.array([0, 1]), gene_id=np.array([4, 4]), codes=sparse.csr_array((2, 3))
    )
    split = np.array(["test", "test"])
    assert token_codes.pool(tokens).value.size == 0
    assert token_statistics.feature_gene_statistics(tokens, split).height == 0
    assert token_statistics.top_tokens(tokens, 5).height == 0
    assert token_statistics.gene_statistics(tokens, split).rows() == [("test", 4, 2)]


def test_no_tokens_at_all_give_empty_tables() -> None:
    none = np.empty(0, np.int64)
    tokens = TokenCodes(cell_idx=none, token_pos=none, gene_id=none, codes=sparse.csr_array((0, 3)))
    assert token_codes.pool(tokens).value.size == 0
    assert token_statistics.feature_gene_statistics(tokens, np.empty(0, np.str_)).height == 0
    assert token_statistics.gene_statistics(tokens, np.empty(0, np.str_)).height == 0
    assert token_statistics.top_tokens(tokens, 5).height == 0
