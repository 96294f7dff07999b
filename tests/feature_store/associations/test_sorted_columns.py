"""Columns that are sorted once, whatever cells are left out of them, equal the dense columns."""

import numpy as np
import pytest
from scipy import sparse
from scipy.stats import rankdata

from feature_store.associations import Strata, as_csr
from feature_store.associations.ranks import column_ranks
from feature_store.associations.sorted_columns import SortedColumns, stable_order


@pytest.fixture(params=[10, 1 << 17])
def columns(request, messy, monkeypatch):
    monkeypatch.setattr("feature_store.associations.sorted_columns.CHUNK_VALUES", request.param)
    return SortedColumns.of(as_csr(messy[0], "codes"))


def assert_sorted(columns, dense):
    np.testing.assert_array_equal(columns.matrix.toarray(), dense)
    for start, stop in zip(columns.matrix.indptr[:-1], columns.matrix.indptr[1:], strict=True):
        assert (np.diff(columns.matrix.data[start:stop]) >= 0).all()


def test_cells_and_columns_and_positive_values_are_taken_in_order(columns, messy):
    codes, label, _ = messy
    assert_sorted(columns, codes)
    assert_sorted(columns.take(label > 0), codes[label > 0])
    assert_sorted(columns.positive(), np.maximum(codes, 0))
    assert_sorted(columns.columns(2, 5), codes[:, 2:5])
    assert_sorted(columns.take(label > 0).columns(3, 8).positive(), np.maximum(codes[label > 0, 3:8], 0))


def test_the_maximum_is_that_of_the_dense_columns(columns, messy):
    np.testing.assert_array_equal(columns.maximum(), messy[0].max(axis=0))
    np.testing.assert_array_equal(SortedColumns.of(sparse.csr_array(-np.ones((3, 1)))).maximum(), [-1.0])


def test_ranks_of_some_cells_are_scipys(columns, messy):
    codes, label, block = messy
    cells = label > 0
    strata = Strata(codes=block[cells], n_strata=3)
    part = columns.split(cells)
    scores, zero_rank = column_ranks(part, strata)
    for s in range(3):
        rows = block[cells] == s
        found = scores.toarray()[rows] + zero_rank[s]
        np.testing.assert_array_equal(found, rankdata(codes[cells][rows], axis=0))
    assert columns.split(cells) is part
    assert column_ranks(part, strata).scores is scores


@pytest.mark.parametrize("n_groups", [3, 1000, 100_000])
def test_the_order_by_group_is_stable(rng, n_groups):
    group = rng.integers(0, n_groups, 5000)
    np.testing.assert_array_equal(stable_order(group, n_groups), np.argsort(group, kind="stable"))
