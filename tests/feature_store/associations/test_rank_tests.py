import numpy as np
import pytest
from scipy import sparse
from scipy.stats import mannwhitneyu, norm, permutation_test, rankdata

from feature_store.associations import Labels, Strata, as_csr, blocked_rank_test
from feature_store.associations.rank_tests import RankTest, varies_within


def one_hot(label, n):
    return sparse.csr_array(np.eye(n)[label])


def test_one_block_is_the_mann_whitney_test_without_continuity_correction(messy):
    codes, label, _ = messy
    z, p = blocked_rank_test(as_csr(codes, "codes"), one_hot(label, 4), Strata.single(90))
    for f in (0, 1, 2, 3, 6, 7):
        for c in range(4):
            x, y = codes[label == c, f], codes[label != c, f]
            expected = mannwhitneyu(x, y, use_continuity=False, method="asymptotic")
            assert 2 * norm.sf(abs(z[f, c])) == pytest.approx(expected.pvalue, rel=1e-9)
            assert np.sign(z[f, c]) == np.sign(expected.statistic - x.size * y.size / 2)
            # the third moment only makes the tail heavier, and by little where label and feature are not rare
            assert expected.pvalue <= p[f, c] + 1e-12 < 1.5 * expected.pvalue + 0.02


def test_blocks_are_combined_with_van_elterens_weights(messy):
    codes, label, block = messy
    z, _ = blocked_rank_test(as_csr(codes, "codes"), one_hot(label, 4), Strata(codes=block, n_strata=3))
    for f in (0, 3, 6):
        top = bottom = 0.0
        for s in range(3):
            inside = block == s
            x, y = codes[inside & (label == 1), f], codes[inside & (label != 1), f]
            test = mannwhitneyu(x, y, use_continuity=False, method="asymptotic")
            deviation = test.statistic - x.size * y.size / 2
            sd = abs(deviation) / norm.isf(test.pvalue / 2)
            weight = 1 / (inside.sum() + 1)
            top, bottom = top + weight * deviation, bottom + (weight * sd) ** 2
        assert z[f, 1] == pytest.approx(top / np.sqrt(bottom), rel=1e-7)


@pytest.mark.parametrize(("density", "n_label"), [(0.03, 4), (0.1, 12), (0.2, 30), (0.5, 30), (0.9, 5)])
def test_p_is_that_of_donor_blocked_permutation_also_for_rare_features_and_labels(density, n_label):
    rng = np.random.default_rng(int(density * 100) + n_label)
    n, block = 160, np.repeat([0, 1, 2], [60, 60, 40])
    codes = np.where(rng.random((n, 60)) < density, rng.gamma(1, 1, (n, 60)), 0.0)
    label = np.zeros(n)
    label[rng.choice(n, n_label, replace=False)] = 1
    codes[label == 1, :20] *= 3
    codes[label == 1, 20:30] = 0
    strata = Strata(codes=block, n_strata=3)
    _, p = blocked_rank_test(as_csr(codes, "codes"), sparse.csr_array(label[:, None]), strata)
    ranks = np.vstack([rankdata(codes[block == s], axis=0) / ((block == s).sum() + 1) for s in range(3)])
    permuted = np.stack([np.concatenate([rng.permutation(label[block == s]) for s in range(3)]) for _ in range(20_000)])
    draws, observed = permuted @ ranks, label @ ranks
    upper, lower = (draws >= observed - 1e-9).mean(axis=0), (draws <= observed + 1e-9).mean(axis=0)
    tail = np.minimum(upper, lower)
    resolved = (tail > 1e-3) & (tail < 0.5)
    ratio = p[resolved, 0] / tail[resolved]
    # p counts both tails; where the null is a lattice of a few points (rare in rare), its tail is right on average only
    rare = density * n_label < 2
    assert ratio.min() > (0.5 if rare else 0.95)
    assert rare or 1.6 < np.median(ratio) < 2.4


def test_no_p_is_below_one_over_the_number_of_assignments():
    codes = np.r_[np.ones(3), np.zeros(7)][:, None]
    label = np.r_[np.ones(3), np.zeros(7)][:, None]
    _, p = blocked_rank_test(as_csr(codes, "codes"), sparse.csr_array(label), Strata.single(10))
    assert p[0, 0] == pytest.approx(1 / 120)


def test_constant_and_dead_features_have_p_one_and_z_zero(messy):
    codes, label, block = messy
    z, p = blocked_rank_test(as_csr(codes, "codes"), one_hot(label, 4), Strata(codes=block, n_strata=3))
    assert (p[[4, 5]] == 1).all()
    assert (z[[4, 5]] == 0).all()


def test_permuting_whole_donors_is_exact_and_shows_its_floor(rng):
    donor = np.repeat(np.arange(7), 20)
    disease = np.array([1, 1, 1, 0, 0, 0, 0])
    codes = rng.gamma(1, 1, (140, 5)) * (rng.random((140, 5)) < 0.6)
    codes[disease[donor] == 1, 0] += 5
    indicator = one_hot(disease[donor], 2)
    z, p = RankTest.by_unit(as_csr(codes, "codes"), indicator, Strata(codes=donor, n_strata=7)).result()
    mean = np.stack([codes[donor == d].mean(axis=0) for d in range(7)])
    for f in range(5):
        ranks = rankdata(mean[:, f])
        test = permutation_test(
            (ranks[disease == 1], ranks[disease == 0]),
            lambda x, y: abs(x.sum() - 3 * 4),
            permutation_type="independent",
            alternative="greater",
            n_resamples=np.inf,
        )
        assert p[f, 1] == pytest.approx(test.pvalue)
    assert p[0, 1] == pytest.approx(2 / 35)
    assert z[0, 1] > 0 > z[0, 0]


def test_unit_means_within_strata_are_those_of_centred_ranks(rng):
    donor, kind = np.repeat(np.arange(8), 15), rng.integers(0, 3, 120)
    codes = rng.gamma(1, 1, (120, 6)) * (rng.random((120, 6)) < 0.7)
    ill = np.isin(donor, [0, 3, 4, 6]).astype(int)
    strata, units = Strata(codes=kind, n_strata=3), Strata(codes=donor, n_strata=8)
    test = RankTest.by_unit(as_csr(codes, "codes"), one_hot(ill, 2), units, within=strata)
    ranks = np.zeros(codes.shape)
    for k in range(3):
        inside = kind == k
        ranks[inside] = rankdata(codes[inside], axis=0) / (inside.sum() + 1)
        ranks[inside] -= ranks[inside].mean(axis=0)
    mean = np.stack([ranks[donor == d].mean(axis=0) for d in range(8)])
    expected = rankdata(mean, axis=0)
    scores = test.scores.toarray()
    np.testing.assert_allclose(scores - scores.mean(axis=0), expected - expected.mean(axis=0))
    of_donor = np.isin(np.arange(8), [0, 3, 4, 6])
    for f in range(6):
        oracle = permutation_test(
            (expected[of_donor, f], expected[~of_donor, f]),
            lambda x, y: abs(x.sum() - 4 * 4.5),
            permutation_type="independent",
            alternative="greater",
            n_resamples=np.inf,
        )
        assert test.result()[1][f, 1] == pytest.approx(oracle.pvalue)


def test_a_label_is_tested_within_donors_only_if_it_varies_within_them():
    donor = Labels.from_values("donor", np.repeat(["a", "b", "c", "d"], 10))
    strata = Strata.of(40, donor)
    disease = one_hot(np.repeat([0, 0, 1, 1], 10), 2)
    cell_type = one_hot(np.tile([0, 1], 20), 2)
    assert not varies_within(disease, strata).any()
    assert varies_within(cell_type, strata).all()
