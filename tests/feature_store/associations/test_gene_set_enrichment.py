import numpy as np
import pytest
from scipy import sparse
from scipy.stats import hypergeom

from feature_store.associations.gene_set_enrichment import GENES_PER_BIN, N_BINS, detection_bins, over_representation


@pytest.fixture
def lists(rng):
    """Eight features' genes and five sets among 200 genes, both drawn mostly from genes that many cells express."""
    n_cells = rng.integers(0, 60, 200).astype(float) ** 2
    often = n_cells / n_cells.sum()
    chosen = np.stack([np.isin(np.arange(200), rng.choice(200, 12, replace=False, p=often)) for _ in range(8)])
    sets = np.stack([np.isin(np.arange(200), rng.choice(200, 30, replace=False, p=often)) for _ in range(5)], axis=1)
    return chosen, sets, n_cells


def test_matched_p_is_the_tail_of_a_sum_of_hypergeometric_counts_over_bins(lists):
    chosen, sets, n_cells = lists
    detected = n_cells > 0
    found = over_representation(chosen, sparse.csr_array(sets.astype(float)), detected, n_cells)
    bins = detection_bins(n_cells[detected])
    assert bins.n_strata == detected.sum() // GENES_PER_BIN
    for f in range(8):
        for s in range(5):
            mass = np.ones(1)
            for b in range(bins.n_strata):
                inside = np.flatnonzero(detected)[bins.codes == b]
                n_mine, n_set = chosen[f, inside].sum(), sets[inside, s].sum()
                mass = np.convolve(mass, hypergeom.pmf(np.arange(n_mine + 1), inside.size, n_set, n_mine))
            overlap = (chosen[f] & sets[:, s] & detected).sum()
            assert found.p_matched[f, s] == pytest.approx(mass[overlap:].sum() if overlap else 1.0)


def test_matched_p_is_the_share_of_matched_random_lists_that_overlap_as_much(lists, rng):
    chosen, sets, n_cells = lists
    n_cells = n_cells + 1
    found = over_representation(chosen, sparse.csr_array(sets.astype(float)), n_cells > 0, n_cells)
    bins = detection_bins(n_cells)
    for f in (0, 1):
        draws = np.zeros((20_000, 200), dtype=bool)
        for b in range(bins.n_strata):
            inside = np.flatnonzero(bins.codes == b)
            order = rng.random((draws.shape[0], inside.size)).argsort(axis=1)
            draws[:, inside] = order < chosen[f, inside].sum()
        reached = draws.astype(float) @ sets >= found.overlap[f] - 0.5
        np.testing.assert_allclose(found.p_matched[f], reached.mean(axis=0), atol=0.015)


def test_one_bin_or_no_detection_gives_the_plain_hypergeometric_p(lists):
    chosen, sets, _ = lists
    members, everything = sparse.csr_array(sets.astype(float)), np.ones(200, dtype=bool)
    for n_cells in (None, np.full(200, 7.0)):
        found = over_representation(chosen, members, everything, n_cells)
        np.testing.assert_allclose(found.p_matched, found.p, rtol=1e-9)


def test_bins_are_of_about_equal_size_and_equal_genes_share_one(rng):
    n_cells = rng.integers(0, 100_000, 3_000).astype(float)
    bins = detection_bins(n_cells)
    assert bins.n_strata == N_BINS
    assert (np.abs(bins.sizes() - 3_000 / N_BINS) <= 2).all()
    order = np.argsort(n_cells, kind="stable")
    assert (np.diff(bins.codes[order]) >= 0).all()
    tied = detection_bins(np.repeat([1.0, 2.0, 3.0], [900, 50, 50]))
    assert all(np.unique(tied.codes[part]).size == 1 for part in (slice(900), slice(900, 950), slice(950, 1000)))


def test_a_set_of_common_genes_is_enriched_only_until_lists_are_matched(lists):
    chosen, sets, n_cells = lists
    detected = n_cells > 0
    common = n_cells >= np.sort(n_cells)[-40]
    members = sparse.csr_array(np.c_[common, sets].astype(float))
    found = over_representation(chosen, members, detected, n_cells)
    assert found.p[:, 0].min() < 0.001
    assert found.p_matched[:, 0].min() > 0.05


def test_without_genes_or_members_p_is_one(rng):
    nothing = over_representation(
        np.zeros((2, 60), bool), sparse.csr_array((60, 3)), np.ones(60, bool), np.arange(60.0)
    )
    assert (nothing.p_matched == 1).all()
    dead = over_representation(np.ones((2, 60), bool), sparse.csr_array((60, 3)), np.zeros(60, bool), np.zeros(60))
    assert (dead.p_matched == 1).all()
