"""Matches the features of two autoencoders: the nearest feature of each in the other, compared with chance.

If both autoencoders read one space (one model, one site), features are compared by the signed cosine of their decoder
rows: codes are never negative, so opposite directions are different features. The rows of a saved SAE are unit
directions of the raw activations (the normaliser has one scale and is folded in), so they are compared as they are.
Otherwise (another layer, another model) features are compared by the correlation of their cell codes over the same
cells. The pair is chosen on `select` cells (`similarity`) and reported on `test` cells (`similarity_test`), because the
best of thousands is inflated on the cells on which it was chosen.

Matches are mutual nearest neighbours, which are one to one by construction. The best assignment (Hungarian) costs
O(F^3), and in each pair that it adds, at least one feature has a nearer one elsewhere.

The null is the similarity of the nearest feature where there is no counterpart. For directions, random ones are drawn
with the mean and covariance of the side's own rows, because activations fill few dimensions; uniform ones, which the
literature reports, are easier to beat (mini model, F 1024: a median of .28 against .39) and are given as
`random_median`. For codes, cells are permuted within donors, in the same way for all features of one side, so that the
features keep their correlations with each other and their differences between donors. `null_95` is the quantile of
these maxima that a match has to exceed for p <= .05, with p = (1 + #{maxima >= similarity}) / (1 + draws). It corrects
within one feature and not over all features.
Limits. Cells with large values in one code have large values in the other (more genes, larger maxima), and every model
sees which genes a cell has, so this alone may put a correlation far beyond the null. Compare it with the correlations
with an SAE of the model with random weights (mini model: medians of .44 to .50 on test cells, against .67 between
seeds).

Cost: one product [n_features n_features] per permutation, in blocks. With 39 permutations one core takes 1.3 s for F
1024 over 500 cells with 80 % nonzero codes, 8 s for F 4096 over 5,000 cells with 32 features a cell, and about 150 s
for the latter with 30 % nonzero codes.

The nearest cosine of decoder rows as a measure of stability is from Bricken et al. 2023,
transformer-circuits.pub/2023/monosemantic-features, the permutation p from Phipson & Smyth 2010,
doi:10.2202/1544-6115.1585.
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.associations.inputs import Bools, Floats, Ints, Labels, Sparse, Strata, as_csr
from feature_store.associations.ranks import rank_scores
from feature_store.errors import InputError

Correlation = Literal["pearson", "spearman"]
Dead: TypeAlias = tuple[Bools | None, Bools | None]
"""Which features of each side are left out; None leaves out none."""
LEVEL = 0.05
MIN_NULL = 19
"""Least number of draws that can give a p of 0.05."""
N_DIRECTIONS = 1000
"""Number of random directions in a null of cosines."""
STABLE = 0.7
"""Least similarity at which a mutual match counts as the same feature, by convention."""
_BLOCK_VALUES = 4_000_000
_DENSE = 0.05
"""Share of nonzeros above which a dense product is faster than a sparse one."""


class Matches(NamedTuple):
    """The matches of the features of each side in the other; `match_directions` describes the columns."""

    of_a: pl.DataFrame
    of_b: pl.DataFrame


class _Vectors(NamedTuple):
    """The features of one side as columns: values [n n_features], dense or sparse; their means and centred norms."""

    values: Sparse
    mean: Floats
    norm: Floats

    def take(self, columns: Ints | slice) -> "_Vectors":
        return _Vectors(self.values[:, columns], self.mean[columns], self.norm[columns])


class _Nearest(NamedTuple):
    """For each feature its nearest feature of the other side, and the similarities of the nearest and the second."""

    match: Ints
    similarity: Floats
    runner_up: Floats


def match_directions(
    a: npt.NDArray[np.floating],
    b: npt.NDArray[np.floating],
    *,
    dead: Dead = (None, None),
    seed: int = 0,
) -> Matches:
    """Match the rows of two decoders of one space by cosine.

    a [n_features_a d_model], b [n_features_b d_model]: raw directions of any nonzero length; dead: features of either
    side that are left out (None: none); seed: the seed of the null's directions.

    Each frame has one row per feature: feature_id, other_feature_id, similarity, similarity_test (null here), runner_up
    (the similarity of the second nearest), rank (its place, from 1, among the features of its own side by similarity to
    its match), mutual (each is the other's nearest), null_median and null_95 of the null's maxima, p, dead, method, and
    random_median (the median similarity of the nearest of uniform random directions). Dead features have nulls. Raises
    InputError if the widths differ, or if a row is zero or not finite.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise InputError(f"directions are {a.shape} and {b.shape}; they need rows of the same width (d_model)")
    va, vb = _directions(a, "first"), _directions(b, "second")
    alive = _alive((va, vb), dead)
    va, vb = va.take(alive[0]), vb.take(alive[1])
    rng = np.random.default_rng(seed)
    random = _directions(rng.standard_normal((N_DIRECTIONS, a.shape[1])), "random")
    null = (_maxima(_alike(va, rng), vb)[0][None], _maxima(_alike(vb, rng), va)[0][None])
    medians = tuple(float(np.median(_maxima(random, other)[0])) for other in (vb, va))
    matches = _matches(alive, (va, vb), null, dead, n_features=(len(a), len(b)), method="cosine")
    return Matches(*(frame.with_columns(random_median=pl.lit(m)) for frame, m in zip(matches, medians, strict=True)))


def match_codes(
    select: tuple[Sparse, Sparse],
    test: tuple[Sparse, Sparse],
    *,
    units: Labels | None = None,
    correlation: Correlation = "pearson",
    dead: Dead = (None, None),
    n_null: int = 39,
    seed: int = 0,
) -> Matches:
    """Match the features of two codes of the same cells by the correlation of their cell codes.

    select, test: the two codes, CSR [n_cells n_features_a] and [n_cells n_features_b] with rows in the same order, of
    the cells on which pairs are chosen and of those on which they are reported; units: the donors of the select cells,
    within which the null permutes the cells; dead and the columns of the result are as in `match_directions`. Features
    that are constant over the select cells have nulls too, and those constant over the test cells have a null
    similarity_test. Spearman's correlation gives ties, zeros included, their midranks. Raises InputError if the codes
    are of different cells, or for fewer than 3 select cells or fewer than 19 permutations.
    """
    if n_null < MIN_NULL:
        raise InputError(f"n_null was {n_null}; p <= {LEVEL} needs at least {MIN_NULL} permutations")
    _check_cells(select, test, units)
    va, vb = _codes(select, correlation)
    alive = _alive((va, vb), dead)
    va, vb = va.take(alive[0]), vb.take(alive[1])
    strata = Strata.of(select[0].shape[0], units)
    draws = list(_permuted_maxima(va, vb, strata, n_null, np.random.default_rng(seed)))
    null = (np.stack([of_a for of_a, _ in draws], axis=1), np.stack([of_b for _, of_b in draws], axis=1))
    ta, tb = _codes(test, correlation)
    held_out = (ta.take(alive[0]), tb.take(alive[1]))
    n_features = (select[0].shape[1], select[1].shape[1])
    return _matches(alive, (va, vb), null, dead, n_features=n_features, method=correlation, held_out=held_out)


def summarise(matched: pl.DataFrame) -> dict[str, float]:
    """A summary of the matches of one side, over the features that are compared; NaN where a value is not defined.

    compared: the number of features; similarity, similarity_test, null, random: medians; mutual: the share of mutual
    matches; beyond null: the share with p <= .05; stable: the share of mutual matches with a similarity (for codes,
    that on test cells) of at least .7.
    """
    compared = matched.filter(pl.col("other_feature_id").is_not_null())
    tested = compared["similarity_test"].null_count() < compared.height
    reported = pl.col("similarity_test" if tested else "similarity").fill_null(0.0)
    figures = compared.select(
        pl.len().alias("compared"),
        pl.col("similarity").median(),
        pl.col("similarity_test").median(),
        pl.col("null_median").median().alias("null"),
        pl.col("random_median").median().alias("random"),
        pl.col("mutual").mean(),
        (pl.col("p") <= LEVEL).mean().alias("beyond null"),
        (pl.col("mutual") & (reported >= STABLE)).mean().alias("stable"),
    )
    return {name: float("nan") if value is None else value for name, value in figures.row(0, named=True).items()}


def _directions(rows: npt.NDArray[np.floating], name: str) -> _Vectors:
    """Rows [n_features d_model] as columns that are not centred, so that their correlation is the cosine."""
    norm = np.linalg.norm(rows.astype(np.float64), axis=1)
    if not (np.isfinite(norm).all() and (norm > 0).all()):
        bad = int(np.flatnonzero(~(np.isfinite(norm) & (norm > 0)))[0])
        raise InputError(f"row {bad} of the {name} directions has length {norm[bad]}; it has to be finite and above 0")
    return _Vectors(rows.T.astype(np.float64), np.zeros(len(rows)), norm)


def _alike(rows: _Vectors, rng: np.random.Generator) -> _Vectors:
    """Normal directions with the mean and covariance of the rows, as sums of all rows with random weights."""
    n_rows = rows.values.shape[1]
    mean = rows.values.mean(axis=1)
    weights = rng.standard_normal((N_DIRECTIONS, n_rows)) / math.sqrt(max(n_rows - 1, 1))
    return _directions(mean + weights @ (rows.values.T - mean), "null's")


def _check_cells(select: tuple[Sparse, Sparse], test: tuple[Sparse, Sparse], units: Labels | None) -> None:
    for name, (a, b) in (("select", select), ("test", test)):
        if a.shape[0] != b.shape[0]:
            raise InputError(f"codes of {a.shape[0]} and {b.shape[0]} {name} cells; matching needs the same cells")
    n_cells = select[0].shape[0]
    if n_cells < 3 or (units is not None and units.n_cells != n_cells):
        known = "no units" if units is None else f"units of {units.n_cells}"
        raise InputError(f"codes of {n_cells} select cells and {known}; matching needs 3 cells, and a unit for each")
    if select[0].shape[1] != test[0].shape[1] or select[1].shape[1] != test[1].shape[1]:
        raise InputError("codes of select and test cells have other features; give the same two codes runs")


def _codes(pair: tuple[Sparse, Sparse], correlation: Correlation) -> tuple[_Vectors, _Vectors]:
    """Both codes, or their midranks for Spearman's correlation; dense where the dense product is faster."""
    matrices = [as_csr(codes, "codes").astype(np.float64) for codes in pair]
    if correlation == "spearman":
        matrices = [rank_scores(codes, Strata.single(codes.shape[0])).scores for codes in matrices]
    if max(codes.nnz / max(codes.shape[0] * codes.shape[1], 1) for codes in matrices) >= _DENSE:
        matrices = [codes.toarray() for codes in matrices]
    return _centred(matrices[0]), _centred(matrices[1])


def _centred(values: Sparse) -> _Vectors:
    n = max(values.shape[0], 1)
    mean = np.asarray(values.sum(axis=0)).ravel() / n
    squares = np.asarray((values * values).sum(axis=0)).ravel()
    variance = squares - n * mean**2
    # careful: the variance of a constant column is rounding noise and not 0
    return _Vectors(values, mean, np.sqrt(np.where(variance > 1e-12 * squares, variance, 0.0)))


def _alive(sides: tuple[_Vectors, _Vectors], dead: Dead) -> list[Ints]:
    """Ids of the features of each side that are compared; InputError for a side without any."""
    ids = []
    for side, mask in zip(sides, dead, strict=True):
        if mask is not None and mask.shape != side.norm.shape:
            raise InputError(f"dead features are given for {mask.shape}, there are {side.norm.shape} of them")
        ids.append(np.flatnonzero((side.norm > 0) & (True if mask is None else ~mask)))
    if not all(map(len, ids)):
        raise InputError(f"{len(ids[0])} and {len(ids[1])} features are left to compare; each side needs one")
    return ids


def _blocks(a: _Vectors, b: _Vectors) -> Iterator[tuple[slice, Floats]]:
    """The similarities of a's features with all of b's, one block of a's features at a time."""
    n, n_a = a.values.shape
    step = max(1, _BLOCK_VALUES // max(len(b.norm), 1))
    for start in range(0, n_a, step):
        rows = slice(start, min(start + step, n_a))
        block = a.take(rows)
        product: Sparse = block.values.T @ b.values
        cross: Floats = product if isinstance(product, np.ndarray) else product.toarray()
        yield rows, (cross - n * np.outer(block.mean, b.mean)) / np.outer(block.norm, b.norm)


def _nearest(a: _Vectors, b: _Vectors) -> _Nearest:
    n = len(a.norm)
    found = _Nearest(np.zeros(n, dtype=np.int64), np.full(n, -np.inf), np.full(n, -np.inf))
    for rows, block in _blocks(a, b):
        row = np.arange(len(block))
        index = block.argmax(axis=1)
        found.match[rows] = index
        found.similarity[rows] = block[row, index]
        block[row, index] = -np.inf
        found.runner_up[rows] = block.max(axis=1)
    return found


def _ranks(a: _Vectors, b: _Vectors, found: _Nearest) -> Ints:
    """1 + the number of features of a that are nearer to a feature's match than that feature [n_features]."""
    rank = np.ones(len(a.norm), dtype=np.int64)
    for _, block in _blocks(a, b):
        rank += (block[:, found.match] > found.similarity).sum(axis=0)
    return rank


def _maxima(a: _Vectors, b: _Vectors) -> tuple[Floats, Floats]:
    """The similarity of each feature of a, and of each of b, with its nearest feature on the other side."""
    of_a, of_b = np.full(len(a.norm), -np.inf), np.full(len(b.norm), -np.inf)
    for rows, block in _blocks(a, b):
        of_a[rows] = block.max(axis=1)
        np.maximum(of_b, block.max(axis=0), out=of_b)
    return of_a, of_b


def _permuted_maxima(
    a: _Vectors, b: _Vectors, strata: Strata, n_null: int, rng: np.random.Generator
) -> Iterator[tuple[Floats, Floats]]:
    """`_maxima` with the cells of a permuted within strata, n_null times."""
    by_stratum = np.argsort(strata.codes, kind="stable")
    for _ in range(n_null):
        order = np.empty_like(by_stratum)
        order[by_stratum] = np.lexsort((rng.random(len(by_stratum)), strata.codes))
        yield _maxima(a._replace(values=a.values[order]), b)


def _matches(
    alive: list[Ints],
    compared: tuple[_Vectors, _Vectors],
    null: tuple[Floats, Floats],
    dead: Dead,
    *,
    n_features: tuple[int, int],
    method: str,
    held_out: tuple[_Vectors, _Vectors] | None = None,
) -> Matches:
    """The frames of both sides; null is [n_compared n_draws], or [1 n_draws] if it is the same for all features."""
    found = _nearest(compared[0], compared[1]), _nearest(compared[1], compared[0])
    frames = []
    for own, other in ((0, 1), (1, 0)):
        near, back = found[own], found[other]
        tested = None if held_out is None else _paired(held_out[own], held_out[other].take(near.match))
        draws = np.sort(null[own], axis=1)
        n_draws = draws.shape[1]
        reached = (draws >= near.similarity[:, None]).sum(axis=1)
        n = len(near.match)
        rows = pl.DataFrame(
            {
                "feature_id": alive[own],
                "other_feature_id": alive[other][near.match],
                "similarity": near.similarity,
                "similarity_test": pl.Series([None] * n if tested is None else tested, dtype=pl.Float64).fill_nan(None),
                "runner_up": np.where(np.isfinite(near.runner_up), near.runner_up, np.nan),
                "rank": _ranks(compared[own], compared[other], near),
                "mutual": back.match[near.match] == np.arange(n),
                "null_median": np.broadcast_to(np.median(draws, axis=1), n),
                "null_95": np.broadcast_to(draws[:, _place(n_draws)], n),
                "p": (1 + reached) / (1 + n_draws),
            }
        ).with_columns(pl.col("runner_up").fill_nan(None))
        frames.append(_with_the_rest(rows, n_features[own], dead[own], method))
    return Matches(*frames)


def _place(n_draws: int) -> int:
    """The index, among ascending draws, of the draw that a similarity has to exceed for p <= LEVEL."""
    return n_draws - int(LEVEL * (n_draws + 1) + 1e-9)


def _paired(a: _Vectors, b: _Vectors) -> Floats:
    """The correlation of each column of a with the same column of b; NaN where one of them is constant."""
    cross = np.asarray((a.values * b.values).sum(axis=0)).ravel() - a.values.shape[0] * a.mean * b.mean
    scale = a.norm * b.norm
    correlation: Floats = np.divide(cross, scale, out=np.full(len(scale), np.nan), where=scale > 0)
    return correlation


def _with_the_rest(rows: pl.DataFrame, n_features: int, dead: Bools | None, method: str) -> pl.DataFrame:
    """All features of a side in order; those that were not compared have no match."""
    every = pl.DataFrame(
        {"feature_id": np.arange(n_features), "dead": np.zeros(n_features, dtype=bool) if dead is None else dead}
    )
    found = every.join(rows, on="feature_id", how="left", maintain_order="left")
    return found.with_columns(
        pl.col("mutual").fill_null(False), method=pl.lit(f"{method}/1"), random_median=pl.lit(None, pl.Float64)
    )
