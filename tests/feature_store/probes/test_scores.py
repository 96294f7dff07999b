"""Scores against scikit-learn, and intervals against hand numbers."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

from feature_store.probes import auroc, balanced_accuracy, jackknife, macro_f1, macro_recall
from feature_store.probes.scores import best_threshold


def test_scores_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    eta, label = rng.integers(0, 20, 300).astype(float), rng.random(300) < 0.3
    assert auroc(eta, label) == pytest.approx(roc_auc_score(label, eta))
    assert balanced_accuracy(eta > 9, label) == pytest.approx(balanced_accuracy_score(label, eta > 9))
    actual, predicted = rng.integers(0, 4, 300), rng.integers(0, 5, 300)
    present = np.unique(actual)
    expected = f1_score(actual, predicted, average="macro", labels=present)
    assert macro_f1(predicted, actual) == pytest.approx(expected)
    with pytest.warns(UserWarning, match="not in y_true"):
        assert macro_recall(predicted, actual) == pytest.approx(balanced_accuracy_score(actual, predicted))
    assert np.isnan(auroc(eta, label & False))
    assert np.isnan(balanced_accuracy(eta > 9, label | True))


def test_the_threshold_has_the_largest_balanced_accuracy():
    rng = np.random.default_rng(1)
    for _ in range(20):
        eta = rng.integers(0, 8, 40).astype(float)
        label = rng.random(40) < 0.4
        found = balanced_accuracy(eta > best_threshold(eta, label), label)
        every = [balanced_accuracy(eta > edge, label) for edge in np.arange(-0.5, 8)]
        assert found == pytest.approx(max(every))
    # of the thresholds between 2 and 5 the one half-way
    assert best_threshold(np.array([1.0, 2.0, 5.0, 6.0]), np.array([False, False, True, True])) == 3.5


def test_an_interval_is_the_jackknife_over_donors():
    value, units = np.array([0.2, 0.4, 0.6, 0.7, 0.9, 0.5]), np.array([0, 0, 1, 1, 2, 2])
    found = jackknife(lambda mask: float(value[mask].mean()), units)
    # without a donor the means are 0.675, 0.5 and 0.475
    se = np.sqrt(2 / 3 * np.sum((np.array([0.675, 0.5, 0.475]) - 0.55) ** 2))
    assert found.value == pytest.approx(0.55)
    assert found.low == pytest.approx(max(0.55 - 4.302653 * se, 0), abs=1e-6)
    assert found.high == pytest.approx(min(0.55 + 4.302653 * se, 1), abs=1e-6)
    assert found.n_units == 3
    single = jackknife(lambda mask: float(value[mask].mean()) if mask.any() else np.nan, np.zeros(6, dtype=int))
    assert np.isnan(single.low)
    assert single.n_units == 0
