from itertools import permutations

import numpy as np
import pytest
from scipy import sparse
from scipy.stats import pearsonr, spearmanr

from feature_store.associations import BlockMoments, Strata, as_csr, rank_scores
from feature_store.associations.moments import column_moments, cross_product, power_sums


def test_permutation_moments_equal_those_of_all_permutations_within_blocks(rng):
    a, b = rng.normal(size=7), rng.integers(0, 3, 7).astype(float)
    block = np.array([0, 0, 0, 0, 1, 1, 1])
    moments = BlockMoments.of(
        sparse.csr_array(a[:, None]), sparse.csr_array(b[:, None]), Strata(codes=block, n_strata=2)
    ).permutation()
    values = [
        a[:4] @ b[list(first)] + a[4:] @ b[list(second)]
        for first in permutations(range(4))
        for second in permutations(range(4, 7))
    ]
    centred = np.array(values) - np.mean(values)
    assert moments.statistic[0, 0] == pytest.approx(a @ b - np.mean(values))
    assert moments.variance[0, 0] == pytest.approx((centred**2).mean())
    assert moments.third[0, 0] == pytest.approx((centred**3).mean())


def test_correlations_equal_scipys_pearson_and_spearman_with_zero_ties(messy, rng):
    codes, _, _ = messy
    genes = np.where(rng.random((90, 5)) < 0.6, 0, rng.gamma(1, 1, (90, 5)))
    a, b, one = as_csr(codes, "codes"), as_csr(genes, "genes"), Strata.single(90)
    pearson = BlockMoments.of(a, b, one).correlation()
    spearman = BlockMoments.of(rank_scores(a, one).scores, rank_scores(b, one).scores, one).correlation()
    for f in range(8):
        for g in range(5):
            if np.ptp(codes[:, f]) > 0:
                assert pearson[f, g] == pytest.approx(pearsonr(codes[:, f], genes[:, g])[0], abs=1e-12)
                assert spearman[f, g] == pytest.approx(spearmanr(codes[:, f], genes[:, g])[0], abs=1e-12)
            else:
                assert pearson[f, g] == spearman[f, g] == 0


def test_correlation_within_strata_is_that_of_residuals(messy, rng):
    codes, _, block = messy
    genes = rng.gamma(1, 1, (90, 3))
    within = BlockMoments.of(as_csr(codes, "c"), as_csr(genes, "g"), Strata(codes=block, n_strata=3)).correlation()
    for s in range(3):
        codes[block == s] -= codes[block == s].mean(axis=0)
        genes[block == s] -= genes[block == s].mean(axis=0)
    assert within[0, 1] == pytest.approx(pearsonr(codes[:, 0], genes[:, 1])[0], abs=1e-12)


def test_products_of_full_and_thin_columns_equal_the_dense_ones_to_the_bit_of_their_column(rng):
    density = np.array([0.001, 0.9, 0.02, 0.5] * 20)
    a = sparse.csc_array(np.where(rng.random((3000, 80)) < density, rng.normal(size=(3000, 80)), 0.0))
    b = sparse.csr_array(np.where(rng.random((3000, 9)) < 0.3, rng.normal(size=(3000, 9)), 0.0))
    whole = cross_product(a, b)
    np.testing.assert_allclose(whole, a.toarray().T @ b.toarray(), atol=1e-10)
    for start, stop in ((0, 1), (1, 2), (5, 41), (41, 80)):
        np.testing.assert_array_equal(cross_product(a[:, start:stop], b), whole[start:stop])


def test_power_sums_of_rows_and_columns_stored_are_the_same(messy):
    codes, _, block = messy
    strata, matrix = Strata(codes=block, n_strata=3), as_csr(codes, "codes")
    expected = [[(codes[block == s] ** k).sum(axis=0) for s in range(3)] for k in (1, 2, 3)]
    np.testing.assert_allclose(power_sums(matrix, strata), expected, atol=1e-9)
    np.testing.assert_array_equal(power_sums(matrix, strata), power_sums(matrix.tocsc(), strata))


def test_mean_and_variance_of_columns_count_the_zeros(rng):
    dense = rng.normal(size=(30, 5)) * (rng.random((30, 5)) < 0.4)
    mean, variance = column_moments(sparse.csc_array(dense))
    np.testing.assert_allclose(mean, dense.mean(axis=0))
    np.testing.assert_allclose(variance, dense.var(axis=0))
