"""How sure a number is: intervals over cells, over draws, and the rank of an effect among a null's draws.

`bootstrap` resamples cells inside blocks, donor by type where donors exist, so that the make-up of the sample stays as
it is: its interval says how well these donors' value is known, and is too narrow for donors not yet seen. For those,
take `student` over one value a donor. A null's draws get Student's t as well.

A distance is no mean: cells drawn twice are 0 apart and repeat their noise, so its bootstrap lies above the value it is
an interval of. `subsamples` leaves a fifth of each block out instead, which repeats no cell, and scales the spread (the
delete-d jackknife, Shao & Wu 1989, doi:10.1214/aos/1176347263).

`rank_p` is one-sided by the metric's direction: the share of null draws at least as good, counting the observation
itself, (1 + #) / (1 + n). With n draws it is never below 1 / (1 + n): 19 draws are the fewest that can reach .05
(Phipson & Smyth 2010, doi:10.2202/1544-6115.1585).

Cost: the mean of 20,000 cells in 1,000 resamples takes .1 s of one core.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import stats

N_BOOTSTRAP = 1000
N_SUBSAMPLES = 200
LEVEL = 0.95
_MAX_DRAWN = 4_000_000

Floats: TypeAlias = npt.NDArray[np.floating[Any]]
Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]
Names: TypeAlias = Sequence[str] | npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a number says: the direction in which it is good, and the values it can take."""

    name: str
    higher_is_better: bool | None
    """None where neither direction is good; its p is then of the absolute value."""
    low: float | None = None
    high: float | None = None


class Interval(NamedTuple):
    """Both ends, or None twice where there is too little to say."""

    low: float | None
    high: float | None


UNKNOWN = Interval(None, None)


def blocks(n_cells: int, *labels: Names | None) -> Ints:
    """Number the combinations of labels, such as donor and type, a code per cell [n_cells]; None is left out."""
    columns = [np.zeros(n_cells, dtype=np.int64)]
    columns += [np.unique(np.asarray(own, dtype=str), return_inverse=True)[1] for own in labels if own is not None]
    return np.asarray(np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)[1], dtype=np.int64).ravel()


def bootstrap(
    statistic: Callable[[Ints], float | None],
    block: Ints,
    *,
    seed: int,
    n_bootstrap: int = N_BOOTSTRAP,
    level: float = LEVEL,
) -> Interval:
    """Percentile interval of `statistic(rows)` over cells resampled with replacement inside their block.

    Args:
        statistic: from the rows of resampled cells [n_cells] to a number; None and NaN are left out.
        block: code of the block of every cell [n_cells], see `blocks`.
        seed: of the resampling.
        n_bootstrap: resamples.
        level: share of the distribution inside the interval.
    """
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(block == code) for code in np.unique(block)]
    values = []
    for _ in range(n_bootstrap if len(block) else 0):
        rows = np.concatenate([rng.choice(own, len(own)) for own in members])
        values.append(statistic(rows))
    return percentiles([value for value in values if value is not None], level=level)


def subsamples(
    statistic: Callable[[Ints], float | None],
    block: Ints,
    *,
    seed: int,
    n_samples: int = N_SUBSAMPLES,
    level: float = LEVEL,
) -> Interval:
    """Interval of a distance: its value, and about it the spread when a fifth of every block is left out.

    Args: as `bootstrap`; `statistic` is given sorted rows, each at most once. Its bias at fewer cells is taken out.
    """
    value = statistic(np.arange(len(block))) if len(block) else None
    if value is None:
        return UNKNOWN
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(block == code) for code in np.unique(block)]
    kept = [len(own) - (max(1, round(len(own) / 5)) if len(own) > 1 else 0) for own in members]
    if (n_kept := sum(kept)) == len(block):
        return UNKNOWN
    samples = (
        np.sort(np.concatenate([rng.choice(own, n, replace=False) for own, n in zip(members, kept, strict=True)]))
        for _ in range(n_samples)
    )
    drawn = np.array([found for rows in samples if (found := statistic(rows)) is not None and np.isfinite(found)])
    if not len(drawn):
        return UNKNOWN
    low, high = percentiles((drawn - drawn.mean()) * np.sqrt(n_kept / (len(block) - n_kept)), level=level)
    return UNKNOWN if low is None or high is None else Interval(value + low, value + high)


def bootstrap_mean(
    values: Floats, block: Ints | None = None, *, seed: int, n_bootstrap: int = N_BOOTSTRAP, level: float = LEVEL
) -> Interval:
    """`bootstrap` of the mean of values [n_cells], without a call per resample."""
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        return UNKNOWN
    rng = np.random.default_rng(seed)
    totals = np.zeros(n_bootstrap)
    block = np.zeros(len(values), dtype=np.int64) if block is None else block
    for code in np.unique(block):
        own = values[block == code]
        step = max(1, _MAX_DRAWN // len(own))
        for start in range(0, n_bootstrap, step):
            stop = min(start + step, n_bootstrap)
            totals[start:stop] += own[rng.integers(0, len(own), (stop - start, len(own)))].sum(1)
    return percentiles(totals / len(values), level=level)


def percentiles(draws: Sequence[float] | Floats, *, level: float = LEVEL) -> Interval:
    """The middle `level` of the finite draws; None twice for none."""
    finite = np.asarray(draws, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return UNKNOWN
    low, high = np.quantile(finite, ((1 - level) / 2, (1 + level) / 2))
    return Interval(float(low), float(high))


def student(draws: Sequence[float] | Floats, *, level: float = LEVEL) -> Interval:
    """Student's interval of the mean over independent draws (seeds, null draws, donors); two are the fewest."""
    values = np.asarray(draws, dtype=np.float64)
    if len(values) < 2 or not np.isfinite(values).all():
        return UNKNOWN
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return Interval(float(values.mean()) - half, float(values.mean()) + half)


def rank_p(effect: float | None, null: Sequence[float] | Floats, *, higher_is_better: bool | None) -> float | None:
    """Share of null draws at least as good as `effect`, itself counted: (1 + #) / (1 + n).

    None without an effect or a draw. A draw that is NaN counts as at least as good, so that a null that broke down
    never makes a result look better.
    """
    drawn = np.asarray(null, dtype=np.float64)
    if effect is None or not np.isfinite(effect) or not len(drawn):
        return None
    if higher_is_better is None:
        worse = np.abs(drawn) < abs(effect)
    else:
        worse = drawn < effect if higher_is_better else drawn > effect
    return float((1 + (~worse).sum()) / (1 + len(drawn)))
