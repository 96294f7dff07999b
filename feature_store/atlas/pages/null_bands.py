"""The null band of a label: what permuting labels gives for the statistic that is shown, the rank-biserial.

Labels are permuted within donors (blocks) for the rank-biserial of all cells, and for batches inside each type. The
mean and standard deviation under permutation are exact (a rank sum is a sum over blocks of draws without replacement);
the ends of a band are mean +- 1.96 of them. z of the table does not give it: that is of van Elteren's statistic, which
weights blocks otherwise, so that rank_biserial / z is the null's standard deviation only where there is one block.
Labels that are constant within donors are tested by donor, and get no band: permuting a handful of donors has no such
form.

van Elteren, Bull. Inst. Int. Stat. 37 (1960) 351.
"""

from typing import NamedTuple

import numpy as np

from feature_store.associations.inputs import Floats, Labels, Sparse, Strata
from feature_store.associations.ranks import rank_scores

_NORMAL_95 = 1.959963984540054


class Band(NamedTuple):
    """The rank-biserial of each label and feature, and its mean and standard deviation under permuted labels, each
    [n_labels n_features]; NaN where a side is empty.
    """

    names: tuple[str, ...]
    effect: Floats
    mean: Floats
    sd: Floats

    def ends(self, feature: int) -> dict[str, tuple[float, float]]:
        """The middle 95 % of a normal null of one feature, by label; labels that cannot differ are left out."""
        mean, sd = self.mean[:, feature], self.sd[:, feature]
        low = np.maximum(-1.0, mean - _NORMAL_95 * sd).tolist()
        high = np.minimum(1.0, mean + _NORMAL_95 * sd).tolist()
        return {self.names[i]: (low[i], high[i]) for i in np.flatnonzero(sd > 0).tolist()}


def null_band(codes: Sparse, labels: Labels, blocks: Strata, *, within: bool) -> Band:
    """What permuting labels inside blocks of cells gives for the rank-biserial of each feature with each label.

    codes: CSR or CSC [n_cells n_features] without stored zeros; every cell has a label. within: cells are compared
    inside blocks alone (2 sum U / sum pairs - 1 over blocks), else all with all, and only the permutation stays inside
    blocks.
    """
    ranked = rank_scores(codes, blocks if within else Strata.single(codes.shape[0]))
    inside = blocks.indicator()
    n: Floats = (inside @ labels.one_hot()).toarray()
    size = blocks.sizes()[:, None]
    mean = (inside @ ranked.scores).toarray() / size
    square = (inside @ (ranked.scores * ranked.scores)).toarray() / size
    # of a block's cells some are drawn without replacement
    variance = (n * (size - n) / np.maximum(size - 1, 1)).T @ np.maximum(square - mean**2, 0)
    if within:
        ties = n.T @ ranked.zero_rank - (n * (n + 1) / 2).sum(axis=0)[:, None]
        pairs = (n * (size - n)).sum(axis=0)[:, None]
    else:
        n_label = n.sum(axis=0)[:, None]
        ties = n_label * (ranked.zero_rank - (n_label + 1) / 2)
        pairs = n_label * (size.sum() - n_label)
    observed = (labels.one_hot().T @ ranked.scores).toarray()
    u, expected = observed + ties, n.T @ mean + ties
    with np.errstate(divide="ignore", invalid="ignore"):
        return Band(labels.names, 2 * u / pairs - 1, 2 * expected / pairs - 1, 2 * np.sqrt(variance) / pairs)
