"""Realised error rates where nothing is true: 30 replicates by default, 200 with -m slow.

All hypotheses of a replicate are null, so the false discovery rate and the family-wise error are the same: the share of
replicates with any q (or p_max) <= 0.05. It may exceed 0.05 by its binomial error only.
"""

from collections.abc import Callable
from dataclasses import dataclass

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
    benjamini_hochberg,
    blocked_rank_test,
)
from feature_store.associations.donor_agreement import donor_effects, sign_flip_p
from feature_store.associations.familywise import smallest_p
from feature_store.associations.gene_set_enrichment import over_representation, rank_enrichment
from feature_store.associations.rank_tests import RankTest

ALPHA, N_PERMUTED = 0.05, 99
REPLICATES = [pytest.param(30, id="30"), pytest.param(200, id="200", marks=pytest.mark.slow)]


def most_allowed(replicates):
    """99.9 % quantile of the number of replicates with a discovery, where each has one with probability ALPHA."""
    return binom.ppf(0.999, replicates, ALPHA)


def discovers(p):
    return bool(benjamini_hochberg(np.asarray(p)).min() <= ALPHA)


def one_hot(values):
    return sparse.csr_array(np.eye(int(values.max()) + 1)[values])


def best_p_max(test, rng):
    """The smallest p_max of any feature, of the first label."""
    smallest = smallest_p(test, N_PERMUTED, rng)[:, 0]
    return (1 + (smallest <= test.result()[1][:, 0].min() * (1 + 1e-9)).sum()) / (1 + N_PERMUTED)


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Planted codes, donor differences and all, with features that fire in two cells to one in ten, and a label of six
    cells among the types.
    """

    codes: sparse.csr_array
    expression: sparse.csr_array
    types: Labels
    donors: Strata
    batch: np.ndarray
    by_type: Strata
    correlate: Callable


@pytest.fixture(scope="module")
def cells(planted, correlate):
    rng = np.random.default_rng(3)
    n = planted.codes.shape[0]
    density = np.repeat([2 / n, 4 / n, 8 / n, 0.03, 0.1], 30)
    rare = np.where(rng.random((n, density.size)) < density, rng.gamma(1, 1, (n, density.size)), 0)
    names = np.array(planted.cell_type.names, dtype=object)[planted.cell_type.codes]
    names[np.random.default_rng(1).choice(names.size, 6, replace=False)] = "rare"
    return Cells(
        codes=as_csr(sparse.hstack([planted.codes, sparse.csr_array(rare)]), "codes"),
        expression=planted.expression,
        types=Labels.from_values("cell_type", names),
        donors=Strata.of(n, planted.donor),
        batch=planted.batch.codes,
        by_type=Strata.of(n, planted.cell_type),
        correlate=correlate,
    )


def within(strata, rng):
    """A permutation of cells inside strata."""
    order = np.arange(strata.codes.size)
    for s in range(strata.n_strata):
        rows = np.flatnonzero(strata.codes == s)
        order[rows] = rng.permutation(rows)
    return order


def donor_codes(rng, n_donors, n_cells, n_features, donor_sd):
    """Codes of cells of which those of one donor share a shift; a third of the cells does not fire."""
    donor = np.repeat(np.arange(n_donors), n_cells)
    level = rng.normal(0, donor_sd, (n_donors, n_features))[donor] + rng.normal(size=(donor.size, n_features))
    return as_csr(np.maximum(level + 0.4, 0), "codes"), Strata(codes=donor, n_strata=n_donors)


def types_within_donors(cells, rng):
    return discovers(blocked_rank_test(cells.codes, cells.types.one_hot()[within(cells.donors, rng)], cells.donors)[1])


def types_within_donors_p_max(cells, rng):
    # the rarest label, where sparse features are the most skewed
    label = one_hot(cells.types.codes)[:, [3]][within(cells.donors, rng)]
    return best_p_max(RankTest.blocked(cells.codes, label, cells.donors), rng) <= ALPHA


def types_across_donors(cells, rng):
    label = cells.types.one_hot()[within(cells.donors, rng)][:, :3]
    return discovers([sign_flip_p(effects) for effects in donor_effects(cells.codes, label, cells.donors).T])


def batches_within_types(cells, rng):
    label = one_hot(cells.batch[within(cells.by_type, rng)])
    return discovers(blocked_rank_test(cells.codes, label, cells.by_type)[1])


def batches_within_types_p_max(cells, rng):
    label = one_hot(cells.batch[within(cells.by_type, rng)])[:, :1]
    return best_p_max(RankTest.blocked(cells.codes, label, cells.by_type), rng) <= ALPHA


def batches_of_donors(cells, rng, by_donor=True):
    """Donors differ, and types; seven donors a batch, with different shares of the types."""
    codes, donors = donor_codes(rng, 14, 20, 25, donor_sd=0.7)
    batch = rng.permutation(np.arange(14) % 2)[donors.codes]
    types = (rng.random(batch.size) < np.where(batch == 1, 0.7, 0.3)).astype(int)
    codes = as_csr(np.maximum(codes.toarray() + types[:, None], 0), "codes")
    by_type, label = Strata(codes=types, n_strata=2), one_hot(batch)
    if not by_donor:
        return discovers(blocked_rank_test(codes, label, by_type)[1])
    return discovers(RankTest.by_unit(codes, label, donors, within=by_type).result()[1])


def expression_within_donors(cells, rng):
    donors = Labels(
        kind="donor",
        codes=cells.donors.codes,
        names=tuple("abcdefgh"),
        known=np.ones(cells.donors.codes.size, dtype=bool),
    )
    return discovers(cells.correlate(cells.codes, cells.expression[within(cells.donors, rng)], donors).p)


def disease_by_donor(cells, rng):
    codes, donors = donor_codes(rng, 14, 16, 25, donor_sd=1.0)
    ill = rng.permutation(np.arange(14) < 7).astype(int)
    return discovers(RankTest.by_unit(codes, one_hot(ill[donors.codes]), donors).result()[1])


def disease_by_donor_p_max(cells, rng):
    codes, donors = donor_codes(rng, 14, 16, 25, donor_sd=1.0)
    ill = rng.permutation(np.arange(14) < 7).astype(int)
    return best_p_max(RankTest.by_unit(codes, one_hot(ill[donors.codes]), donors), rng) <= ALPHA


def effects_that_differ_by_donor(cells, rng, by_donor=True):
    """A type's effect is drawn anew for every donor, about zero: no claim about donors in general is true."""
    codes, donors = donor_codes(rng, 12, 40, 40, donor_sd=0.5)
    label = rng.integers(0, 2, donors.codes.size)
    effect = rng.normal(0, 0.6, (12, 40))[donors.codes]
    codes = as_csr(np.maximum(codes.toarray() + effect * label[:, None], 0), "codes")
    if not by_donor:
        return discovers(blocked_rank_test(codes, one_hot(label), donors)[1])
    return discovers(sign_flip_p(donor_effects(codes, one_hot(label), donors)[:, :, 1]))


def gene_lists(rng, *, detection):
    """Random gene lists as sets and as 40 features' genes, and random scores; all prefer genes that are detected often,
    to the power given: chosen, score, membership, n_cells.
    """
    n_genes, n_features, n_sets = 1000, 40, 15
    n_cells = np.ceil(np.exp(rng.normal(4, 1.5, n_genes)))
    # the largest of these keys are a draw without replacement with odds n_cells^detection
    keys = detection * np.log(n_cells) + rng.gumbel(size=(n_features + n_sets, n_genes))
    sizes = np.r_[np.full(n_features, 30), rng.integers(10, 80, n_sets)]
    lists = (-keys).argsort(axis=1).argsort(axis=1) < sizes[:, None]
    score = rng.normal(size=(n_features, 5)) @ rng.normal(size=(5, n_genes)) + 2 * detection * np.log(n_cells)
    return lists[:n_features], score, sparse.csr_array(lists[n_features:].T.astype(float)), n_cells


def random_lists(cells, rng, detection=0.0):
    chosen, _, members, n_cells = gene_lists(rng, detection=detection)
    return discovers(over_representation(chosen, members, n_cells > 0).p)


def random_lists_ranked(cells, rng, detection=0.0):
    _, score, members, n_cells = gene_lists(rng, detection=detection)
    return discovers(rank_enrichment(score, members, n_cells > 0).p)


def random_lists_matched(cells, rng, detection=0.0):
    chosen, _, members, n_cells = gene_lists(rng, detection=detection)
    return discovers(over_representation(chosen, members, n_cells > 0, n_cells).p_matched)


def lists_of_common_genes_matched(cells, rng):
    return random_lists_matched(cells, rng, detection=1.0)


NULLS = {
    function.__name__: function
    for function in (
        types_within_donors,
        types_within_donors_p_max,
        types_across_donors,
        effects_that_differ_by_donor,
        batches_within_types,
        batches_within_types_p_max,
        batches_of_donors,
        expression_within_donors,
        disease_by_donor,
        disease_by_donor_p_max,
        random_lists,
        random_lists_ranked,
        random_lists_matched,
        lists_of_common_genes_matched,
    )
}


def realised(null, cells, replicates):
    """Replicates with a discovery."""
    rng = np.random.default_rng([replicates, *null.__name__.encode()])
    return sum(null(cells, rng) for _ in range(replicates))


@pytest.mark.parametrize("replicates", REPLICATES)
@pytest.mark.parametrize("null", NULLS.values(), ids=NULLS)
def test_where_nothing_is_true_discoveries_are_no_more_frequent_than_nominal(null, cells, replicates):
    assert realised(null, cells, replicates) <= most_allowed(replicates)


def test_small_p_are_no_more_frequent_than_nominal(cells):
    rng = np.random.default_rng(0)
    label = cells.types.one_hot()
    small = [
        (blocked_rank_test(cells.codes, label[within(cells.donors, rng)], cells.donors)[1] <= 0.01).mean()
        for _ in range(20)
    ]
    assert np.mean(small) <= 0.012


@pytest.mark.parametrize("replicates", REPLICATES)
def test_cells_taken_as_the_sample_would_find_a_disease_that_is_not_there(replicates):
    rng = np.random.default_rng(replicates)
    naive = 0
    for _ in range(replicates):
        codes, donors = donor_codes(rng, 14, 16, 25, donor_sd=1.0)
        ill = rng.permutation(np.arange(14) < 7).astype(int)
        naive += discovers(blocked_rank_test(codes, one_hot(ill[donors.codes]), Strata.single(224))[1])
    assert naive >= 0.95 * replicates


@pytest.mark.parametrize("replicates", REPLICATES)
def test_cells_taken_as_the_sample_would_find_a_batch_effect_where_donors_differ(replicates):
    rng = np.random.default_rng(replicates)
    assert sum(batches_of_donors(None, rng, by_donor=False) for _ in range(replicates)) >= 0.95 * replicates


@pytest.mark.parametrize("replicates", REPLICATES)
def test_the_donors_at_hand_are_not_all_donors(replicates):
    # what p_donor is for: the blocked test is right that these donors' types differ, and says nothing of others
    rng = np.random.default_rng(replicates)
    found = sum(effects_that_differ_by_donor(None, rng, by_donor=False) for _ in range(replicates))
    assert found >= 0.95 * replicates


@pytest.mark.parametrize("replicates", REPLICATES)
def test_lists_of_common_genes_overlap_by_chance_unless_matched(replicates):
    rng = np.random.default_rng(replicates)
    for test in (random_lists, random_lists_ranked):
        assert sum(test(None, rng, detection=1.0) for _ in range(replicates)) >= 0.95 * replicates


def modules(rng, correlate, gated):
    """Do noise features hit modules of co-expressed genes? `gated`: a feature's genes have to be associated, too."""
    n, n_genes = 200, 240
    expression = rng.normal(size=(n, 12))[:, np.arange(n_genes) // 20] + 0.5 * rng.normal(size=(n, n_genes))
    codes = np.maximum(rng.normal(size=(n, 20)), 0)
    found = correlate(as_csr(codes, "codes"), as_csr(np.maximum(expression, 0), "expression"))
    chosen = found.pearson >= np.sort(found.pearson, axis=1)[:, [-30]]
    if gated:
        chosen &= benjamini_hochberg(found.p) <= ALPHA
    members = sparse.csr_array(np.eye(12)[np.arange(n_genes) // 20])
    return discovers(over_representation(chosen, members, np.ones(n_genes, dtype=bool)).p)


def test_co_expressed_genes_break_the_null_of_gene_lists_and_association_first_keeps_it(correlate):
    rng = np.random.default_rng(5)
    assert sum(modules(rng, correlate, gated=False) for _ in range(5)) == 5
    assert sum(modules(rng, correlate, gated=True) for _ in range(20)) <= most_allowed(20)


@pytest.mark.parametrize("replicates", REPLICATES)
def test_of_the_discoveries_beside_real_features_at_most_the_nominal_share_is_false(planted, cells, replicates):
    rng = np.random.default_rng(replicates + 1)
    indicator = planted.cell_type.one_hot()
    real = np.flatnonzero(np.isin(planted.meaning, ["type", "not-type"]))
    share, kept = [], []
    for _ in range(replicates):
        null = sparse.hstack([planted.codes[within(cells.donors, rng)] for _ in range(4)])
        codes = as_csr(sparse.hstack([planted.codes[:, real], null]), "codes")
        q = benjamini_hochberg(blocked_rank_test(codes, indicator, cells.donors)[1])
        false = (q[real.size :] <= ALPHA).sum()
        share.append(false / max((q <= ALPHA).sum(), 1))
        kept.append((q[: real.size].min(axis=1) <= ALPHA).mean())
    assert np.mean(share) <= ALPHA + 3 * np.std(share) / np.sqrt(replicates)
    assert np.mean(kept) == 1


def test_cells_taken_as_independent_would_call_donor_differences_types(planted, cells):
    # what the blocks are for: a batch feature is no type feature, though types differ between donors
    batch = [f for f, m in enumerate(planted.meaning) if m == "batch" and planted.target[f] == 0]
    codes, indicator = planted.codes[:, batch], planted.cell_type.one_hot()
    naive = blocked_rank_test(codes, indicator, Strata.single(codes.shape[0]))[1]
    blocked = blocked_rank_test(codes, indicator, cells.donors)[1]
    assert naive.min() < 1e-6
    assert blocked.min() > 1e-3


def test_effects_and_p_are_finite_and_in_range(planted, cells):
    everything = {"select": np.ones(planted.batch.n_cells, bool)}
    table = associate_batch(cells.codes, planted.batch, everything, None).table
    assert table["p"].is_between(0, 1).all()
    assert not any(table.select(pl.col(pl.Float64).is_nan().any()).row(0))
