from __future__ import annotations

import pytest
import torch

from sae_core.errors import ConfigError
from sae_core.sae import SparseCodes
from sae_core.sae.codes import positions_above


def test_dense_to_sparse_to_dense_is_the_identity_also_with_empty_rows():
    dense = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, -3.0]])
    codes = SparseCodes.from_dense(dense)
    assert codes.crow.tolist() == [0, 1, 1, 3]
    assert codes.col.tolist() == [1, 0, 2]
    assert codes.value.tolist() == [2.0, 1.0, -3.0]
    assert codes.row.tolist() == [0, 2, 2]
    assert (codes.n_tokens, codes.nnz) == (3, 3)
    assert torch.equal(codes.to_dense(), dense)


def test_codes_of_no_token_and_of_no_entry_are_whole():
    assert SparseCodes.from_dense(torch.zeros(0, 4)).to_dense().shape == (0, 4)
    assert torch.equal(SparseCodes.from_dense(torch.zeros(2, 4)).to_dense(), torch.zeros(2, 4))


def test_rows_equal_those_of_scipy_and_so_does_the_order_by_feature(random_codes):
    sparse = pytest.importorskip("scipy.sparse")
    codes = random_codes(23, 11, density=0.2)
    csr = sparse.csr_array(codes.to_dense().numpy())
    assert csr.indptr.tolist() == codes.crow.tolist()
    assert csr.indices.tolist() == codes.col.tolist()
    csc = csr.tocsc()
    order, offsets = codes.by_feature
    assert csc.indptr.tolist() == offsets.tolist()
    assert csc.indices.tolist() == codes.row[order].tolist()
    assert csc.data.tolist() == codes.value[order].tolist()


def test_chosen_tokens_and_concatenation_equal_their_dense_counterparts(random_codes):
    codes = random_codes(9, 5, density=0.3)
    index = torch.tensor([8, 0, 3, 3])
    assert torch.equal(codes.take(index).to_dense(), codes.to_dense()[index])
    assert codes.take(index[:0]).n_tokens == 0
    parts = [codes.take(torch.arange(a, b)) for a, b in [(0, 4), (4, 4), (4, 9)]]
    joined = SparseCodes.concatenate(parts)
    assert torch.equal(joined.to_dense(), codes.to_dense())
    assert torch.equal(joined.crow, codes.crow)


def test_columns_equal_those_of_the_dense_matrix(random_codes):
    codes = random_codes(9, 7, density=0.3)
    for features in ([0, 2, 6], [3], list(range(7)), []):
        index = torch.tensor(features, dtype=torch.int64)
        assert torch.equal(codes.columns(index), codes.to_dense()[:, index])
        indexed = random_codes(9, 7, density=0.3).with_index()
        assert torch.equal(indexed.columns(index), indexed.to_dense()[:, index])


def test_codes_of_different_widths_cannot_be_concatenated(random_codes):
    with pytest.raises(ConfigError, match=r"n_features \[5, 6\]"):
        SparseCodes.concatenate([random_codes(2, 5, density=0.5), random_codes(2, 6, density=0.5)])


def test_codes_by_group_are_the_same_nonzeros_with_a_row_for_each_group(random_codes):
    codes = random_codes(7, 13, density=0.3).with_index()
    grouped = codes.split_groups((1, 5, 13))
    dense, expected = codes.to_dense(), torch.zeros(7, 3, 13, dtype=torch.float64)
    for group, (start, stop) in enumerate([(0, 1), (1, 5), (5, 13)]):
        expected[:, group, start:stop] = dense[:, start:stop]
    assert torch.equal(grouped.to_dense(), expected.view(21, 13))
    assert torch.equal(grouped.col, codes.col)
    assert grouped.by_feature is codes.by_feature
    assert codes.split_groups((13,)).crow.tolist() == codes.crow.tolist()


def test_codes_without_a_nonzero_or_a_token_have_groups_too(random_codes):
    assert random_codes(4, 6, density=0.0).split_groups((2, 6)).to_dense().shape == (8, 6)
    assert random_codes(0, 6, density=0.5).split_groups((2, 6)).n_tokens == 0


def test_indexed_codes_share_what_is_known_about_their_places_with_all_that_is_derived(random_codes):
    codes = random_codes(7, 13, density=0.3).with_index()
    derived = codes.with_value(2 * codes.value).with_value(codes.value)
    assert derived.row is codes.row
    assert derived.by_feature is codes.by_feature


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [0, 1, 1000, 2**18, 2**18 + 7])
def test_places_above_a_floor_are_found_wherever_they_lie(dtype, n):
    flat = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
    for floor in (0.0, 0.125, 1.0, 3.0, float(flat.float().abs().max()) if n else 7.0):
        assert torch.equal(positions_above(flat, floor), (flat.double() > floor).nonzero().squeeze(1))
    assert torch.equal(positions_above(flat > 1, 0.0), (flat > 1).nonzero().squeeze(1))


def test_a_floor_between_two_bfloat16_is_not_rounded():
    values = torch.tensor([0.0, -0.0, -1.0, 1.0, 1.0078125, torch.inf, -torch.inf], dtype=torch.bfloat16)
    for floor in (0.0, 0.999, 1.0, 1.0001, 1.0078, 1.0078125):
        assert torch.equal(positions_above(values, floor), (values.double() > floor).nonzero().squeeze(1))
