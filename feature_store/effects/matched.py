"""z and p of the genes of features from null genes, each of which was drawn for one gene and measured as it was.

`nulls` pools the draws of a gene over features. Here a gene is measured for few features, often for one, so that its
own draws would be most of such a pool. The null of a feature is therefore made of its null genes alone, and moved
toward that of all features. With u the effects of the null genes of feature f, D of them, n of which were drawn for
gene g, and e the effect of g:

    m_f    = mean of u                               s_f^2  = (PRIOR s^2 + sum (u - m_f)^2) / (PRIOR + D)
    m_fg   = (PRIOR m_f + sum_g u) / (PRIOR + n)     v_fg   = (PRIOR s_f^2 + sum_g (u - m_fg)^2) / (PRIOR + n)
    z_fg   = (e - m_fg) / sqrt(v_fg)                 s^2: median of the variance of u over features where it is not 0

sum_g goes over the n null genes of g. A mean in place of the median would be that of the few widest features. p is the
rank of z among the z of all null genes of all features; of |z| where an effect of either sign counts. Each null gene
gets its z as the gene does for which it was drawn, from the other null genes; the gene leaves out the last of its own.
So if a gene is one of those that are like it, its z has the distribution of theirs, whatever that is, and p is uniform
(a conformal p-value; Bates et al. 2023, Ann. Stat. 51:149). Zeros need no other rule: where nearly all null effects are
0, so are nearly all null z.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from feature_store.effects.nulls import Scores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from jaxtyping import Float64, Int64

PRIOR = 4.0
"""Null genes that the null of all features, and that of all genes of a feature, count as."""
FLOOR = 1e-5
"""Least standard deviation of a null: effects are shares of sums in float32, and below this is their rounding."""


@dataclass(frozen=True, kw_only=True)
class GeneEffects:
    """What the genes of one feature do to it by one path, as shares.

    Attributes:
        gene: effects of the genes that are tested [n_genes].
        null: effects of the null genes [n_nulls].
        of: the place of the gene for which each null gene was drawn; n_genes where that gene is not tested [n_nulls].
    """

    gene: Float64[np.ndarray, " gene"]
    null: Float64[np.ndarray, " null"]
    of: Int64[np.ndarray, " null"]


@dataclass(frozen=True, kw_only=True)
class MatchedNull:
    """The null of all features.

    Attributes:
        variance: s^2.
        z: of the null genes, ascending; |z| where `two_sided` [n_nulls].
        two_sided: whether effects of either sign count; else only those above the null.
    """

    variance: float
    z: Float64[np.ndarray, " null"]
    two_sided: bool

    def scores(self, own: GeneEffects) -> Scores:
        """The scores of the genes of a feature [n_genes]; p is 1 where there is no null."""
        last = np.full(len(own.gene) + 1, len(own.null) - 1)
        last[own.of] = np.arange(len(own.null))
        mean, sd, z = _z(own.gene, np.arange(len(own.gene)), last[:-1], own, self.variance)
        above = len(self.z) - np.searchsorted(self.z, self.statistic(z), side="left")
        p = np.where(np.isfinite(z), (1 + above) / (1 + len(self.z)), 1.0)
        return Scores(mean=mean, sd=sd, z=z, p=p)

    def statistic(self, z: Float64[np.ndarray, " any"]) -> Float64[np.ndarray, " any"]:
        """What is ranked."""
        return np.abs(z) if self.two_sided else z


def pool_matched(features: Callable[[], Iterable[GeneEffects]], *, two_sided: bool) -> MatchedNull:
    """The null of all features, which are gone through twice; memory is 8 bytes a null gene."""
    variances = np.array([own.null.var() for own in features() if len(own.null)])
    positive = variances[variances > 0]
    variance = float(np.median(positive)) if len(positive) else 0.0
    null = MatchedNull(variance=variance, z=np.empty(0), two_sided=two_sided)
    found = [np.empty(0)]
    for own in features():
        every = np.arange(len(own.null))
        z = _z(own.null, own.of, every, own, null.variance)[2]
        found.append(null.statistic(z[np.isfinite(z)]))
    return MatchedNull(variance=null.variance, z=np.sort(np.concatenate(found)), two_sided=two_sided)


def _z(
    effect: Float64[np.ndarray, " row"],
    of: Int64[np.ndarray, " row"],
    left_out: Int64[np.ndarray, " row"],
    own: GeneEffects,
    variance: float,
) -> tuple[Float64[np.ndarray, " row"], Float64[np.ndarray, " row"], Float64[np.ndarray, " row"]]:
    """Mean and standard deviation of the null of each row, and its z.

    Args:
        effect: of the rows.
        of: the gene of whose null genes a row is one, or would be.
        left_out: the null gene that its null does without.
        own: the effects of the feature.
        variance: s^2.
    """
    if len(own.null) < 2:
        nothing = np.full(len(effect), np.nan)
        return nothing, nothing, nothing
    # sums of squares about a common centre lose no digits
    centre = own.null.mean()
    u, n_groups = own.null - centre, len(own.gene) + 1
    without = u[left_out]
    n = len(u) - 1
    mean = (u.sum() - without) / n
    squares = (u**2).sum() - without**2 - n * mean**2
    wide = (PRIOR * variance + squares) / (PRIOR + n)
    is_own = own.of[left_out] == of
    count, first, second = (np.bincount(own.of, weight, n_groups)[of] for weight in (np.ones_like(u), u, u**2))
    count, first, second = count - is_own, first - is_own * without, second - is_own * without**2
    close = (PRIOR * mean + first) / (PRIOR + count)
    spread = (PRIOR * wide + second - 2 * close * first + count * close**2) / (PRIOR + count)
    sd = np.sqrt(np.maximum(spread, FLOOR**2))
    return close + centre, sd, (effect - centre - close) / sd
