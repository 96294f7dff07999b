"""What steering did to the cells' embeddings: effects per condition, with intervals and the nulls' verdict.

A classifier of k = 5 nearest neighbours is fitted once, on the unsteered embeddings of `train` cells; every condition
is judged by it on the same `test` cells. Of the cells that carry the target label and of the others it asks: how many
neighbours carry the target label (`votes`), and how far did the embedding move (`shift`, in units of the test cells'
RMS distance from their mean). An effect is a condition's value minus the unsteered one.

Intervals are 95 %: over bootstrapped cells for a single condition, Student's t over draws for a null. `p_<null>` is
the share of null draws whose effect is at least as large, counting the condition itself: (1 + #) / (1 + n_draws).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy import stats
from sklearn.neighbors import KNeighborsClassifier

N_NEIGHBORS = 5
N_BOOTSTRAP = 1000
METRICS = ("target_votes", "other_votes", "other_accuracy", "target_shift", "other_shift")
Floats = npt.NDArray[np.floating[Any]]


class Judge:
    """Scores the embeddings of the test cells under any condition."""

    def __init__(
        self, train: Floats, train_labels: Sequence[str], test: Floats, test_labels: Sequence[str], target: str
    ) -> None:
        """Fit on train [n_train d_model] and remember the unsteered test [n_test d_model] embeddings."""
        self._knn = KNeighborsClassifier(min(N_NEIGHBORS, len(train))).fit(train, np.asarray(train_labels, dtype=str))
        self._unsteered = np.asarray(test, dtype=np.float64)
        self._labels = np.asarray(test_labels, dtype=str)
        self._target = target
        self._spread = float(np.sqrt(((self._unsteered - self._unsteered.mean(0)) ** 2).sum(1).mean())) or 1.0
        self.is_target = self._labels == target

    def per_cell(self, steered: Floats) -> dict[str, Floats]:
        """Values per cell, float64 [n_test], of `votes`, `correct` and `shift` under one condition."""
        share = self._knn.predict_proba(steered)
        classes = self._knn.classes_
        column = np.flatnonzero(classes == self._target)
        return {
            "votes": share[:, column[0]] if len(column) else np.zeros(len(steered)),
            "correct": (classes[share.argmax(1)] == self._labels).astype(np.float64),
            "shift": np.linalg.norm(np.asarray(steered, dtype=np.float64) - self._unsteered, axis=1) / self._spread,
        }

    def columns(self, steered: Floats) -> dict[str, Floats]:
        """Per-cell values behind each of `METRICS`, restricted to the cells it averages over."""
        cells = self.per_cell(steered)
        own, other = self.is_target, ~self.is_target
        return {
            "target_votes": cells["votes"][own],
            "other_votes": cells["votes"][other],
            "other_accuracy": cells["correct"][other],
            "target_shift": cells["shift"][own],
            "other_shift": cells["shift"][other],
        }


def effects(judge: Judge, conditions: dict[str, list[Floats]], *, nulls: Sequence[str], seed: int) -> pl.DataFrame:
    """Effects of every condition on every metric.

    Args:
        judge: fitted on the unsteered embeddings.
        conditions: name -> draws of steered test embeddings [n_test d_model]; one draw unless the condition is a null.
            "unsteered" has to be among them.
        nulls: conditions that draw the line: `p_null` of the others compares with each of them.
        seed: of the bootstrap.

    Returns:
        condition, metric, n_draws, n_cells, value, effect, low, high (of the effect), and p_<null> for each null.
    """
    unsteered = judge.columns(conditions["unsteered"][0])
    rng = np.random.default_rng(seed)
    scored = {name: [judge.columns(draw) for draw in draws] for name, draws in conditions.items()}
    rows = []
    for name, draws in scored.items():
        for metric in METRICS:
            differences = [draw[metric] - unsteered[metric] for draw in draws]
            per_draw = np.array([_mean(d) for d in differences])
            single = len(draws) == 1
            low, high = _bootstrap(differences[0], rng) if single else _student(per_draw)
            rows.append(
                {
                    "condition": name,
                    "metric": metric,
                    "n_draws": len(draws),
                    "n_cells": len(unsteered[metric]),
                    "value": float(np.mean([_mean(draw[metric]) for draw in draws])),
                    "effect": float(per_draw.mean()),
                    "low": low,
                    "high": high,
                    **{f"p_{null}": _p_null(per_draw, scored[null], unsteered, metric, name, nulls) for null in nulls},
                }
            )
    return pl.DataFrame(rows, infer_schema_length=None)


def _p_null(
    per_draw: Floats,
    null: list[dict[str, Floats]],
    unsteered: dict[str, Floats],
    metric: str,
    name: str,
    nulls: Sequence[str],
) -> float | None:
    """Rank p of one condition's effect among a null's draws; None for the nulls themselves and for unsteered."""
    if name in nulls or name == "unsteered":
        return None
    drawn = np.array([_mean(draw[metric] - unsteered[metric]) for draw in null])
    return float((1 + (np.abs(drawn) >= abs(per_draw.mean())).sum()) / (1 + len(drawn)))


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _bootstrap(values: Floats, rng: np.random.Generator) -> tuple[float, float]:
    """95 % percentile interval of the mean over resampled cells."""
    if not len(values):
        return float("nan"), float("nan")
    means = values[rng.integers(0, len(values), (N_BOOTSTRAP, len(values)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _student(draws: Floats) -> tuple[float, float]:
    """95 % Student interval of the mean over draws."""
    half = float(stats.t.ppf(0.975, len(draws) - 1) * draws.std(ddof=1) / np.sqrt(len(draws)))
    return float(draws.mean()) - half, float(draws.mean()) + half
