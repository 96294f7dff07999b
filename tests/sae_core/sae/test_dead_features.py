from __future__ import annotations

import pytest

from sae_core.sae.dead_features import dead_feature_risks


def kinds(**found) -> list[str]:
    values = {"gamma": 1.0, "n_dead": 0, "n_dead_before": 0, "n_features": 1000}
    return [risk.kind for risk in dead_feature_risks(**values | found)]


@pytest.mark.parametrize(
    ("n_dead", "before", "warned"),
    [(20, 0, False), (21, 0, True), (21, 21, False), (400, 399, True), (400, 401, False)],
)
def test_dead_features_are_reported_above_two_percent_and_only_while_they_grow(n_dead, before, warned):
    assert kinds(n_dead=n_dead, n_dead_before=before) == (["dead_growth"] if warned else [])


def test_gamma_is_reported_above_ten():
    assert kinds(gamma=10.0) == []
    assert kinds(gamma=10.1) == ["high_gamma"]
    assert kinds(gamma=11.0, n_dead=30) == ["dead_growth", "high_gamma"]


def test_a_risk_holds_its_value_and_names_it_in_its_message():
    dead, gamma = dead_feature_risks(gamma=12.34, n_dead=50, n_dead_before=10, n_features=1000)
    assert dead.value == 0.05
    assert "50 of 1000 features (5.0 %)" in dead.message
    assert "learning rate" in dead.message
    assert gamma.value == 12.34
    assert "12.3" in gamma.message
