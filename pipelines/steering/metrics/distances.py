"""Distances between the target cells, the steered target cells and the `toward` cells of steering.

There are three kinds. Each is computed inside a group (cell type), because distances between groups would include all
other differences:

- `mean`: |m_a - m_b|, Euclidean between means. Sampling noise alone gives E[d^2] = tr S_a / n_a + tr S_b / n_b.
- `corrected`: sqrt(max(0, |m_a - m_b|^2 - tr S_a / n_a - tr S_b / n_b)), unbiased in the square.
- `energy`: sqrt(max(0, 2 E|a - b| - E|a - a'| - E|b - b'|)), which compares whole distributions and not means alone. It
  is the U-statistic, which leaves out the distance of a cell to itself. It is unbiased in the square, so equal clouds
  score 0 at any size (the usual V-statistic is biased upward by E|a - a'| / n_a). Székely & Rizzo 2013,
  doi:10.1016/j.jspi.2013.03.018.

Steered cells are the same cells as the target cells, so `dist(steered, target)` is a paired comparison: its noise is
that of the cells' movements, and the pair of a cell with itself is left out of the cross term.

Cost: `energy` computes pairs in blocks of 1,024 rows (8 MB per 1,000 cells of the other cloud) and takes a seeded
sample of at most `max_cells` cells of each cloud; 5,000 x 5,000 cells of 512 numbers take 2.5 s of one core.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import polars as pl

from pipelines.errors import UsageError
from pipelines.steering.metrics.intervals import Bools, Floats, Ints, Names

MIN_CELLS = 10
"""Least number of cells of a group on each side."""
MAX_CELLS = 5_000
"""Largest number of cells of each cloud in an energy distance."""
N_SPLITS = 4
"""Number of random halves behind the distance that sampling noise alone leaves."""
ALL = "all"
"""The name of the group of all groups together."""
_BLOCK = 1024


def mean_distance(a: Floats, b: Floats, *, paired: bool = False, seed: int = 0) -> float:
    """The Euclidean distance between the means of a [n_a width] and b [n_b width], in the embedding's unit."""
    return float(np.linalg.norm(_float(a).mean(0) - _float(b).mean(0)))


def corrected_distance(a: Floats, b: Floats, *, paired: bool = False, seed: int = 0) -> float:
    """`mean_distance` minus sampling noise, 0 if noise explains all of it; each cloud has at least 2 cells.

    If `paired`, row i of both is the same cell, so the noise is that of a - b.
    """
    return float(np.sqrt(max(0.0, squared_distance(a, b, paired=paired))))


def squared_distance(a: Floats, b: Floats, *, paired: bool = False) -> float:
    """The unbiased estimate of the squared distance between population means, which can be negative by chance."""
    a, b = _float(a), _float(b)
    clouds = (a - b,) if paired else (a, b)
    noise = sum(float(cloud.var(0, ddof=1).sum()) / len(cloud) for cloud in clouds)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum()) - noise


def energy_distance(a: Floats, b: Floats, *, paired: bool = False, seed: int = 0, max_cells: int = MAX_CELLS) -> float:
    """The energy distance of a [n_a width] and b [n_b width], unbiased in the square, and 0 if the square is negative.

    Args:
        a: one cloud of at least 2 cells.
        b: the other cloud.
        paired: whether row i of both is the same cell, so that pairs (i, i) are left out.
        seed: the seed of the sample of cells of a cloud that holds more than `max_cells`.
        max_cells: the largest number of cells taken of each cloud; paired clouds keep the same cells.
    """
    rng = np.random.default_rng(seed)
    rows = _sample(len(a), max_cells, rng)
    others = rows if paired else _sample(len(b), max_cells, rng)
    a, b = _float(a)[rows], _float(b)[others]
    centre = (a.mean(0) + b.mean(0)) / 2  # careful: the expansion of |a - b|^2 loses digits far from the origin
    a, b = a - centre, b - centre
    within = _mean_pair(a, a, without_diagonal=True) + _mean_pair(b, b, without_diagonal=True)
    return float(np.sqrt(max(0.0, 2 * _mean_pair(a, b, without_diagonal=paired) - within)))


KINDS: dict[str, Callable[..., float]] = {
    "mean": mean_distance,
    "corrected": corrected_distance,
    "energy": energy_distance,
}


def floor(cells: Floats, n_a: int, n_b: int, *, kind: str, seed: int = 0, n_splits: int = N_SPLITS) -> float | None:
    """The distance of `kind` between n_a and n_b cells of one population, from random halves of cells [n width].

    It is the mean over splits, scaled by sqrt((1 / n_a + 1 / n_b) / (1 / n_half + 1 / n_other_half)); None for fewer
    than 4 cells.
    """
    half = len(cells) // 2
    if half < 2 or not n_splits:
        return None
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(cells)) for _ in range(n_splits)]
    measured = [KINDS[kind](cells[order[:half]], cells[order[half:]], seed=seed) for order in orders]
    scale = np.sqrt((1 / n_a + 1 / n_b) / (1 / half + 1 / (len(cells) - half)))
    return float(np.mean(measured) * scale)


def distance_table(
    unsteered: Floats,
    steered: Floats,
    is_target: Bools,
    is_toward: Bools,
    group: Names,
    *,
    donor: Names | None = None,
    kinds: Sequence[str] = tuple(KINDS),
    min_cells: int = MIN_CELLS,
    n_splits: int = N_SPLITS,
    seed: int = 0,
) -> pl.DataFrame:
    """The table of distances by group and over groups.

    Args:
        unsteered: the unsteered embeddings [n_cells width].
        steered: the embeddings of the same cells under one condition [n_cells width]; only the rows of target cells are
            read.
        is_target: which cells are target cells [n_cells].
        is_toward: which cells are toward cells [n_cells]; they are taken unsteered.
        group: the cell type of every cell [n_cells].
        donor: the donor of every cell [n_cells]; if given, the table is also made inside every donor.
        kinds: the kinds of distance, keys of `KINDS`.
        min_cells: the least number of target and of toward cells; a group with fewer of either is left out.
        n_splits: the number of random halves behind `floor`; 0 leaves `floor` out.
        seed: the seed of samples and halves.

    Returns:
        distance (kind), donor (null: all cells), group, n_target, n_toward, target_toward, steered_target,
        steered_toward, remaining = steered_toward / target_toward (null if that is 0), floor, and, in rows of group
        "all", left_out, the groups that had too few cells. "all" holds means over groups with equal weights and the
        ratio of these means; its numbers are null if every group was left out.

    Raises:
        UsageError: arrays have different numbers of cells, a kind is unknown, or `min_cells` is below 2.
    """
    names, donors = np.asarray(group, dtype=str), None if donor is None else np.asarray(donor, dtype=str)
    _check_cells(unsteered, steered, is_target, is_toward, names, *([] if donors is None else [donors]))
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown or min_cells < 2:
        raise UsageError(
            f"kinds {unknown}, min_cells={min_cells}; kinds are {list(KINDS)}, and min_cells is at least 2"
        )
    rows: list[dict[str, object]] = []
    for kind in kinds:
        for who, here in _parts(len(names), donors):
            clouds, left_out = _clouds(unsteered, steered, is_target & here, is_toward & here, names, min_cells)
            found = [
                {"distance": kind, "donor": who, "group": cloud.group, **_distances(cloud, kind, n_splits, seed)}
                for cloud in clouds
            ]
            rows += [
                *found,
                {"distance": kind, "donor": who, "group": ALL, **_over_groups(found), "left_out": left_out},
            ]
    return pl.DataFrame(rows, schema=SCHEMA)


SCHEMA: dict[str, pl.DataType | type[pl.DataType]] = {
    "distance": pl.String,
    "donor": pl.String,
    "group": pl.String,
    "n_target": pl.Int64,
    "n_toward": pl.Int64,
    "target_toward": pl.Float64,
    "steered_target": pl.Float64,
    "steered_toward": pl.Float64,
    "remaining": pl.Float64,
    "floor": pl.Float64,
    "left_out": pl.List(pl.String),
}


class _Clouds(NamedTuple):
    """The cells of one group."""

    group: str
    target: Floats
    steered: Floats
    toward: Floats


def _parts(n_cells: int, donors: Names | None) -> Iterator[tuple[str | None, Bools]]:
    """All cells, then the cells of each donor."""
    yield None, np.ones(n_cells, dtype=bool)
    if donors is not None:
        for name in np.unique(donors):
            yield str(name), np.asarray(donors == name)


def _clouds(
    unsteered: Floats, steered: Floats, is_target: Bools, is_toward: Bools, names: Names, min_cells: int
) -> tuple[list[_Clouds], list[str]]:
    """The groups with enough cells on both sides, and the names of the others that have any."""
    clouds, left_out = [], []
    for name in np.unique(np.asarray(names)[is_target | is_toward]):
        target, toward = is_target & (names == name), is_toward & (names == name)
        if min(target.sum(), toward.sum()) < min_cells:
            left_out.append(str(name))
        else:
            clouds.append(
                _Clouds(str(name), _float(unsteered[target]), _float(steered[target]), _float(unsteered[toward]))
            )
    return clouds, left_out


def _distances(cloud: _Clouds, kind: str, n_splits: int, seed: int) -> dict[str, object]:
    measure = KINDS[kind]
    n_target, n_toward = len(cloud.target), len(cloud.toward)
    before = measure(cloud.target, cloud.toward, seed=seed)
    after = measure(cloud.steered, cloud.toward, seed=seed)
    return {
        "n_target": n_target,
        "n_toward": n_toward,
        "target_toward": before,
        "steered_target": measure(cloud.steered, cloud.target, paired=True, seed=seed),
        "steered_toward": after,
        "remaining": after / before if before else None,
        "floor": floor(cloud.toward, n_target, n_toward, kind=kind, seed=seed, n_splits=n_splits),
    }


def _over_groups(rows: list[dict[str, object]]) -> dict[str, object]:
    """The row over all groups: sums of cells, means of distances, and the ratio of these means."""
    frame = pl.DataFrame(rows, schema=SCHEMA)
    means = frame.select(pl.col("target_toward", "steered_target", "steered_toward", "floor").mean()).row(0, named=True)
    before, after = means["target_toward"], means["steered_toward"]
    return {
        "n_target": frame["n_target"].sum(),
        "n_toward": frame["n_toward"].sum(),
        **means,
        "remaining": after / before if before else None,
    }


def _mean_pair(a: Floats, b: Floats, *, without_diagonal: bool) -> float:
    """The mean Euclidean distance over pairs of rows, optionally without the pairs (i, i)."""
    b_squared = (b**2).sum(1)
    total = 0.0
    for start in range(0, len(a), _BLOCK):
        rows = a[start : start + _BLOCK]
        squared = (rows**2).sum(1)[:, None] + b_squared - 2 * rows @ b.T
        if without_diagonal:
            squared[np.arange(len(rows)), start + np.arange(len(rows))] = 0.0
        total += float(np.sqrt(np.maximum(squared, 0.0, out=squared), out=squared).sum())
    return total / (len(a) * (len(b) - without_diagonal))


def _sample(n: int, at_most: int, rng: np.random.Generator) -> Ints:
    return np.arange(n) if n <= at_most else np.sort(rng.choice(n, at_most, replace=False))


def _float(values: Floats) -> Floats:
    return np.asarray(values, dtype=np.float64)


def _check_cells(*values: Floats | Bools | Names) -> None:
    if len(counts := {len(own) for own in values}) > 1:
        raise UsageError(f"arrays of {sorted(counts)} cells; embeddings, masks and labels need a row for every cell")
