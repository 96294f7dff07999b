"""Scores of probes on cells, and intervals over donors.

An interval is that of the jackknife: the score is computed again without each donor (in general: replicate unit), and
    se^2 = (m - 1) / m sum_u (score without u - their mean)^2,       score -+ t_(m - 1, .975) se
with m donors. It is wide where donors are few, as it should be, and there is none for a single one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from feature_store.associations.inputs import Bools, Floats, Ints

LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Score:
    """A score with its interval, NaN where there is none, and the number of donors that the interval is over."""

    value: float
    low: float
    high: float
    n_units: int


def jackknife(score: Callable[[Bools], float], units: Ints) -> Score:
    """The score of all cells, with its interval over units.

    `score` gives the score of the cells of a mask [n_cells], NaN where it has none; `units` [n_cells] is the unit of
    each cell. Units without which there is no score are not counted.
    """
    value = score(np.ones(len(units), dtype=bool))
    without = np.array([score(units != unit) for unit in np.unique(units)])
    without = without[np.isfinite(without)]
    m = len(without)
    if m < 2 or not np.isfinite(value):
        return Score(value=value, low=np.nan, high=np.nan, n_units=m)
    se = np.sqrt((m - 1) / m * ((without - without.mean()) ** 2).sum())
    half = stdtrit(m - 1, (1 + LEVEL) / 2) * se
    return Score(value=value, low=float(max(value - half, 0)), high=float(min(value + half, 1)), n_units=m)


def auroc(eta: Floats, label: Bools) -> float:
    """Probability that a cell of the label has a larger logit than another cell; ties count half. NaN for one kind."""
    from scipy.stats import rankdata

    n_label = int(label.sum())
    n_rest = len(label) - n_label
    if not n_label or not n_rest:
        return np.nan
    ranks = rankdata(eta)[label].sum()
    return float((ranks - n_label * (n_label + 1) / 2) / (n_label * n_rest))


def balanced_accuracy(chosen: Bools, label: Bools) -> float:
    """The mean of the shares of the label's cells that are chosen, and of the others that are not. NaN for one kind."""
    if label.all() or not label.any():
        return np.nan
    return float((chosen[label].mean() + (~chosen[~label]).mean()) / 2)


def best_threshold(eta: Floats, label: Bools) -> float:
    """The logit from which on cells are chosen with the largest balanced accuracy.

    It lies half-way between two logits; of several the one in the middle is taken.
    """
    values, place = np.unique(eta, return_inverse=True)
    n = np.bincount(place)
    n_label = np.bincount(place, weights=label.astype(np.float64))
    # chosen are the cells from each value on
    share = np.cumsum(n_label[::-1])[::-1] / n_label.sum()
    wrong = np.cumsum((n - n_label)[::-1])[::-1] / (n - n_label).sum()
    gain = share - wrong
    best = np.flatnonzero(gain >= gain.max() - 1e-12)
    middle = int(best[(len(best) - 1) // 2])
    return float(values[0] - 1 if middle == 0 else (values[middle] + values[middle - 1]) / 2)


def macro_f1(predicted: Ints, actual: Ints) -> float:
    """The mean F1 over the labels that cells have."""
    names = np.unique(actual)
    both = np.array([((predicted == name) & (actual == name)).sum() for name in names])
    size = np.array([(predicted == name).sum() + (actual == name).sum() for name in names])
    return float((2 * both / size).mean()) if names.size else np.nan


def macro_recall(predicted: Ints, actual: Ints) -> float:
    """The mean, over the labels that cells have, of the share of their cells that are found: balanced accuracy."""
    names = np.unique(actual)
    return float(np.mean([(predicted[actual == name] == name).mean() for name in names])) if names.size else np.nan
