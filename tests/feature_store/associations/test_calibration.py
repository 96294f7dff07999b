"""Realised error rates under permuted labels and random gene lists; few replicates by default, 200 with -m slow.

All hypotheses are null in the permuted data, so the false discovery rate is the share of replicates with any q <= 0.05.
"""

import numpy as np
import polars as pl
import pytest
from scipy import sparse
from scipy.stats import binom

from feature_store.associations import (
    Labels,
    Strata,
    as_csr,
    associate_batch,
    associate_expression,
    benjamini_hochberg,
    blocked_rank_test,
)
from feature_store.associations.enrichment import over_representation, rank_enrichment
from feature_store.associations.familywise import Replicates

ALPHA = 0.05
REPLICATES = [pytest.param(20, id="20"), pytest.param(200, id="200", marks=pytest.mark.slow)]


def most_allowed(replicates):
    """99.9 % quantile of the number of replicates with a discovery, where each has one with probability ALPHA."""
    return binom.ppf(0.999, replicates, ALPHA)


@pytest.fixture(scope="module")
def with_rare(planted):
    """The planted codes, donor effects and all, with features that fire in two cells to one in ten."""
    rng = np.random.default_rng(3)
    n = planted.codes.shape[0]
    density = np.repeat([2 / n, 4 / n, 8 / n, 0.03, 0.1], 30)
    rare = np.where(rng.random((n, density.size)) < density, rng.gamma(1, 1, (n, density.size)), 0)
    return as_csr(sparse.hstack([planted.codes, sparse.csr_array(rare)]), "codes")


@pytest.fixture(scope="module")
def with_rare_type(planted):
    """Cell types with one of six cells added."""
    names = np.array(planted.cell_type.names, dtype=object)[planted.cell_type.codes]
    names[np.random.default_rng(1).choice(names.size, 6, replace=False)] = "rare"
    return Labels.from_values("cell_type", names)


@pytest.mark.parametrize("replicates", REPLICATES)
def test_types_permuted_within_donors_give_no_more_discoveries_than_nominal(
    planted, with_rare, with_rare_type, permute_within, replicates
):
    rng = np.random.default_rng(replicates)
    strata, indicator = Strata.of(planted.donor.n_cells, planted.donor), with_rare_type.one_hot()
    found, small = 0, []
    for _ in range(replicates):
        _, p = blocked_rank_test(with_rare, indicator[permute_within(planted.donor.codes, rng)], strata)
        found += benjamini_hochberg(p).min() <= ALPHA
        small.append((p <= 0.01).mean())
    assert found <= most_allowed(replicates)
    assert np.mean(small) <= 0.012


@pytest.mark.parametrize("replicates", REPLICATES)
def test_of_the_discoveries_beside_real_features_at_most_the_nominal_share_is_false(
    planted, permute_within, replicates
):
    rng = np.random.default_rng(replicates + 1)
    strata, indicator = Strata.of(planted.donor.n_cells, planted.donor), planted.cell_type.one_hot()
    real = np.flatnonzero(np.isin(planted.meaning, ["type", "not-type"]))
    share, kept = [], []
    for _ in range(replicates):
        null = sparse.hstack([planted.codes[permute_within(planted.donor.codes, rng)] for _ in range(4)])
        codes = as_csr(sparse.hstack([planted.codes[:, real], null]), "codes")
        q = benjamini_hochberg(blocked_rank_test(codes, indicator, strata)[1])
        false = (q[real.size :] <= ALPHA).sum()
        share.append(false / max((q <= ALPHA).sum(), 1))
        kept.append((q[: real.size].min(axis=1) <= ALPHA).mean())
    assert np.mean(share) <= ALPHA + 3 * np.std(share) / np.sqrt(replicates)
    assert np.mean(kept) == 1


@pytest.mark.parametrize("replicates", REPLICATES)
def test_batches_permuted_within_types_give_no_more_discoveries_than_nominal(
    planted, with_rare, permute_within, replicates
):
    rng = np.random.default_rng(replicates + 2)
    everything = {"select": np.ones(planted.batch.n_cells, dtype=bool)}
    found = 0
    for _ in range(replicates):
        order = permute_within(planted.cell_type.codes, rng)
        batch = Labels.from_values("batch", np.array(planted.batch.names)[planted.batch.codes[order]])
        table = associate_batch(with_rare, batch, everything, planted.cell_type, replicates=Replicates(n=0)).table
        found += benjamini_hochberg(table["p"].to_numpy()).min() <= ALPHA
    assert found <= most_allowed(replicates)


@pytest.mark.parametrize("replicates", REPLICATES)
def test_expression_permuted_within_donors_gives_no_more_discoveries_than_nominal(
    planted, with_rare, permute_within, replicates
):
    rng = np.random.default_rng(replicates + 3)
    found, small = 0, []
    for _ in range(replicates):
        shuffled = planted.expression[permute_within(planted.donor.codes, rng)]
        p = associate_expression(with_rare, shuffled, planted.donor).p
        found += benjamini_hochberg(p).min() <= ALPHA
        small.append((p <= 0.01).mean())
    assert found <= most_allowed(replicates)
    assert np.mean(small) <= 0.012


@pytest.mark.parametrize("replicates", REPLICATES)
def test_random_gene_lists_are_enriched_no_more_often_than_nominal(replicates):
    rng = np.random.default_rng(replicates + 4)
    n_features, n_genes = 60, 400
    score = rng.normal(size=(n_features, 5)) @ rng.normal(size=(5, n_genes))
    chosen = score >= np.sort(score, axis=1)[:, [-30]]
    detected = rng.random(n_genes) < 0.9
    found_over = found_ranks = 0
    for _ in range(replicates):
        lists = np.stack([np.isin(np.arange(n_genes), rng.choice(n_genes, rng.integers(3, 60))) for _ in range(20)], 1)
        membership = sparse.csr_array(lists.astype(float))
        found_over += benjamini_hochberg(over_representation(chosen, membership, detected).p).min() <= ALPHA
        found_ranks += benjamini_hochberg(rank_enrichment(score, membership, detected).p).min() <= ALPHA
    assert found_over <= most_allowed(replicates)
    assert found_ranks <= most_allowed(replicates)


def test_cells_taken_as_independent_would_call_donor_differences_types(planted):
    # what the blocks are for: a batch feature is no type feature, though types differ between donors
    batch = [f for f, m in enumerate(planted.meaning) if m == "batch" and planted.target[f] == 0]
    codes, indicator = planted.codes[:, batch], planted.cell_type.one_hot()
    n_cells = planted.donor.n_cells
    naive = blocked_rank_test(codes, indicator, Strata.single(n_cells))[1]
    blocked = blocked_rank_test(codes, indicator, Strata.of(n_cells, planted.donor))[1]
    assert naive.min() < 1e-6
    assert blocked.min() > 1e-3


def test_effects_and_p_are_finite_and_in_range(planted, with_rare):
    table = associate_batch(with_rare, planted.batch, {"select": np.ones(planted.batch.n_cells, bool)}, None).table
    assert table["p"].is_between(0, 1).all()
    assert table.select(pl.col(pl.Float64).is_nan().any()).row(0) == (False,) * 8
