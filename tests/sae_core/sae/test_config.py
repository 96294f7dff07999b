from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest

from sae_core.errors import ConfigError
from sae_core.sae import SAEConfig, TrainConfig


@pytest.mark.parametrize("k", [0, -1, 9])
def test_a_wrong_k_is_refused_with_the_rule_and_the_value(k):
    with pytest.raises(ConfigError, match=rf"k = {k}\b.*\b8\b"):
        SAEConfig(d_model=4, n_features=8, k=k)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("d_model", 0),
        ("n_features", 0),
        ("k_aux", 0),
        ("aux_coefficient", -1.0),
        ("aux_coefficient", float("nan")),
        ("l1_coefficient", -0.1),
        ("l0_coefficient", float("inf")),
        ("orthogonality_coefficient", -0.5),
        ("bandwidth", 0.0),
    ],
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
        ("sparsity_warmup_fraction", 1.1),
        ("dead_window_tokens", 0),
        ("theta_decay", 1.0),
    ],
)
def test_wrong_values_of_a_training_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=f"{field} = {value}"):
        TrainConfig(**{"n_steps": 10, field: value})


def test_a_number_that_is_not_whole_is_refused_by_name():
    # careful: in this process the shape checker of the tests would refuse the type first
    code = """
from sae_core.errors import ConfigError
from sae_core.sae.config import SAEConfig
for options in ({"k": 2.5}, {"k": True}, {"n_features": 8.0}, {"d_model": "4"}, {"k_aux": 1.5}):
    try:
        SAEConfig(**{"d_model": 4, "n_features": 8, "k": 1} | options)
    except ConfigError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    messages = done.stdout.splitlines()
    rule = "k is a whole number, 1 <= k <= n_features, and n_features is 8"
    assert messages[0].startswith(f"k = 2.5 is not allowed: {rule}")
    assert messages[1].startswith(f"k = True is not allowed: {rule}")
    assert messages[2].startswith("n_features = 8.0 is not allowed: n_features is a whole number >= 1")
    assert messages[3].startswith("d_model = '4' is not allowed")
    assert messages[4].startswith("k_aux = 1.5 is not allowed")


@pytest.mark.parametrize("groups", [(0.5, 0.4), (0.5, 0.6), (1.5, -0.5), (0.0, 1.0), ()])
def test_groups_that_are_no_shares_of_one_whole_are_refused_with_their_sum(groups):
    with pytest.raises(ConfigError, match=rf"groups = .*\b{sum(groups):g}"):
        SAEConfig(d_model=4, n_features=8, k=1, groups=groups)


def test_groups_end_at_shares_of_the_features_and_those_of_no_feature_are_left_out():
    def stops(n_features: int, **options) -> tuple[int, ...]:
        return SAEConfig(d_model=4, n_features=n_features, k=1, **options).group_stops

    assert stops(1024) == (64, 128, 256, 512, 1024)
    assert stops(8) == (1, 2, 4, 8)
    assert stops(1) == (1,)
    assert stops(10, groups=(1 / 3, 1 / 3, 1 / 3)) == (3, 7, 10)


def test_warm_up_and_decay_that_overlap_are_refused():
    with pytest.raises(ConfigError, match=r"warmup \+ decay = 1.1"):
        TrainConfig(n_steps=10, warmup_fraction=0.6, decay_fraction=0.5)


def test_a_config_survives_json_and_an_unknown_key_is_an_error():
    config = SAEConfig(d_model=4, n_features=8, k=2, arch="topk")
    assert SAEConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match=r"\['kk'\].*d_model"):
        SAEConfig.from_dict({**config.to_dict(), "kk": 3})
    with pytest.raises(ConfigError, match=r"\['n_features'\]"):
        SAEConfig.from_dict({"d_model": 4, "k": 2})


def test_the_rate_rises_to_its_peak_stays_and_falls_towards_zero():
    config = TrainConfig(n_steps=100, lr=1.0, warmup_fraction=0.1, decay_fraction=0.2)
    rates = [config.lr_at(step, 8) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:81] == [1.0] * 72
    assert rates[99] == pytest.approx(0.05)
    assert all(b < a for a, b in pairwise(rates[80:]))


def test_the_weight_of_sparsity_rises_to_one_and_stays():
    config = TrainConfig(n_steps=100, sparsity_warmup_fraction=0.1)
    factors = [config.sparsity_at(step) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert factors[10:] == [1.0] * 90
    assert TrainConfig(n_steps=100, sparsity_warmup_fraction=0.0).sparsity_at(0) == 1.0


def test_the_default_rate_follows_the_square_root_of_the_width_from_1024_features_on():
    config = TrainConfig(n_steps=1)
    assert [config.peak_lr(n) for n in (64, 1024, 4096, 2**14)] == pytest.approx([5e-3, 5e-3, 2.5e-3, 1.25e-3])
    assert TrainConfig(n_steps=1, lr=0.1).peak_lr(4096) == 0.1


def test_the_dead_window_scales_with_the_run_and_is_bounded():
    assert TrainConfig(n_steps=2000, batch_size=1000).dead_window == 100_000
    assert TrainConfig(n_steps=1, batch_size=1000).dead_window == 1000
    assert TrainConfig(n_steps=10**6, batch_size=1000).dead_window == 10_000_000
    assert TrainConfig(n_steps=10, dead_window_tokens=7).dead_window == 7
