"""AUROC of every feature for every label, from sparse codes.

With midranks (`ranks`), AUROC = U / (n_label (n - n_label)), where U is the Mann-Whitney statistic. It is the
probability that a cell of the label has a larger code than another cell, and the rank-biserial is 2 AUROC - 1.
"""

import numpy as np

from feature_store.associations.inputs import Floats, Sparse, Strata
from feature_store.associations.moments import cross_product
from feature_store.associations.ranks import column_ranks
from feature_store.associations.sorted_columns import Codes


def auroc(codes: Codes, indicator: Sparse, strata: Strata | None = None) -> Floats:
    """AUROC [n_features n_labels] of codes CSR [n_cells n_features] for the labels of a CSR indicator; NaN where a
    side is empty.

    With strata: sum of U over strata / sum of n_label n_rest, the weighted mean of the strata's AUROCs.
    """
    strata = strata or Strata.single(codes.shape[0])
    scores, zero_rank = column_ranks(codes, strata)
    n_label = np.asarray((strata.indicator() @ indicator).toarray())
    pairs = (n_label * (strata.sizes()[:, None] - n_label)).sum(axis=0)
    rank_sum = cross_product(scores, indicator) + zero_rank.T @ n_label
    u = rank_sum - (n_label * (n_label + 1) / 2).sum(axis=0)
    area: Floats = np.divide(u, pairs, out=np.full_like(u, np.nan), where=pairs > 0)
    return area
