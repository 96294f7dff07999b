"""How far the effect of a feature is from what other directions do: z and p from nulls that are pooled over features.

A few null directions of one feature tell how large its steps are, and those of all features tell how strongly each gene
answers to any step. The null of feature f and gene g has the mean a_f m_g and the variance v_fg, with d_fj the effect
of draw j of J and e that of the feature:

    a_f  = root mean square over genes and draws of d_fjg / r_g        r_g: root mean square of the gene over features
    m_g, s_g = mean and standard deviation over features and draws of d_fjg / a_f
    v_fg = (PRIOR (a_f s_g)^2 + sum over draws of (d_fjg - a_f m_g)^2) / (PRIOR + J)
    z_fg = (e_fg - a_f m_g) / sqrt(v_fg)

v moves the variance of a feature's own draws toward that of all features, as PRIOR further draws would (a moderated
variance; Smyth 2004, Stat. Appl. Genet. Mol. Biol. 3:3). Genes of one cell answer together, so that z has heavier tails
than a normal variable. p is therefore the rank of |z| among the z of the null draws of all features and genes. Each
draw gets its z as the feature does, from the other draws alone; the feature's own leaves out its last draw. If the
feature's direction is one of the null, all its z have the same distribution, whatever the dependence between genes, and
p is uniform over features and genes (tests/feature_store/effects/test_nulls.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float64, Int64

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Draws = Float64[np.ndarray, "feature draw gene"]
Effects = Float64[np.ndarray, "feature gene"]
MIN_DRAWS = 2
"""Null draws of a feature: with one, no draw would be left to scale it by."""
PRIOR = 4.0
"""Draws that the variance of all features counts as. On a constructed model (tests/helpers/constructed_model.py, 4
draws, a weak boost) .65 of the known causes were found with that variance alone, .74 with 8, .82 with 4, 2 and 1. The p
of other values is as uniform."""
_LOG_BINS = np.linspace(np.log(1e-4), np.log(1e6), 40_001)
_TINY = 1e-300


@dataclass(frozen=True, kw_only=True)
class EffectBlock:
    """The effects of a few features and of their null draws; NaN where a gene was not hidden often enough.

    Attributes:
        effect: [n_features n_genes].
        draws: [n_features n_draws n_genes].
    """

    effect: Effects
    draws: Draws


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a `PooledNull` says of a block: the null's mean and standard deviation, z and p [n_features n_genes]."""

    mean: Effects
    sd: Effects
    z: Effects
    p: Effects


@dataclass(frozen=True, kw_only=True)
class PooledNull:
    """The null of all features and genes.

    Attributes:
        r: scale of each gene, by which the scale of a feature is measured [n_genes].
        m, s: mean and standard deviation of each gene in units of the feature's scale [n_genes].
        above: the number of null |z| in each bin or a higher one [n_bins + 1].
        prior: draws that the variance of all features counts as.
    """

    r: Float64[np.ndarray, " gene"]
    m: Float64[np.ndarray, " gene"]
    s: Float64[np.ndarray, " gene"]
    above: Int64[np.ndarray, " bin_plus_1"]
    prior: float

    @property
    def n(self) -> int:
        """The number of null z."""
        return int(self.above[0])

    def scores(self, block: EffectBlock) -> Scores:
        """The scores of the effects of a block; NaN where the effect is, or where no null says anything of the gene."""
        scale = _scales(block.draws, self.r)[:, -1]
        z, mean, sd = _z(block.effect, scale, block.draws[:, :-1], self.m, self.s, self.prior)
        return Scores(mean=mean, sd=sd, z=z, p=self._p(np.abs(z)))

    def _p(self, z: Effects) -> Effects:
        # the lower edge of the bin: p is never too small
        at = np.searchsorted(_LOG_BINS, np.log(np.clip(z, _TINY, 1 / _TINY)), side="right")
        p: Effects = np.where(np.isnan(z), np.nan, (1 + self.above[at]) / (1 + self.n))
        return p


def pool_nulls(blocks: Callable[[], Iterable[EffectBlock]], n_genes: int, *, prior: float = PRIOR) -> PooledNull:
    """The null of all features, from blocks that can be gone through several times; memory is that of a block.

    Each pass takes the blocks in the same order: first the scales of genes, then their moments, then the null z.
    """
    total, n = np.zeros(n_genes), np.zeros(n_genes, np.int64)
    for block in blocks():
        # features count alike here, however large their steps are
        flat = block.draws / _rms(block.draws, (1, 2))
        total += np.nansum(flat**2, (0, 1))
        n += np.isfinite(flat).sum((0, 1))
    r = np.sqrt(total / np.maximum(n, 1))
    first, second, n = np.zeros(n_genes), np.zeros(n_genes), np.zeros(n_genes, np.int64)
    for block in blocks():
        t = block.draws / _scales(block.draws, r)[:, :, None]
        first += np.nansum(t, (0, 1))
        second += np.nansum(t**2, (0, 1))
        n += np.isfinite(t).sum((0, 1))
    m = first / np.maximum(n, 1)
    s = np.sqrt(np.maximum(second / np.maximum(n, 1) - m**2, 0))
    s[n <= MIN_DRAWS] = np.nan
    counts = np.zeros(len(_LOG_BINS) + 1, np.int64)
    for block in blocks():
        a = _scales(block.draws, r)
        for j in range(block.draws.shape[1]):
            own = block.draws[:, j]
            # one draw of many hardly moves the moments of its gene; its own feature's are without it
            z = np.abs(_z(own, a[:, j], np.delete(block.draws, j, axis=1), m, s, prior)[0])
            counts += _count(z[~np.isnan(z)])
    # bin i holds the |z| from edge i - 1 to edge i
    above = counts[::-1].cumsum()[::-1].copy()
    return PooledNull(r=r, m=m, s=s, above=above, prior=prior)


def _z(
    effect: Effects,
    a: Float64[np.ndarray, " feature"],
    draws: Draws,
    m: Float64[np.ndarray, " gene"],
    s: Float64[np.ndarray, " gene"],
    prior: float,
) -> tuple[Effects, Effects, Effects]:
    """The z of effects among `draws`, and the mean and standard deviation of their null."""
    mean = a[:, None] * m
    own = (draws - mean[:, None]) ** 2
    sd = np.sqrt((prior * (a[:, None] * s) ** 2 + own.sum(1)) / (prior + draws.shape[1]))
    distance = effect - mean
    with np.errstate(divide="ignore", invalid="ignore"):
        # a gene that nothing moves was not moved
        z: Effects = np.where((distance == 0) & (sd == 0), 0.0, distance / sd)
    return z, mean, sd


def _scales(draws: Draws, r: Float64[np.ndarray, " gene"]) -> Float64[np.ndarray, "feature draw"]:
    """The scale of a feature for each of its draws, from its other draws: root mean square over them and the genes."""
    squares = (draws / np.where(r > 0, r, np.nan)) ** 2
    total, n = np.nansum(squares, 2), np.isfinite(squares).sum(2)
    others, n_others = total.sum(1, keepdims=True) - total, n.sum(1, keepdims=True) - n
    scale: Float64[np.ndarray, "feature draw"] = np.sqrt(others / np.where(n_others > 0, n_others, np.nan))
    return np.where(scale > 0, scale, np.nan)


def _rms(draws: Draws, axes: tuple[int, ...]) -> Draws:
    n = np.isfinite(draws).sum(axes, keepdims=True)
    scale = np.sqrt(np.nansum(draws**2, axes, keepdims=True) / np.maximum(n, 1))
    return np.where(scale > 0, scale, np.nan)


def _count(z: Float64[np.ndarray, " z"]) -> Int64[np.ndarray, " bin_plus_1"]:
    at = np.searchsorted(_LOG_BINS, np.log(np.clip(z, _TINY, 1 / _TINY)), side="right")
    return np.bincount(at, minlength=len(_LOG_BINS) + 1)
