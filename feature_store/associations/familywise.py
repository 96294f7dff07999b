"""p_max, the family-wise p over all features of a label: how often the best feature looks as good by chance.

The method is single-step min-p (Westfall & Young 1993, Resampling-Based Multiple Testing). Labels are permuted within
the blocks of the label's test (`rank_tests`), the smallest p of any feature is kept for every replicate, and
    p_max = (1 + number of replicates whose smallest p <= p) / (1 + number of replicates).
It controls the chance of any false discovery among the features of one label and split, whatever their dependence:
features that fire together count as one. The statistic is the smallest p and not the largest |z|, because the z of
sparse features is skewed and would dominate. With 500 features, a fifth each firing in .8, .4, .05, .01 and .007 of 600
cells, and labels of 8 or 90 cells, a planted feature of density .05 had p_max <= .05 in 73 % of 150 data sets by the
smallest p and in 38 % by the largest |z|.

Permutations are seeded by label kind and split, so they are the same in every range of features: each range keeps its
own smallest p, and ranges are merged by taking the smaller one.
Limits. p_max is never below 1 / (1 + replicates). It corrects over the features of one label and not over labels; `q`
corrects over all tests. It has the null of its test: cells are exchangeable within a donor, or donors are exchangeable.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from zlib import crc32

import numpy as np
import polars as pl
from scipy import sparse
from scipy.special import ndtri

from feature_store.associations.inputs import Floats, Sparse
from feature_store.associations.moments import cross_product, cross_products
from feature_store.associations.rank_tests import RankTest, spread, tail_p
from feature_store.errors import InputError

KEYS = ("label_kind", "label", "split")
_CHUNK_VALUES = 2_000_000
# careful: permuted scores are summed in another order than the observed ones, so equal sums differ by rounding
_TOLERANCE = 1 + 1e-9


@dataclass(frozen=True, kw_only=True)
class Replicates:
    """The number of permutations of the labels, and their seed."""

    n: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n < 0:
            raise InputError(f"{self}: the number of permutations is at least 0 (0: no p_max)")

    def generator(self, *names: str) -> np.random.Generator:
        """The generator of one label kind, split and test."""
        return np.random.default_rng([self.seed, *(crc32(name.encode()) for name in names)])


def smallest_p(test: RankTest, n_replicates: int, rng: np.random.Generator) -> Floats:
    """The smallest p of any column for each permutation of the labels within strata [n_replicates n_labels]."""
    n_labels = test.indicator.shape[1]
    null = spread(test.moments)
    expected = cross_product(test.scores, test.indicator) - test.moments.statistic
    smallest = np.ones((n_replicates, n_labels))
    drawn = list(_permuted(test, max(1, _CHUNK_VALUES // max(test.scores.shape[0], 1)), n_replicates, rng))
    width = max(1, _CHUNK_VALUES // max(n_replicates * (n_labels + 1), 1))
    for start in range(0, test.scores.shape[1], width):
        columns, done = slice(start, start + width), 0
        scores = test.scores if width >= test.scores.shape[1] else test.scores[:, columns]
        for sums in cross_products(scores, drawn):
            best = smallest[done : done + sums.shape[1] // (n_labels + 1)]
            z = sums.reshape(-1, best.shape[0], n_labels + 1)[:, :, :n_labels]
            z = (z - expected[columns, None]) / null.sd[columns, None]
            _lower(best, np.where(null.alive[columns, None], z, 0.0), null.skew[columns])
            done += best.shape[0]
    smallest = np.maximum(smallest, test.fewest()[None, :] * (smallest < 1))
    for label in np.flatnonzero(test.exact):
        smallest[:, label] = _smallest_exact(test, int(label), n_replicates, rng)
    return smallest


def minima_table(smallest: Floats, kind: str, labels: Sequence[str], split: str) -> pl.DataFrame:
    """The result of `smallest_p` as rows label_kind, label, split, replicate, min_p."""
    n_replicates, n_labels = smallest.shape
    return pl.DataFrame(
        {
            "label_kind": pl.repeat(kind, smallest.size, eager=True),
            "label": pl.Series("label", labels, dtype=pl.String).gather(np.repeat(np.arange(n_labels), n_replicates)),
            "split": pl.repeat(split, smallest.size, eager=True),
            "replicate": pl.Series(np.tile(np.arange(n_replicates), n_labels), dtype=pl.Int32),
            "min_p": smallest.T.ravel(),
        }
    )


def merge_minima(parts: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """The minima over several ranges of features, of which there is at least one."""
    keys = [*KEYS, "replicate"]
    return pl.concat(parts).group_by(keys).agg(pl.col("min_p").min()).sort(keys)


def family_wise(table: pl.DataFrame, minima: pl.DataFrame) -> pl.DataFrame:
    """`table` (label_kind, label, split, p) with the column p_max, which is null for a label without replicates."""
    null = {key: np.sort(part["min_p"].to_numpy()) for key, part in minima.partition_by(*KEYS, as_dict=True).items()}
    out = np.full(table.height, np.nan)
    numbered = table.select(*KEYS, "p").with_row_index()
    for key, part in numbered.partition_by(*KEYS, as_dict=True).items():
        if key in null:
            p_max = (1 + np.searchsorted(null[key], part["p"].to_numpy() * _TOLERANCE, side="right")) / (
                1 + null[key].size
            )
            out[part["index"].to_numpy()] = p_max
    return table.with_columns(pl.Series("p_max", out).fill_nan(None))


def _permuted(test: RankTest, step: int, n: int, rng: np.random.Generator) -> Iterator[Sparse]:
    """Permuted labels, one-hot CSR [n_rows n_drawn (n_labels + 1)], at most `step` replicates at a time; the last
    column of a replicate marks the rows without a label.
    """
    n_rows, n_labels = test.indicator.shape
    code = np.full(n_rows, n_labels, dtype=np.int32)
    rows, columns = test.indicator.nonzero()
    code[rows] = columns
    by_stratum = np.argsort(test.strata.codes, kind="stable")
    bounds = np.r_[0, np.cumsum(test.strata.sizes())].astype(np.int64)
    # the matrices share the ones: a label that was drawn takes 4 bytes
    ones = np.ones(min(step, n) * n_rows)
    for start in range(0, n, step):
        n_drawn = min(step, n - start)
        index = np.empty((n_drawn, n_rows), dtype=np.int32)
        for i in range(n_drawn):
            moved = code[by_stratum]
            for a, b in pairwise(bounds):
                rng.shuffle(moved[a:b])
            index[i, by_stratum] = moved + i * (n_labels + 1)
        shape = (n_rows, n_drawn * (n_labels + 1))
        pointer = np.arange(n_rows + 1, dtype=np.int32) * n_drawn
        yield sparse.csr_array((ones[: index.size], index.T.ravel(), pointer), shape=shape)


def _lower(best: Floats, z: Floats, skew: Floats) -> None:
    """Lower `best` [n_drawn n_labels] to the smallest p of z [n_columns n_drawn n_labels], skew [n_columns n_labels].

    The gamma function is costly. It is therefore evaluated at the column that is likely the best (by Bernstein's
    bound), and then only where the normal tail, a lower bound of every p, is not above the p of that column.
    """
    if z.size == 0:
        return
    skew = np.broadcast_to(skew[:, None], z.shape)
    likely = (z * z / (1 + np.maximum(z * skew, 0) / 3)).argmax(axis=0)[None]
    first = tail_p(np.take_along_axis(z, likely, axis=0), np.take_along_axis(skew, likely, axis=0))[0]
    np.minimum(best, first, out=best)
    column, drawn, label = np.nonzero(np.abs(z) >= -ndtri(best / 2))
    np.minimum.at(best, (drawn, label), tail_p(z[column, drawn, label], skew[column, drawn, label]))


def _smallest_exact(test: RankTest, label: int, n_replicates: int, rng: np.random.Generator) -> Floats:
    """The smallest enumerated p of any column for each of n_replicates assignments drawn at random [n_replicates]."""
    from scipy.stats import rankdata

    distance, _ = test.deviations(label)
    drawn = rng.integers(distance.shape[0], size=n_replicates)
    smallest = np.ones(n_replicates)
    width = max(1, _CHUNK_VALUES // distance.shape[0])
    for start in range(0, distance.shape[1], width):
        p = rankdata(-distance[:, start : start + width], method="max", axis=0) / distance.shape[0]
        np.minimum(smallest, p[drawn].min(axis=1), out=smallest)
    return smallest
