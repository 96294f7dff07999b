import numpy as np
from scipy import sparse
from scipy.stats import rankdata

from feature_store.associations import Strata, as_csr, rank_scores


def test_scores_plus_zero_rank_are_scipys_midranks_in_every_stratum(messy):
    codes, _, block = messy
    strata = Strata(codes=block, n_strata=3)
    scores, zero_rank = rank_scores(as_csr(codes, "codes"), strata)
    dense = scores.toarray()
    for s in range(3):
        rows = block == s
        np.testing.assert_allclose(dense[rows] + zero_rank[s], rankdata(codes[rows], axis=0), atol=1e-12)


def test_zeros_stay_zeros_so_the_pattern_is_that_of_the_codes(messy):
    codes, _, block = messy
    scores, _ = rank_scores(as_csr(codes, "codes"), Strata(codes=block, n_strata=3))
    assert np.array_equal(scores.toarray() != 0, codes != 0) or codes[:, 5].all()
    assert scores.nnz == np.count_nonzero(codes)


def test_a_matrix_without_stored_values_has_only_the_zero_block():
    scores, zero_rank = rank_scores(sparse.csr_array((5, 2)), Strata.single(5))
    assert scores.nnz == 0
    np.testing.assert_array_equal(zero_rank, [[3.0, 3.0]])
