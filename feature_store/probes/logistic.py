"""Logistic regression of a label on features: the order in which an L1 penalty lets them in, and refits of a few.

With y in {0, 1}, n cells, x_i the features of cell i, each over its standard deviation, the lasso minimises

    1/n sum_i log(1 + exp(eta_i)) - y_i eta_i + lambda |w|_1,        eta_i = b + x_i . w

along a path of falling lambda, from the one at which all weights are 0. Features are in the order in which their weight
first differs from 0; features that come in at the same lambda are ordered by the size of their weight. The solution at
each lambda is that of coordinate descent on the quadratic approximation of the loss (Friedman, Hastie and Tibshirani
2010, doi:10.18637/jss.v033.i01), on a working set that grows until no other feature breaks the conditions of the
optimum. The features are centred by the intercept, so that sparse ones stay sparse.

An L1 penalty also shrinks the weights that it lets in. A refit of the first k features has a ridge penalty instead,
1/2 ridge |w|^2, which is small and keeps the weights finite where a label is separated without error.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import expit, log1p

from feature_store.associations.inputs import Bools, Floats, Ints, Sparse

RATIO = 0.9
"""Each lambda of the path over the one before it."""
LEAST_LAMBDA = 1e-3
"""The last lambda of the path over the first one."""
LEAST_WEIGHT = 1e-5
"""Least p (1 - p) of a cell in the quadratic approximation."""
TOLERANCE = 1e-5
"""Change of a weight below which it has converged."""
SLACK = 1e-3
"""How much, over lambda, the gradient of a feature with weight 0 may exceed lambda."""
_MOST_NEW, _MOST_STEPS, _MOST_SWEEPS = 20, 50, 200


class Fit(NamedTuple):
    """A probe: eta = intercept + x . weight, over features as they are given."""

    weight: Floats
    intercept: float

    def predict(self, features: Floats) -> Floats:
        """The logits [n_cells] of features [n_cells n_features]."""
        eta: Floats = features @ self.weight + self.intercept
        return eta


def entry_order(features: Sparse, label: Bools, most: int) -> Ints:
    """The first features that a lasso lets in, in their order: at most `most` columns of a CSC [n_cells n_features].

    Features should have standard deviation 1; `label` [n_cells] has cells of both kinds. Fewer than `most` come back
    where the path ends before.
    """
    y, n = label.astype(np.float64), len(label)
    rate = y.mean()
    path = _Path(features, y)
    gradient = path.gradient(np.full(n, rate))
    start = penalty = float(np.abs(gradient).max(initial=0.0))
    found: dict[int, None] = {}
    while len(found) < most and penalty >= LEAST_LAMBDA * start and start > 0:
        penalty *= RATIO
        path.solve(penalty)
        new = [(-abs(weight), column) for column, weight in path.nonzero() if column not in found]
        found.update(dict.fromkeys(column for _, column in sorted(new)))
    return np.array(list(found)[:most], dtype=np.int64)


class _Path:
    """The lasso of one label, from one lambda to the next: its working set and weights."""

    def __init__(self, features: Sparse, y: Floats) -> None:
        self._x, self._y = features, y
        self._columns: list[int] = []
        # the column of ones comes first and is not penalised
        self._a: Floats = np.ones((len(y), 1))
        rate = y.mean()
        self._w: Floats = np.array([np.log(rate / (1 - rate))])

    def gradient(self, p: Floats) -> Floats:
        """Minus the gradient of the loss in each feature's weight."""
        return np.asarray(self._x.T @ (self._y - p)).ravel() / len(self._y)

    def nonzero(self) -> list[tuple[int, float]]:
        """The features whose weight is not 0, with their weights."""
        return [(c, float(w)) for c, w in zip(self._columns, self._w[1:], strict=True) if w != 0]

    def solve(self, penalty: float) -> None:
        """The solution at this lambda."""
        while True:
            self._solve_working_set(penalty)
            gradient = np.abs(self.gradient(expit(self._a @ self._w)))
            gradient[self._columns] = 0
            above = np.flatnonzero(gradient > penalty * (1 + SLACK))
            if not above.size:
                return
            new = above[np.argsort(-gradient[above], kind="stable")][:_MOST_NEW].tolist()
            # those that left the model make room
            kept = [0, *(1 + np.flatnonzero(self._w[1:])).tolist()]
            self._columns = [self._columns[i - 1] for i in kept[1:]] + new
            self._a = np.hstack([self._a[:, kept], self._x[:, new].toarray().astype(np.float64)])
            self._w = np.concatenate([self._w[kept], np.zeros(len(new))])

    def _solve_working_set(self, penalty: float) -> None:
        a, y, n = self._a, self._y, len(self._y)
        for _ in range(_MOST_STEPS):
            p = expit(a @ self._w)
            weight = np.maximum(p * (1 - p), LEAST_WEIGHT)
            gram = (a * weight[:, None]).T @ a / n
            target = gram @ self._w + a.T @ (y - p) / n
            before, self._w = self._w, _coordinate_descent(gram, target, self._w, penalty)
            if np.abs(self._w - before).max() < TOLERANCE:
                return


def _coordinate_descent(gram: Floats, target: Floats, start: Floats, penalty: float) -> Floats:
    """The minimum of w . gram . w / 2 - target . w + penalty |w[1:]|_1."""
    w = start.copy()
    residual = target - gram @ w
    diagonal = gram.diagonal()
    for _ in range(_MOST_SWEEPS):
        largest = 0.0
        for j in range(len(w)):
            if diagonal[j] <= 0:
                continue
            free = residual[j] + diagonal[j] * w[j]
            shrunk = free if j == 0 else np.sign(free) * max(abs(free) - penalty, 0.0)
            step = shrunk / diagonal[j] - w[j]
            if step:
                w[j] += step
                residual -= step * gram[:, j]
                largest = max(largest, abs(step))
        if largest < TOLERANCE / 10:
            break
    return w


def fit_ridge(features: Floats, label: Bools, ridge: float, start: Fit | None = None) -> Fit:
    """Logistic regression on a few features [n_cells n_features] with a ridge penalty, by Newton's method.

    `start`: a fit to begin with, which has no influence on the result.
    """
    n, k = features.shape
    a = np.hstack([np.ones((n, 1)), features])
    y, penalty = label.astype(np.float64), np.r_[0.0, np.full(k, ridge)]
    w = np.zeros(k + 1) if start is None else np.r_[start.intercept, start.weight]
    if start is None:
        rate = np.clip(y.mean(), 1e-9, 1 - 1e-9)
        w[0] = np.log(rate / (1 - rate))
    loss = _ridge_loss(a, y, penalty, w)
    for _ in range(_MOST_STEPS):
        p = expit(a @ w)
        slope = a.T @ (p - y) / n + penalty * w
        curve = (a * (p * (1 - p))[:, None]).T @ a / n + np.diag(penalty + 1e-12)
        step = np.linalg.solve(curve, slope)
        size = 1.0
        while (new := _ridge_loss(a, y, penalty, w - size * step)) > loss and size > 1e-6:
            size /= 2
        w, loss = w - size * step, min(new, loss)
        if np.abs(size * step).max() < TOLERANCE / 10:
            break
    return Fit(weight=w[1:], intercept=float(w[0]))


def log_loss(eta: Floats, label: Bools) -> float:
    """The mean of log(1 + exp(eta)) - y eta."""
    softplus: npt.NDArray[Any] = np.maximum(eta, 0) + log1p(np.exp(-np.abs(eta)))
    return float((softplus - label * eta).mean())


def _ridge_loss(a: Floats, y: Floats, penalty: Floats, w: Floats) -> float:
    return log_loss(a @ w, y.astype(bool)) + float((penalty * w * w).sum()) / 2
