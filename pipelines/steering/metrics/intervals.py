"""Uncertainty: intervals over subsamples and draws, and the rank of an effect among the draws of a null.

`percentiles` is the central interval of many draws. `student` is the interval of the mean of independent draws, such as
SAEs of other seeds or draws of a null.

`rank_p` is one-sided in the metric's direction: the share of null draws that are at least as good, counting the
observation itself, (1 + #) / (1 + n). With n draws it is never below 1 / (1 + n), so at least 19 draws are needed for
.05 (Phipson & Smyth 2010, doi:10.2202/1544-6115.1585).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import stats

from feature_store.query.metrics import Direction

LEVEL = 0.95
"""The share of the distribution inside an interval."""

Floats: TypeAlias = npt.NDArray[np.floating[Any]]
Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]
Names: TypeAlias = Sequence[str] | npt.NDArray[Any]


class Interval(NamedTuple):
    """Both ends of an interval, or None twice if there are too few data."""

    low: float | None
    high: float | None


UNKNOWN = Interval(None, None)


def blocks(n_cells: int, *labels: Names | None) -> Ints:
    """A code per cell [n_cells] for its combination of labels, such as donor and type; labels of None are ignored."""
    columns = [np.zeros(n_cells, dtype=np.int64)]
    columns += [np.unique(np.asarray(own, dtype=str), return_inverse=True)[1] for own in labels if own is not None]
    return np.asarray(np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)[1], dtype=np.int64).ravel()


def percentiles(draws: Sequence[float] | Floats, *, level: float = LEVEL) -> Interval:
    """The central interval with the share `level` of the finite draws; None twice if there are none."""
    finite = np.asarray(draws, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return UNKNOWN
    low, high = np.quantile(finite, ((1 - level) / 2, (1 + level) / 2))
    return Interval(float(low), float(high))


def student(draws: Sequence[float] | Floats, *, level: float = LEVEL) -> Interval:
    """Student's interval of the mean of independent draws (seeds, null draws, donors), of which two are needed."""
    values = np.asarray(draws, dtype=np.float64)
    if len(values) < 2 or not np.isfinite(values).all():
        return UNKNOWN
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return Interval(float(values.mean()) - half, float(values.mean()) + half)


def rank_p(effect: float | None, null: Sequence[float] | Floats, direction: Direction) -> float | None:
    """The share of null draws at least as good as `effect`, which is counted itself: (1 + #) / (1 + n).

    A direction that is not fixed (`NEITHER`, `AS_INTENDED`) compares absolute values.

    It is None without an effect or a draw. A draw that is NaN counts as at least as good, so that a failed null never
    makes a result look better.
    """
    drawn = np.asarray(null, dtype=np.float64)
    if effect is None or not np.isfinite(effect) or not len(drawn):
        return None
    match direction:
        case Direction.HIGHER:
            worse = drawn < effect
        case Direction.LOWER:
            worse = drawn > effect
        case Direction.AS_INTENDED | Direction.NEITHER:
            worse = np.abs(drawn) < abs(effect)
    return float((1 + (~worse).sum()) / (1 + len(drawn)))
