"""The matched null: p is uniform where a gene is like its null genes, and genes beyond them are found."""

from functools import partial

import numpy as np
import pytest

from feature_store.associations.multiple_testing import benjamini_hochberg
from feature_store.effects import GeneEffects, pool_matched
from feature_store.effects.matched import FLOOR, PRIOR

N_GENES, N_NULLS = 10, 4


def feature(rng, *, zeros=0.0, n_genes=N_GENES, n_nulls=N_NULLS):
    """Effects of like genes: each gene and its null genes have a mean and a width of their own, with heavy tails."""
    of = np.resize(np.arange(n_genes), n_genes * n_nulls)
    width, shift = np.exp(rng.normal(0, 0.7, n_genes)), rng.normal(0, 0.5, n_genes)
    scale = 0.02 * np.exp(rng.normal(0, 1.5))

    def drawn(group):
        value = scale * (shift[group] + width[group] * rng.standard_t(4, len(group)))
        return np.where(rng.random(len(group)) < zeros, 0.0, np.abs(value) if zeros else value)

    return GeneEffects(gene=drawn(np.arange(n_genes)), null=drawn(of), of=of)


def p_of(effects, *, two_sided):
    pooled = pool_matched(partial(iter, effects), two_sided=two_sided)
    return np.concatenate([pooled.scores(own).p for own in effects])


@pytest.mark.parametrize(
    ("zeros", "two_sided", "n_features"), [(0.0, True, 20), (0.0, False, 20), (0.95, False, 20), (0.0, True, 1)]
)
def test_like_genes_have_uniform_p_and_at_most_the_nominal_rate_of_false_discoveries(zeros, two_sided, n_features):
    rng = np.random.default_rng(0)
    below, any_found, n = np.zeros(3), 0, 0
    for _ in range(200):
        n_nulls = N_NULLS if n_features > 1 else 20
        p = p_of([feature(rng, zeros=zeros, n_nulls=n_nulls) for _ in range(n_features)], two_sided=two_sided)
        below += [(p <= level).sum() for level in (0.5, 0.1, 0.01)]
        n += p.size
        any_found += (benjamini_hochberg(p) <= 0.05).any()
    if zeros:
        # most effects are the same, and those have p = 1 or nearly so
        assert (below / n <= np.array([0.5, 0.1, 0.01]) * 1.1).all()
    else:
        np.testing.assert_allclose(below / n, [0.5, 0.1, 0.01], rtol=0.1 if n_features > 1 else 0.25)
    assert any_found / 200 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)


@pytest.mark.parametrize("zeros", [0.0, 0.95])
def test_planted_effects_are_found_and_their_share_of_false_discoveries_is_nominal(zeros):
    rng = np.random.default_rng(1)
    hits, false, planted = 0, [], 0
    for _ in range(20):
        effects = [feature(rng, zeros=zeros) for _ in range(20)]
        is_planted = np.zeros((20, N_GENES), dtype=bool)
        for own, mine in zip(effects[:10], is_planted, strict=False):
            mine[:2] = True
            own.gene[:2] = 0.9 + 40 * own.null.std()
        chosen = benjamini_hochberg(p_of(effects, two_sided=not zeros)) <= 0.05
        hits += (chosen & is_planted.ravel()).sum()
        planted += is_planted.sum()
        false.append((chosen & ~is_planted.ravel()).sum() / max(chosen.sum(), 1))
    assert hits / planted > 0.9
    assert np.mean(false) <= 0.05


def by_hand(effect, group, rest, of, variance):
    """The null of one effect from the null genes that are left."""
    m = rest.mean()
    wide = (PRIOR * variance + ((rest - m) ** 2).sum()) / (PRIOR + len(rest))
    own = rest[of == group]
    close = (PRIOR * m + own.sum()) / (PRIOR + len(own))
    sd = np.sqrt((PRIOR * wide + ((own - close) ** 2).sum()) / (PRIOR + len(own)))
    return close, sd, (effect - close) / sd


def test_scores_are_those_of_the_equations_one_gene_at_a_time():
    rng = np.random.default_rng(2)
    effects = [feature(rng), feature(rng)]
    # of gene 0 there is no null gene, and two null genes were drawn for a gene that is not tested
    effects[0] = GeneEffects(
        gene=effects[0].gene, null=effects[0].null, of=np.where(effects[0].of == 0, 10, effects[0].of)
    )
    variance = np.median([own.null.var() for own in effects])
    pooled = pool_matched(partial(iter, effects), two_sided=True)
    assert pooled.variance == pytest.approx(variance)
    null_z = []
    for own in effects:
        found = pooled.scores(own)
        for g in range(N_GENES):
            last = np.flatnonzero(own.of == g)[-1] if (own.of == g).any() else len(own.null) - 1
            kept = np.arange(len(own.null)) != last
            expected = by_hand(own.gene[g], g, own.null[kept], own.of[kept], variance)
            np.testing.assert_allclose([found.mean[g], found.sd[g], found.z[g]], expected, rtol=1e-9)
        for i, group in enumerate(own.of):
            kept = np.arange(len(own.null)) != i
            null_z.append(abs(by_hand(own.null[i], group, own.null[kept], own.of[kept], variance)[2]))
    np.testing.assert_allclose(pooled.z, np.sort(null_z), rtol=1e-9)
    first = pooled.scores(effects[0])
    np.testing.assert_allclose(first.p, [(1 + (np.array(null_z) >= abs(z)).sum()) / 81 for z in first.z])


def test_a_gene_that_does_nothing_is_not_found_where_null_genes_do_something():
    null = np.full(40, 0.1) + np.linspace(-0.001, 0.001, 40)
    own = GeneEffects(gene=np.array([0.0, 0.1]), null=null, of=np.resize([0, 1], 40))
    assert pool_matched(lambda: [own], two_sided=False).scores(own).p[0] == 1
    assert pool_matched(lambda: [own], two_sided=True).scores(own).p[0] == pytest.approx(1 / 41)


def test_rounding_is_no_effect_and_a_feature_without_null_genes_has_no_p():
    rng = np.random.default_rng(3)
    same = GeneEffects(gene=0.025 + 1e-8 * rng.normal(size=3), null=np.full(12, 0.025), of=np.resize([0, 1, 2], 12))
    scores = pool_matched(lambda: [same], two_sided=True).scores(same)
    assert (np.abs(scores.z) < 0.01).all()
    assert (scores.sd == FLOOR).all()
    bare = GeneEffects(gene=np.ones(2), null=np.ones(1), of=np.zeros(1, np.int64))
    scores = pool_matched(lambda: [bare, same], two_sided=True).scores(bare)
    assert np.isnan(scores.z).all()
    assert scores.p.tolist() == [1, 1]
