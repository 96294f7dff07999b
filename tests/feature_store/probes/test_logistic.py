"""The lasso's path and the ridge refits, against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from feature_store.probes import entry_order, fit_ridge
from feature_store.probes.logistic import RATIO, log_loss


def drawn(seed=0, n=400, n_features=30, density=0.4):
    """Sparse features of standard deviation 1, and a label that follows the first four."""
    rng = np.random.default_rng(seed)
    x = rng.exponential(1, (n, n_features)) * (rng.random((n, n_features)) < density)
    x /= x.std(axis=0)
    eta = x[:, :4] @ np.array([2.0, -1.5, 1.0, 0.7]) - 1
    return x, rng.random(n) < 1 / (1 + np.exp(-eta))


def lasso_weights(x, label, penalty):
    """The weights of scikit-learn's solution, whose intercept is not penalised either."""
    model = LogisticRegression(
        l1_ratio=1.0, solver="saga", C=1 / (len(label) * penalty), tol=1e-9, max_iter=100_000, fit_intercept=True
    )
    return model.fit(x, label).coef_[0]


@pytest.mark.parametrize("seed", range(3))
def test_features_enter_in_the_order_of_the_path_of_the_lasso(seed):
    x, label = drawn(seed)
    found = entry_order(sparse.csc_array(x), label, 8)
    penalty = np.abs(x.T @ (label - label.mean())).max() / len(label)
    expected: dict[int, None] = {}
    while len(expected) < 8:
        penalty *= RATIO
        weight = lasso_weights(x, label, penalty)
        new = np.flatnonzero(np.abs(weight) > 1e-6)
        expected.update(dict.fromkeys(sorted(new.tolist(), key=lambda j, w=weight: -abs(w[j]))))
    assert found.tolist() == list(expected)[:8]
    assert set(found[:4].tolist()) == {0, 1, 2, 3}


def test_the_working_set_has_the_solution_of_all_features():
    x, label = drawn(3, n=200, n_features=300)
    from feature_store.probes.logistic import _Path

    path = _Path(sparse.csc_array(x), label.astype(float))
    start = np.abs(path.gradient(np.full(len(label), label.mean()))).max()
    path.solve(start * 0.3)
    weight = np.zeros(300)
    for column, value in path.nonzero():
        weight[column] = value
    np.testing.assert_allclose(weight, lasso_weights(x, label, start * 0.3), atol=2e-3)


@pytest.mark.parametrize("ridge", [1e-1, 1e-3])
def test_a_refit_is_ridge_regression(ridge):
    x, label = drawn(1)
    found = fit_ridge(x[:, :5], label, ridge)
    # cells of the label count as much as all others together
    model = LogisticRegression(C=1 / (len(label) * ridge), tol=1e-10, max_iter=10_000, class_weight="balanced").fit(
        x[:, :5], label
    )
    np.testing.assert_allclose(found.weight, model.coef_[0], rtol=1e-4, atol=1e-5)
    assert found.intercept == pytest.approx(model.intercept_[0], rel=1e-4)
    again = fit_ridge(x[:, :5], label, ridge, found._replace(weight=-5 * found.weight))
    np.testing.assert_allclose(again.weight, found.weight, atol=1e-5)


def test_a_separated_label_has_finite_weights_and_no_features_no_preference():
    x = np.r_[np.zeros(50), np.ones(50)][:, None]
    label = x[:, 0] > 0
    fit = fit_ridge(x, label, 1e-4)
    assert np.isfinite(fit.weight).all()
    assert log_loss(fit.predict(x), label) < 0.05
    none = fit_ridge(x[:80, :0], label[:80], 1e-4)
    assert none.intercept == pytest.approx(0, abs=1e-6)
    assert entry_order(sparse.csc_array(np.zeros((100, 3))), label, 2).tolist() == []
