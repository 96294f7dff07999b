"""Modules: partial correlations against a regression, planted modules, and none in shuffled codes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from feature_store.modules import coherence, correlations, find_modules, residuals, shuffled_in_blocks

N_CELLS, N_FEATURES, N_DONORS = 1200, 60, 6
FIRST, SECOND, OF_TYPE, OF_DEPTH = range(5), range(5, 10), range(10, 15), range(15, 20)


def planted(seed: int = 0):
    """Codes in which two groups fire together inside types; others follow the type or the depth alone."""
    rng = np.random.default_rng(seed)
    kind, donor = rng.integers(0, 3, N_CELLS), rng.integers(0, N_DONORS, N_CELLS)
    depth = rng.lognormal(7, 0.5, N_CELLS)
    codes = rng.gamma(1, 1, (N_CELLS, N_FEATURES)) * (rng.random((N_CELLS, N_FEATURES)) < 0.4)
    for group in (FIRST, SECOND):
        state = rng.random(N_CELLS) < 0.3
        codes[:, list(group)] += state[:, None] * rng.gamma(2, 1, (N_CELLS, 5)) * (rng.random((N_CELLS, 5)) < 0.8)
    codes[:, list(OF_TYPE)] *= np.where(kind == 0, 6, 1)[:, None]
    codes[:, list(OF_DEPTH)] += np.log(depth)[:, None] - 6
    return sparse.csr_array(np.maximum(codes, 0)), kind * N_DONORS + donor, donor, depth


def test_residuals_are_what_a_regression_on_blocks_and_depth_leaves():
    codes, block, _, depth = planted()
    found = residuals(codes, block, depth)
    one_hot = (block[:, None] == np.unique(block)[None]).astype(float)
    design = np.hstack([one_hot, np.log1p(depth)[:, None]])
    root = np.sqrt(codes.toarray())
    expected = root - design @ np.linalg.lstsq(design, root, rcond=None)[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    r = np.corrcoef(expected.T)
    np.fill_diagonal(r, 0)
    np.testing.assert_allclose(correlations(found), r, atol=1e-4)


def test_a_feature_that_does_not_vary_has_no_correlation():
    values = np.array([[1.0, 0.0, 2.0], [-1.0, 0.0, 1.0], [0.0, 0.0, -3.0]], dtype=np.float32)
    found = correlations(values)
    assert np.isfinite(found).all()
    assert (found[1] == 0).all()
    assert (np.diag(found) == 0).all()


def test_shuffling_keeps_the_values_of_each_feature_in_each_block():
    codes, block, _, depth = planted()
    values = residuals(codes, block, depth)
    found = shuffled_in_blocks(values, block, np.random.default_rng(0))
    for one in np.unique(block):
        np.testing.assert_allclose(np.sort(found[block == one], axis=0), np.sort(values[block == one], axis=0))
    assert correlations(found).max() < 0.2 < correlations(values).max()


@pytest.mark.parametrize("seed", range(3))
def test_planted_modules_are_found_and_types_and_depth_make_none(seed):
    codes, block, donor, depth = planted(seed)
    found = find_modules(residuals(codes, block, depth), block, donor, n_resamples=10, seed=seed)
    assert sorted(found.members) == [tuple(FIRST), tuple(SECOND)]
    assert min(found.stability) > 0.9


def test_shuffled_codes_have_no_modules():
    n_found = 0
    for seed in range(10):
        codes, block, donor, depth = planted(seed)
        values = shuffled_in_blocks(residuals(codes, block, depth), block, np.random.default_rng(seed))
        n_found += len(find_modules(values, block, donor, n_resamples=10, seed=seed).members)
    assert n_found == 0


def test_a_module_coheres_beyond_features_that_fire_as_often():
    codes, block, _, depth = planted()
    found, rng = correlations(residuals(codes, block, depth)), np.random.default_rng(0)
    density = np.asarray((codes > 0).mean(axis=0)).ravel()
    own, draws = coherence(found, list(FIRST), density, n_draws=200, rng=rng)
    pairs = [found[a, b] for a in FIRST for b in FIRST if a != b]
    assert own == pytest.approx(np.mean(pairs), abs=1e-6)
    assert own > draws.max()
    random, null = coherence(found, [30, 41, 52], density, n_draws=200, rng=rng)
    assert abs(random - null.mean()) < 5 * null.std()
