"""Logistic regression of a label on features: the order in which an L1 penalty lets them in, and refits of a few.

With y in {0, 1}, n cells, x_i the features of cell i, each over its standard deviation, the lasso minimises

    1/n sum_i log(1 + exp(eta_i)) - y_i eta_i + lambda |w|_1,        eta_i = b + x_i . w

along a path of falling lambda, from the one at which all weights are 0. Features are in the order in which their weight
first differs from 0; features that come in at the same lambda are ordered by the size of their weight. The solution at
each lambda is that of coordinate descent on the quadratic approximation of the loss (Friedman, Hastie and Tibshirani
2010, doi:10.18637/jss.v033.i01), on a working set that grows until no other feature breaks the conditions of the
optimum. The features are centred by the intercept, so that sparse ones stay sparse.

An L1 penalty also shrinks the weights that it lets in. A refit of the first k features has a ridge penalty instead,
1/2 ridge |w|^2, which keeps the weights finite where a label is separated without error. In a refit the cells of the
label count as much as all others together: a logit above 0 then means that the cell is more like the label than like
the rest, however rare the label is, and logits of different labels can be compared.
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
_MOST_NEW, _MOST_STEPS = 20, 50


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
        self._a: Floats = np.empty((len(y), 0))
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
            gradient = np.abs(self.gradient(expit(self._w[0] + self._a @ self._w[1:])))
            gradient[self._columns] = 0
            above = np.flatnonzero(gradient > penalty * (1 + SLACK))
            if not above.size:
                return
            new = above[np.argsort(-gradient[above], kind="stable")][:_MOST_NEW].tolist()
            # those that left the model make room
            kept = np.flatnonzero(self._w[1:]).tolist()
            self._columns = [self._columns[i] for i in kept] + new
            self._a = np.hstack([self._a[:, kept], self._x[:, new].toarray().astype(np.float64)])
            self._w = np.r_[self._w[0], self._w[1:][kept], np.zeros(len(new))]

    def _solve_working_set(self, penalty: float) -> None:
        # not above: it takes most of a second, and the command that checks its options solves nothing
        from sklearn.linear_model import lasso_path

        a, y = self._a, self._y
        for _ in range(_MOST_STEPS):
            eta = self._w[0] + a @ self._w[1:]
            p = expit(eta)
            weight = np.maximum(p * (1 - p), LEAST_WEIGHT)
            target = eta + (y - p) / weight
            # the intercept is the weighted mean of what the features leave
            middle, centre = np.average(target, weights=weight), np.average(a, axis=0, weights=weight)
            root = np.sqrt(weight)
            x, z = (a - centre) * root[:, None], (target - middle) * root
            before = self._w
            slopes = before[1:]
            if slopes.size:
                _, path, *_ = lasso_path(
                    x, z, alphas=[penalty], precompute=x.T @ x, Xy=x.T @ z, coef_init=slopes, tol=1e-7, max_iter=10_000
                )
                slopes = path[:, 0]
            self._w = np.r_[middle - centre @ slopes, slopes]
            if np.abs(self._w - before).max() < TOLERANCE:
                return


def fit_ridge(features: Floats, label: Bools, ridge: float, start: Fit | None = None) -> Fit:
    """Logistic regression on a few features [n_cells n_features] with a ridge penalty, by Newton's method.

    `start`: a fit to begin with, which has no influence on the result.
    """
    n, k = features.shape
    a = np.hstack([np.ones((n, 1)), features])
    y, share, penalty = label.astype(np.float64), _shares(label), np.r_[0.0, np.full(k, ridge)]
    w = np.zeros(k + 1) if start is None else np.r_[start.intercept, start.weight]

    def total(w: Floats) -> float:
        return log_loss(a @ w, label) + float((penalty * w * w).sum()) / 2

    loss = total(w)
    for _ in range(_MOST_STEPS):
        p = expit(a @ w)
        slope = a.T @ (share * (p - y)) + penalty * w
        curve = (a * (share * p * (1 - p))[:, None]).T @ a + np.diag(penalty + 1e-12)
        step = np.linalg.solve(curve, slope)
        size = 1.0
        while (new := total(w - size * step)) > loss and size > 1e-6:
            size /= 2
        w, loss = w - size * step, min(new, loss)
        if np.abs(size * step).max() < TOLERANCE / 10:
            break
    return Fit(weight=w[1:], intercept=float(w[0]))


def log_loss(eta: Floats, label: Bools) -> float:
    """The mean of log(1 + exp(eta)) - y eta, in which the cells of the label count as much as all others together."""
    softplus: npt.NDArray[Any] = np.maximum(eta, 0) + log1p(np.exp(-np.abs(eta)))
    return float((_shares(label) * (softplus - label * eta)).sum())


def _shares(label: Bools) -> Floats:
    """The share of each cell in the loss: half of it is that of the label's cells, half that of the others."""
    n_label = max(int(label.sum()), 1)
    return np.where(label, 0.5 / n_label, 0.5 / max(len(label) - n_label, 1))
