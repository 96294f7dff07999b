"""The pooled null: p is uniform where a feature is a random direction, and planted effects are found."""

import numpy as np
import pytest

from feature_store.associations.multiple_testing import benjamini_hochberg
from feature_store.effects import EffectBlock, pool_nulls
from feature_store.effects.nulls import PRIOR

N_FEATURES, N_GENES, N_DRAWS, RANK = 60, 80, 4, 5


def answers(rng, n_features=N_FEATURES, n_draws=N_DRAWS):
    """Effects of random directions: genes answer together through RANK directions, steps differ a hundredfold."""
    head = rng.standard_normal((RANK, N_GENES)) * np.exp(rng.normal(0, 1, N_GENES))
    size = np.exp(rng.normal(0, 1.5, (n_features, 1, 1)))
    curved = 0.3 * np.abs(rng.standard_normal((n_features, 1 + n_draws, 1))) * np.abs(head[0])
    found = size * (rng.standard_normal((n_features, 1 + n_draws, RANK)) @ head + curved)
    return found[:, 0], found[:, 1:]


def scores_of(effect, draws, n_blocks=3, prior=PRIOR):
    parts = np.array_split(np.arange(len(effect)), n_blocks)
    blocks = [EffectBlock(effect=effect[part], draws=draws[part]) for part in parts]
    null = pool_nulls(lambda: blocks, effect.shape[1], prior=prior)
    found = [null.scores(block) for block in blocks]
    return null, {name: np.concatenate([getattr(own, name) for own in found]) for name in ("mean", "sd", "z", "p")}


@pytest.mark.parametrize("prior", [PRIOR, 1000.0])
def test_random_directions_have_uniform_p_and_at_most_the_nominal_rate_of_false_discoveries(prior):
    rng = np.random.default_rng(0)
    below, any_found, n = np.zeros(3), 0, 0
    for _ in range(200):
        effect, draws = answers(rng)
        p = scores_of(effect, draws, prior=prior)[1]["p"]
        below += [(p <= level).sum() for level in (0.5, 0.1, 0.01)]
        n += p.size
        any_found += (benjamini_hochberg(p) <= 0.05).any()
    # within-replicate dependence leaves the mean unbiased; its standard error over 200 replicates is below a tenth
    np.testing.assert_allclose(below / n, [0.5, 0.1, 0.01], rtol=0.1)
    assert any_found / 200 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)


def test_planted_effects_are_found_and_their_share_of_false_discoveries_is_nominal():
    rng = np.random.default_rng(1)
    found, false, missed = 0, [], 0
    for _ in range(20):
        effect, draws = answers(rng)
        planted = np.zeros(effect.shape, dtype=bool)
        planted[:10, :8] = True
        effect[planted] += 40 * np.sqrt((draws**2).mean(1))[planted]
        q = benjamini_hochberg(scores_of(effect, draws)[1]["p"])
        chosen = q <= 0.05
        found += (chosen & planted).sum()
        missed += (planted & ~chosen).sum()
        false.append((chosen & ~planted).sum() / max(chosen.sum(), 1))
    assert found / (found + missed) > 0.9
    assert np.mean(false) <= 0.05


def test_blocks_do_not_change_the_scores():
    effect, draws = answers(np.random.default_rng(2))
    draws[3:9, :, 20:40], effect[3:9, 20:40] = np.nan, np.nan
    one, other = scores_of(effect, draws, 1)[1], scores_of(effect, draws, 7)[1]
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-10)
    assert np.isnan(one["p"][3:9, 20:40]).all()
    assert np.isfinite(np.delete(one["p"], np.s_[3:9], 0)).all()


def test_z_of_a_rank_one_null_is_that_of_its_scale_and_gene():
    rng = np.random.default_rng(3)
    size, gene = np.exp(rng.normal(0, 1, 400)), np.exp(rng.normal(0, 1, 50))
    unit = rng.standard_normal((400, 41, 50)) + 0.5
    both = size[:, None, None] * unit * gene
    scores = scores_of(both[:, 0], both[:, 1:])[1]
    np.testing.assert_allclose(scores["sd"].mean(1), size * gene.mean(), rtol=0.12)
    np.testing.assert_allclose(scores["z"], unit[:, 0] - 0.5, atol=1.5)


def test_a_gene_without_null_has_no_score():
    effect, draws = answers(np.random.default_rng(4))
    draws[:, :, 0] = np.nan
    null, scores = scores_of(effect, draws)
    assert np.isnan(scores["z"][:, 0]).all()
    assert np.isnan(scores["p"][:, 0]).all()
    assert null.n == N_FEATURES * N_DRAWS * (N_GENES - 1)


@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_scores_do_not_depend_on_the_unit_of_the_head(factor):
    effect, draws = answers(np.random.default_rng(5))
    one, other = scores_of(effect, draws)[1], scores_of(effect * factor, draws * factor)[1]
    np.testing.assert_allclose(one["z"], other["z"], rtol=1e-9)
    np.testing.assert_allclose(other["sd"], one["sd"] * factor, rtol=1e-9)
