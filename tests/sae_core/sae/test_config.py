from __future__ import annotations

from itertools import pairwise

import pytest

from sae_core.errors import ConfigError
from sae_core.sae import SAEConfig, TrainConfig


@pytest.mark.parametrize("k", [0, -1, 9])
def test_a_wrong_k_is_refused_with_the_rule_and_the_value(k):
    with pytest.raises(ConfigError, match=f"k = {k} is not allowed: 1 <= k <= n_features, and n_features is 8"):
        SAEConfig(d_model=4, n_features=8, k=k)


@pytest.mark.parametrize(
    ("field", "value"),
    [("d_model", 0), ("n_features", 0), ("k_aux", 0), ("aux_coefficient", -1.0), ("aux_coefficient", float("nan"))],
)
def test_other_wrong_values_of_an_autoencoder_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=f"{field} = {value}"):
        SAEConfig(**{"d_model": 4, "n_features": 8, "k": 1, field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_steps", 0),
        ("batch_size", 0),
        ("lr", 0.0),
        ("warmup_fraction", 1.5),
        ("decay_fraction", -0.1),
        ("dead_window_tokens", 0),
        ("theta_decay", 1.0),
    ],
)
def test_wrong_values_of_a_training_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=f"{field} = {value}"):
        TrainConfig(**{"n_steps": 10, field: value})


def test_warm_up_and_decay_that_overlap_are_refused():
    with pytest.raises(ConfigError, match=r"warmup \+ decay = 1.1"):
        TrainConfig(n_steps=10, warmup_fraction=0.6, decay_fraction=0.5)


def test_a_config_survives_json_and_an_unknown_key_is_an_error():
    config = SAEConfig(d_model=4, n_features=8, k=2, arch="topk")
    assert SAEConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match=r"unknown \['kk'\].*its fields are d_model"):
        SAEConfig.from_dict({**config.to_dict(), "kk": 3})
    with pytest.raises(ConfigError, match=r"missing \['n_features'\]"):
        SAEConfig.from_dict({"d_model": 4, "k": 2})


def test_the_rate_rises_to_its_peak_stays_and_falls_towards_zero():
    config = TrainConfig(n_steps=100, lr=1.0, warmup_fraction=0.1, decay_fraction=0.2)
    rates = [config.lr_at(step, 8) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:81] == [1.0] * 72
    assert rates[99] == pytest.approx(0.05)
    assert all(b < a for a, b in pairwise(rates[80:]))


def test_the_default_rate_follows_the_square_root_of_the_width_from_1024_features_on():
    config = TrainConfig(n_steps=1)
    assert [config.peak_lr(n) for n in (64, 1024, 4096, 2**14)] == pytest.approx([5e-3, 5e-3, 2.5e-3, 1.25e-3])
    assert TrainConfig(n_steps=1, lr=0.1).peak_lr(4096) == 0.1


def test_the_dead_window_scales_with_the_run_and_is_bounded():
    assert TrainConfig(n_steps=2000, batch_size=1000).dead_window == 100_000
    assert TrainConfig(n_steps=1, batch_size=1000).dead_window == 1000
    assert TrainConfig(n_steps=10**6, batch_size=1000).dead_window == 10_000_000
    assert TrainConfig(n_steps=10, dead_window_tokens=7).dead_window == 7
