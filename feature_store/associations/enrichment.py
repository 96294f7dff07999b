"""Gene sets x features: which sets a feature's genes belong to.

Two tests, both against the DETECTED genes only (a gene that no cell expresses cannot be found and is no background):
- over-representation: hypergeometric upper tail of the overlap between a feature's genes and a set; odds ratio with
  1/2 added to every cell of the 2 x 2 table, above 1 for enrichment and below for depletion;
- ranks: does the association score of the set's genes lie above that of the others (Mann-Whitney, same permutation
  moments as `pvalues`)?

Both ask whether THESE genes are special among genes (competitive null: random gene lists). Genes of a set are
correlated, so real programs look significant more easily than that null says (Wu & Smyth 2012,
doi:10.1093/nar/gks461). Cost: 1024 features x 20 sets x 765 genes 0.7 s on one core.
"""

from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.stats import hypergeom

from feature_store.associations.inputs import Bools, Floats, Sparse, Strata
from feature_store.associations.labels import auroc
from feature_store.associations.pvalues import blocked_rank_test

METHOD = "hypergeometric/1 background=detected"
_CHUNK_VALUES = 4_000_000


class OverRepresentation(NamedTuple):
    """overlap, odds_ratio (Haldane-corrected) and one-sided p, each [n_features n_sets]."""

    overlap: Floats
    odds_ratio: Floats
    p: Floats


class RankEnrichment(NamedTuple):
    """rank_biserial (NaN where a set has no or all genes) and two-sided p, each [n_features n_sets]."""

    rank_biserial: Floats
    p: Floats


def over_representation(chosen: Bools, membership: Sparse, detected: Bools) -> OverRepresentation:
    """Hypergeometric test of every feature's genes against every set.

    chosen: bool [n_features n_genes], the feature's genes; membership: CSR [n_genes n_sets]; detected: bool
    [n_genes], the background. A pair without overlap has p 1 and stays among the tests.
    """
    background = np.flatnonzero(detected)
    members, mine = membership[background], sparse.csr_array(chosen[:, background].astype(np.float64))
    overlap = (mine @ members).toarray()
    n, n_set = background.size, np.asarray(members.sum(axis=0)).ravel()
    n_mine: Floats = np.asarray(mine.sum(axis=1), dtype=np.float64).ravel()
    p = np.ones_like(overlap)
    feature, column = np.nonzero(overlap)
    if feature.size:
        margins = np.stack([overlap[feature, column], n_set[column], n_mine[feature]]).astype(np.int64)
        distinct, where = np.unique(margins, axis=1, return_inverse=True)
        p[feature, column] = hypergeom.sf(distinct[0] - 1, n, distinct[1], distinct[2])[where.ravel()]
    only_mine, only_set = n_mine[:, None] - overlap, n_set[None, :] - overlap
    neither = n - overlap - only_mine - only_set
    odds = (overlap + 0.5) * (neither + 0.5) / ((only_mine + 0.5) * (only_set + 0.5))
    return OverRepresentation(overlap, odds, p)


def rank_enrichment(score: Floats, membership: Sparse, detected: Bools) -> RankEnrichment:
    """Mann-Whitney of the score [n_features n_genes] of a set's genes against the other detected genes."""
    background = np.flatnonzero(detected)
    members, one = membership[background], Strata.single(background.size)
    effect = np.zeros((score.shape[0], membership.shape[1]))
    p = np.ones_like(effect)
    step = max(1, _CHUNK_VALUES // max(background.size, 1))
    for start in range(0, score.shape[0], step):
        rows = slice(start, start + step)
        block = sparse.csr_array(score[rows][:, background].T)
        effect[rows] = 2 * auroc(block, members) - 1
        p[rows] = blocked_rank_test(block, members, one)[1]
    return RankEnrichment(effect, p)
