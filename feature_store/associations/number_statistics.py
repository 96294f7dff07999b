"""The statistics of numbers of cells (the share of mitochondrial counts, the number of genes): does the cell code of a
feature rise with the number?

`spearman` is the rank correlation within donors: the ranks of code and number inside each donor, weighted 1/(n + 1) as
in van Elteren's test, so that differences between donors count for nothing; `spearman_all` is that of all cells of the
split together. p is that of the permutation of the number among the cells of each donor, whose moments are exact
(`moments`). A number that is constant within donors, such as age, is tested by donor: the mean codes of donors are
ranked against their numbers, and donors are permuted, in all orders where there are at most MAX_ORDERED of them.
p_donor, n_agree and the interval take the donors as a sample (`donor_agreement`): Spearman's correlation in each donor
with at least MIN_CELLS cells. q is within the features of one number and split.
Limits are those of `rank_tests`: p is conditional on the donors at hand.
"""

from collections.abc import Mapping
from itertools import permutations
from typing import NamedTuple

import numpy as np
import polars as pl
from scipy import sparse
from scipy.special import gammaln

from feature_store.associations.donor_agreement import interval_of_mean, sign_flip_p
from feature_store.associations.inputs import Bools, Floats, Labels, Numbers, Sparse, Strata
from feature_store.associations.moments import BlockMoments, cross_product
from feature_store.associations.rank_tests import two_sided
from feature_store.associations.ranks import column_ranks, scale_rows
from feature_store.associations.sorted_columns import Codes, SortedColumns

BLOCKED = "blocked-spearman/1"
BY_UNIT = "unit-spearman/1"
MAX_ORDERED = 7
"""Largest number of donors of which all orders are enumerated."""
MIN_CELLS = 5
"""Least number of cells of a donor whose own correlation is computed."""


class _Test(NamedTuple):
    """spearman, z and p of a number, each [n_features], and the name of the method."""

    spearman: Floats
    z: Floats
    p: Floats
    method: str


def associate_number(
    codes: Codes, number: Numbers, splits: Mapping[str, Bools], units: Labels | None, *, first_feature: int = 0
) -> pl.DataFrame:
    """Rows of `feature_number` without q: a row a feature and split.

    codes: CSR [n_cells n_features]; splits: masks [n_cells]; units: donor or batch of every cell, None if there is
    none; first_feature: the id of the first column. A split in which fewer than two values are known has no rows.
    """
    columns, frames = SortedColumns.of(codes), []
    for split, mask in splits.items():
        cells = mask & number.known
        if np.unique(number.values[cells]).size > 1:
            own = None if units is None else Strata.of(int(cells.sum()), units.take(cells))
            kind = "none" if units is None else units.kind
            frames.append(_rows(columns.take(cells), number.values[cells], own, kind))
            frames[-1] = frames[-1].select(
                pl.Series("feature_id", np.arange(first_feature, first_feature + columns.shape[1]), dtype=pl.Int32),
                pl.lit(number.name).alias("number"),
                pl.lit(split).alias("split"),
                pl.all(),
            )
    return pl.concat(frames) if frames else pl.DataFrame()


def _rows(codes: SortedColumns, values: Floats, units: Strata | None, kind: str) -> pl.DataFrame:
    n_cells, n_features = codes.shape
    one = Strata.single(n_cells)
    blocks = units or one
    column = _ranked(values)
    is_constant = units is not None and not _varies_within(values, units)
    test = _by_unit(codes, values, blocks, kind) if is_constant else _blocked(codes, column, blocks, kind)
    unknown = np.full(n_features, np.nan)
    agreement = {"n_agree": unknown, "p_donor": unknown, "low": unknown, "high": unknown}
    if is_constant:
        agreement["p_donor"] = test.p
    elif units is not None:
        agreement |= _across_donors(codes, values, units, test.spearman)
    data = {
        "spearman": test.spearman,
        "spearman_all": _spearman(codes, column, one),
        "z": test.z,
        "p": test.p,
        **agreement,
        "n": np.full(n_features, n_cells),
        "n_donors": np.full(n_features, np.nan if units is None else units.n_strata),
    }
    frame = pl.DataFrame(
        {name: pl.Series(column).fill_nan(None) for name, column in data.items()} if n_features else data
    )
    return frame.with_columns(pl.col("n", "n_donors", "n_agree").cast(pl.Int64), pl.lit(test.method).alias("method"))


def _ranked(values: Floats) -> Sparse:
    """A number as a sparse column [n 1] without zeros, in the order of its values."""
    from scipy.stats import rankdata

    return sparse.csr_array(rankdata(values, "dense").astype(np.float64)[:, None])


def _spearman(codes: Codes, column: Sparse, strata: Strata) -> Floats:
    """The rank correlation of every feature with a number inside strata [n_features]."""
    left, right = (_weighted_ranks(matrix, strata) for matrix in (codes, column))
    found: Floats = BlockMoments.of(left, right, strata).correlation()[:, 0]
    return found


def _weighted_ranks(matrix: Codes, strata: Strata) -> Sparse:
    return scale_rows(column_ranks(matrix, strata).scores, (1.0 / (strata.sizes() + 1.0))[strata.codes])


def _blocked(codes: Codes, column: Sparse, blocks: Strata, kind: str) -> _Test:
    moments = BlockMoments.of(_weighted_ranks(codes, blocks), _weighted_ranks(column, blocks), blocks)
    z, p = (values[:, 0] for values in two_sided(moments.permutation()))
    fewest = float(np.exp(-gammaln(blocks.sizes() + 1).sum()))
    p = np.where(p < 1, np.maximum(p, fewest), p)
    return _Test(moments.correlation()[:, 0], z, p, f"{BLOCKED} blocks={kind}")


def _by_unit(codes: Codes, values: Floats, units: Strata, kind: str) -> _Test:
    """The rank correlation of the mean code of each unit with its mean number."""
    from scipy.stats import rankdata

    size, one = units.sizes(), Strata.single(units.n_strata)
    mean = cross_product(SortedColumns.of(codes).matrix, units.indicator().T).T / size[:, None]
    column = _ranked(np.bincount(units.codes, weights=values, minlength=units.n_strata) / size)
    scores = column_ranks(sparse.csr_array(mean), one).scores.astype(np.float64)
    moments = BlockMoments.of(scores, column_ranks(column, one).scores, one)
    z, p = (found[:, 0] for found in two_sided(moments.permutation()))
    if units.n_strata <= MAX_ORDERED:
        p = _exact_p(scores.toarray(), rankdata(column.toarray().ravel()))
    else:
        p = np.where(p < 1, np.maximum(p, float(np.exp(-gammaln(units.n_strata + 1)))), p)
    return _Test(moments.correlation()[:, 0], z, p, f"{BY_UNIT} units={kind}")


def _exact_p(scores: Floats, ranks: Floats) -> Floats:
    """The two-sided p [n_columns] of sum scores x ranks [n_units] under all orders of the ranks."""
    orders = ranks[np.array(list(permutations(range(ranks.size))))]
    centred = scores - scores.mean(axis=0)
    # careful: ranks are multiples of 1/2, so sums that are equal differ by rounding alone
    found: Floats = (np.abs(orders @ centred) >= np.abs(ranks @ centred) - 1e-6).mean(axis=0)
    return found


def _across_donors(codes: SortedColumns, values: Floats, donors: Strata, effect: Floats) -> dict[str, Floats]:
    """n_agree, p_donor, low and high [n_features] from the correlation inside each donor."""
    own = []
    for donor in range(donors.n_strata):
        cells = donors.codes == donor
        if (n := int(cells.sum())) >= MIN_CELLS and np.unique(values[cells]).size > 1:
            own.append(_spearman(codes.take(cells), _ranked(values[cells]), Strata.single(n)))
    by_donor = np.array(own).reshape(len(own), effect.size)
    if not own:
        unknown = np.full(effect.size, np.nan)
        return {"n_agree": unknown, "p_donor": unknown, "low": unknown, "high": unknown}
    interval = interval_of_mean(by_donor)
    agrees = (np.sign(by_donor) == np.sign(effect)) & (by_donor != 0)
    return {
        "n_agree": agrees.sum(axis=0).astype(np.float64),
        "p_donor": sign_flip_p(by_donor),
        "low": interval.low,
        "high": interval.high,
    }


def _varies_within(values: Floats, units: Strata) -> bool:
    """Whether at least half of the cells are in units in which the number has several values."""
    low, high = np.full(units.n_strata, np.inf), np.full(units.n_strata, -np.inf)
    np.minimum.at(low, units.codes, values)
    np.maximum.at(high, units.codes, values)
    return bool((high > low)[units.codes].mean() >= 0.5)
