import numpy as np
import pytest
from scipy import sparse
from scipy.stats import brunnermunzel, mannwhitneyu, permutation_test, t, ttest_1samp

from feature_store.associations import Labels, Strata, as_csr, associate_labels, auroc
from feature_store.associations.donor_agreement import (
    MAX_FLIPPED,
    across_donors,
    between_donors,
    donor_effects,
    sign_flip_p,
)


def one_hot(label, n):
    return sparse.csr_array(np.eye(n)[label])


@pytest.fixture
def donated(rng):
    """Codes [160 5] of five donors; the last donor has no cell of label 2."""
    donor = np.repeat(np.arange(5), 32)
    codes = np.where(rng.random((160, 5)) < 0.6, rng.gamma(1, 1, (160, 5)).round(1), 0.0)
    label = rng.integers(0, 3, 160)
    label[donor == 4] %= 2
    codes[label == 1, 0] += 1
    return codes, label, donor


def per_donor(codes, label, donor, which):
    effects = []
    for d in range(5):
        x, y = codes[(donor == d) & (label == which)], codes[(donor == d) & (label != which)]
        effects.append(2 * mannwhitneyu(x, y).statistic / (x.size * y.size) - 1)
    return np.array(effects)


def test_effects_by_donor_equal_scipys_mann_whitney_in_each_donor(donated):
    codes, label, donor = donated
    effects = donor_effects(as_csr(codes, "codes"), one_hot(label, 3), Strata(codes=donor, n_strata=5))
    for f in range(5):
        for c in range(2):
            np.testing.assert_allclose(effects[:, f, c], per_donor(codes[:, f], label, donor, c), atol=1e-12)
    assert np.isnan(effects[4, :, 2]).all()
    assert np.isfinite(effects[:4]).all()


@pytest.mark.parametrize(
    ("effects", "p"), [([0.5], 1.0), ([0.9, 0.8], 0.5), ([0.1] * 8, 2 / 256), ([0.3, -0.1, 0.2], 0.5)]
)
def test_sign_flips_give_the_exact_p(effects, p):
    assert sign_flip_p(np.array(effects)) == p
    assert sign_flip_p(np.array([effects, effects]).T).tolist() == [p, p]


def test_p_and_interval_across_donors_equal_scipys(donated):
    codes, label, donor = donated
    csr, indicator = as_csr(codes, "codes"), one_hot(label, 3)
    found = across_donors(csr, indicator, Strata(codes=donor, n_strata=5), 2 * auroc(csr, indicator) - 1)
    assert found.n_donors.tolist() == [5, 5, 4]
    for f in range(5):
        effects = per_donor(codes[:, f], label, donor, 1)
        flipped = permutation_test(
            (effects,), lambda x: abs(x.sum()), permutation_type="samples", n_resamples=np.inf, alternative="greater"
        )
        assert found.p_donor[f, 1] == pytest.approx(flipped.pvalue)
        interval = ttest_1samp(effects, 0).confidence_interval()
        assert found.low[f, 1] == pytest.approx(max(interval.low, -1))
        assert found.high[f, 1] == pytest.approx(min(interval.high, 1))
        sign = np.sign(auroc(csr, indicator)[f, 1] - 0.5)
        assert found.n_agree[f, 1] == (np.sign(effects) == sign).sum()
    assert found.p_donor[0, 1] == 2**-4
    assert found.n_agree[0, 1] == 5


def test_no_p_of_n_donors_is_below_two_to_the_one_minus_n(rng):
    for n in (1, 2, 5, MAX_FLIPPED, MAX_FLIPPED + 1, 30):
        assert sign_flip_p(np.abs(rng.normal(5, 0.1, (n, 3)))) == pytest.approx(np.full(3, 0.5 ** (n - 1)), rel=1e-6)
        assert (sign_flip_p(np.zeros((n, 2))) == 1).all()


def test_beyond_enumeration_students_t_stands_in_for_the_flips(rng):
    effects = rng.normal(0.15, 0.4, (MAX_FLIPPED + 2, 40))
    signs = rng.choice([-1.0, 1.0], (20_000, effects.shape[0]))
    flipped = (np.abs(signs @ effects) >= np.abs(effects.sum(axis=0))).mean(axis=0)
    resolved = flipped > 0.002
    np.testing.assert_allclose(sign_flip_p(effects)[resolved], flipped[resolved], rtol=0.2, atol=0.01)


def test_two_donors_give_no_interval_and_one_gives_p_one(donated):
    codes, label, donor = donated
    few = donor < 2
    label = np.where(donor == 1, label % 2, label)
    csr, indicator = as_csr(codes[few], "codes"), one_hot(label[few], 3)
    found = across_donors(csr, indicator, Strata(codes=donor[few], n_strata=2), 2 * auroc(csr, indicator) - 1)
    assert np.isnan(found.low).all()
    assert found.n_donors.tolist() == [2, 2, 1]
    assert (found.p_donor[:, 2] == 1).all()


def test_with_one_cell_a_donor_the_interval_is_brunner_and_munzels(rng):
    codes = np.where(rng.random((40, 4)) < 0.7, rng.gamma(1, 1, (40, 4)).round(1), 0.0)
    ill = rng.permutation(np.arange(40) < 15)
    codes[ill, 0] += 0.7
    every = Strata(codes=np.arange(40), n_strata=40)
    found = between_donors(as_csr(codes, "codes"), one_hot(ill.astype(int), 2), every)
    for f in range(4):
        x, y = codes[ill, f], codes[~ill, f]
        area = mannwhitneyu(x, y).statistic / (x.size * y.size)
        oracle = brunnermunzel(y, x)
        error = (area - 0.5) / oracle.statistic
        # the degrees of freedom are those at which t gives scipy's p
        grid = np.linspace(5, 60, 55_001)
        df = grid[np.abs(2 * t.sf(abs(oracle.statistic), grid) - oracle.pvalue).argmin()]
        half = 2 * t.ppf(0.975, df) * error
        assert found.low[f, 1] == pytest.approx(max(2 * area - 1 - half, -1), abs=1e-4)
        assert found.high[f, 1] == pytest.approx(min(2 * area - 1 + half, 1), abs=1e-4)
        np.testing.assert_allclose(found.low[:, 0], -found.high[:, 1], atol=1e-12)


def test_interval_of_whole_donors_is_obuchowskis_by_hand(rng):
    donor = np.repeat(np.arange(6), [10, 20, 15, 12, 25, 8])
    ill = np.isin(donor, [0, 2, 5])
    codes = np.where(rng.random(90) < 0.7, rng.gamma(1, 1, 90).round(1) + rng.normal(0, 0.5, 6)[donor] ** 2, 0.0)
    x, y = codes[ill], codes[~ill]
    below = (x[:, None] > y[None, :]) + 0.5 * (x[:, None] == y[None, :])
    area = below.mean()
    parts = []
    for place, owner, which in (
        (below.mean(axis=1), donor[ill], [0, 2, 5]),
        (below.mean(axis=0), donor[~ill], [1, 3, 4]),
    ):
        square = sum((place[owner == d] - area).sum() ** 2 for d in which)
        parts.append(3 / 2 * square / owner.size**2)
    df = sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 2)
    half = 2 * t.ppf(0.975, df) * np.sqrt(sum(parts))
    found = between_donors(
        as_csr(codes[:, None], "codes"), one_hot(ill.astype(int), 2), Strata(codes=donor, n_strata=6)
    )
    assert found.low[0, 1] == pytest.approx(max(2 * area - 1 - half, -1))
    assert found.high[0, 1] == pytest.approx(min(2 * area - 1 + half, 1))


def test_a_label_of_one_donor_has_no_interval(rng):
    codes = as_csr(rng.random((30, 2)), "codes")
    donor = np.repeat(np.arange(3), 10)
    found = between_donors(codes, one_hot((donor == 1).astype(int), 2), Strata(codes=donor, n_strata=3))
    assert np.isnan(found.low).all()


def test_label_rows_carry_the_donors_behind_them(planted):
    masks = {name: np.array(planted.split) == name for name in ("select", "test")}
    types = associate_labels(planted.codes, planted.cell_type, masks, planted.donor).table
    row = types.filter(feature_id=0, label="A", split="test").row(0, named=True)
    assert (row["n_donors"], row["n_agree"], row["p_donor"]) == (3, 3, 0.25)
    assert 0 < row["low"] < row["rank_biserial"] < row["high"]
    ill = Labels.from_values("disease", np.where(planted.donor.codes % 2, "ill", "well"))
    everyone = {"select": np.ones(planted.donor.n_cells, bool)}
    units = associate_labels(planted.codes, ill, everyone, planted.donor).table
    assert units["p_donor"].equals(units["p"].alias("p_donor"))
    assert units["n_agree"].null_count() == units.height
    assert ((units["low"] <= units["rank_biserial"]) & (units["rank_biserial"] <= units["high"])).all()
    bare = associate_labels(planted.codes, planted.cell_type, everyone, None).table
    assert bare.select("n_donors", "n_agree", "p_donor", "low", "high").null_count().row(0) == (bare.height,) * 5
