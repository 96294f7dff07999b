"""Which features of two autoencoders are the same: the nearest of each in the other, compared with chance.

Where both read one space (one model, one site) a feature is its decoder row, and two are compared by the cosine of
their rows, with its sign: codes are never negative, so opposite directions are different features. Rows of a saved SAE
are unit directions of the raw activations (the normaliser has one scale and is folded in), so nothing is to be undone.
Elsewhere (another layer, another model) they are compared by the correlation of their cell codes over the same cells:
the pair is chosen on `select` cells (`similarity`) and reported on `test` cells (`similarity_test`), as the best of
thousands is flattered where it is chosen.

Matches are mutual nearest neighbours, which are one to one by themselves; the best assignment (Hungarian) costs
O(F^3), and the pairs that it adds are those that at least one side likes better elsewhere.

Null: the nearest of what has no counterpart. Directions: random ones of the mean and covariance of the side's own rows,
as activations fill few dimensions; uniform ones, which the literature shows, are easier to beat (mini model, F 1024: a
median of .28 for .39) and are there as `random_median`. Codes: cells permuted within donors, all features of one side
alike, so that the features keep their correlations with each other and their differences between donors. `null_95` is
the quantile of these maxima that a match has to exceed for p <= .05, p = (1 + #{maxima >= similarity}) / (1 + draws),
of one feature and not of all.
Cells that are large in one code are large in the other (more genes, larger maxima), and every model sees which genes a
cell has, so a correlation far beyond this null may be no more than that: hold it against the correlations with an SAE
of the model with random weights (mini model: medians of .44 to .50 on test cells, for .67 between seeds).

Cost: one product [n_features n_features] per permutation, in blocks. CPU seconds of one core, 39 permutations: F 1024
over 500 cells, 80 % full, 1.3; F 4096 over 5,000 cells, 32 features a cell, 8; the same 30 % full about 150.

Stability by nearest cosine of decoder rows: Bricken et al. 2023, transformer-circuits.pub/2023/monosemantic-features;
permutation p: Phipson & Smyth 2010, doi:10.2202/1544-6115.1585.
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
"""Features of each side that take no part; None: all do."""
LEVEL = 0.05
MIN_NULL = 19
"""Draws from which on a p of 0.05 can be reached."""
N_DIRECTIONS = 1000
"""Random directions of a null of cosines."""
STABLE = 0.7
"""Similarity from which on a mutual match counts as the same feature: a convention."""
_BLOCK_VALUES = 4_000_000
_DENSE = 0.05
"""Share of nonzeros from which on a dense product is the faster one."""


class Matches(NamedTuple):
    """The features of each side, matched in the other; columns as in `match_directions`."""

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
    """Of each feature: its nearest in the other side, how near that is, and how near the second is."""

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

    a [n_features_a d_model], b [n_features_b d_model]: raw directions of any length but zero; dead: features of either
    that take no part (None: all do); seed: of the null's directions.

    Each frame has a row a feature: feature_id, other_feature_id, similarity, similarity_test (null here), runner_up
    (similarity of the second nearest), rank (its place, from 1, among the features of its own side in the eyes of its
    match), mutual (each is the other's nearest), null_median and null_95 of the null's maxima, p, dead, method, and
    random_median (of the nearest of uniform random directions). Features that are dead have nulls. Raises InputError
    for another width, or rows that are not finite or zero.
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

    select, test: the two codes, CSR [n_cells n_features_a] and [n_cells n_features_b], rows in one order, of the cells
    on which pairs are chosen and of those on which they are reported; units: donors of the select cells, within which
    the null permutes them; dead as in `match_directions`, which has the columns. Features that are constant over the
    select cells have nulls too; those constant over the test cells, a null similarity_test. Spearman's correlation has
    ties at their midranks, the zeros among them. Raises InputError for codes of other cells, fewer than 3 select cells
    or fewer than 19 permutations.
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
    """What one side's matches come to, over the features that are compared; NaN where there is nothing to tell.

    compared: number of features; similarity, similarity_test, null, random: medians; mutual: share of mutual matches;
    beyond null: share of p <= .05; stable: share of mutual matches of a similarity (on test cells, of codes) of at
    least .7.
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
    """Rows [n_features d_model] as columns about the origin: their correlation is then the cosine."""
    norm = np.linalg.norm(rows.astype(np.float64), axis=1)
    if not (np.isfinite(norm).all() and (norm > 0).all()):
        bad = int(np.flatnonzero(~(np.isfinite(norm) & (norm > 0)))[0])
        raise InputError(f"row {bad} of the {name} directions has length {norm[bad]}; it has to be finite and above 0")
    return _Vectors(rows.T.astype(np.float64), np.zeros(len(rows)), norm)


def _alike(rows: _Vectors, rng: np.random.Generator) -> _Vectors:
    """Normal directions of the mean and covariance of the rows: sums of all of them with random weights."""
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
    """Both codes, or the midranks that Spearman correlates, dense where that is the faster product."""
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
    # careful: what a constant column leaves is rounding noise
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
    """Similarities of a block of a's features with all of b's, block by block."""
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
    """1 + the features of a that are nearer to a feature's match than itself [n_features]."""
    rank = np.ones(len(a.norm), dtype=np.int64)
    for _, block in _blocks(a, b):
        rank += (block[:, found.match] > found.similarity).sum(axis=0)
    return rank


def _maxima(a: _Vectors, b: _Vectors) -> tuple[Floats, Floats]:
    """The similarity of each feature of a, and of b, with its nearest."""
    of_a, of_b = np.full(len(a.norm), -np.inf), np.full(len(b.norm), -np.inf)
    for rows, block in _blocks(a, b):
        of_a[rows] = block.max(axis=1)
        np.maximum(of_b, block.max(axis=0), out=of_b)
    return of_a, of_b


def _permuted_maxima(
    a: _Vectors, b: _Vectors, strata: Strata, n_null: int, rng: np.random.Generator
) -> Iterator[tuple[Floats, Floats]]:
    """`_maxima` after permuting the cells of a within strata."""
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
    """Frames of both sides; null [n_compared n_draws], or [1 n_draws] where it is the same for all features."""
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
    """Index, among ascending draws, of the one that a similarity has to exceed for p <= LEVEL."""
    return n_draws - int(LEVEL * (n_draws + 1) + 1e-9)


def _paired(a: _Vectors, b: _Vectors) -> Floats:
    """Correlation of each column of a with the same column of b; NaN where one is constant."""
    cross = np.asarray((a.values * b.values).sum(axis=0)).ravel() - a.values.shape[0] * a.mean * b.mean
    scale = a.norm * b.norm
    correlation: Floats = np.divide(cross, scale, out=np.full(len(scale), np.nan), where=scale > 0)
    return correlation


def _with_the_rest(rows: pl.DataFrame, n_features: int, dead: Bools | None, method: str) -> pl.DataFrame:
    """All features of a side in order: those that were not compared have no match."""
    every = pl.DataFrame(
        {"feature_id": np.arange(n_features), "dead": np.zeros(n_features, dtype=bool) if dead is None else dead}
    )
    found = every.join(rows, on="feature_id", how="left", maintain_order="left")
    return found.with_columns(
        pl.col("mutual").fill_null(False), method=pl.lit(f"{method}/1"), random_median=pl.lit(None, pl.Float64)
    )
