from __future__ import annotations

import pytest
import torch

from sae_core.errors import ConfigError
from sae_core.steering import matched_features, random_direction

GENERATOR = torch.Generator().manual_seed(0)
DENSITY = 10 ** (-4 * torch.rand(1000, generator=GENERATOR, dtype=torch.float64))
DENSITY[::10] = 0.0  # dead


@pytest.fixture
def targets() -> list[int]:
    alive = (DENSITY > 0).nonzero().squeeze(1)
    return alive[torch.randperm(len(alive), generator=torch.Generator().manual_seed(1))[:20]].tolist()


def test_matched_features_fire_as_often_as_their_targets(targets):
    picks = matched_features(targets, DENSITY, seed=0)
    ratio = DENSITY[picks] / DENSITY[targets]
    assert float(ratio.log10().abs().max()) < 0.1  # unmatched ones differ by 1.3 decades on average


def test_matched_features_exclude_targets_dead_ones_and_those_named_and_are_distinct(targets):
    for seed in range(20):
        banned = matched_features(targets, DENSITY, seed=100 + seed)
        picks = matched_features(targets, DENSITY, seed=seed, exclude=banned)
        assert not set(picks) & {*targets, *banned}
        assert bool((DENSITY[picks] > 0).all())
        assert len(set(picks)) == len(targets)


def test_the_seed_decides_and_nothing_else_does(targets):
    before = torch.get_rng_state()
    first = matched_features(targets, DENSITY, seed=3)
    assert first == matched_features(targets, DENSITY, seed=3)
    assert first != matched_features(targets, DENSITY, seed=4)
    assert first == matched_features(targets[::-1], DENSITY, seed=3)[::-1]
    assert torch.equal(before, torch.get_rng_state())


def test_every_near_feature_is_drawn_equally_often():
    density = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.001])
    counts = [0] * 5
    for seed in range(600):
        counts[matched_features([0], density, seed=seed, n_nearest=3)[0]] += 1
    assert counts[0] == counts[4] == 0
    assert all(150 < count < 250 for count in counts[1:4])


def test_the_density_given_is_not_written_to(targets):
    before = DENSITY.clone()
    matched_features(targets, DENSITY, seed=0)
    assert torch.equal(before, DENSITY)


def test_targets_that_do_not_exist_never_fire_or_are_too_many_are_refused():
    density = torch.tensor([0.5, 0.5, 0.5, 0.0])
    with pytest.raises(ConfigError, match=r"targets = \[4\].*0 to 3"):
        matched_features([4], density, seed=0)
    with pytest.raises(ConfigError, match=r"targets = \[\]"):
        matched_features([], density, seed=0)
    with pytest.raises(ConfigError, match=r"targets \[3\]"):
        matched_features([3], density, seed=0)
    with pytest.raises(ConfigError, match=r"^2 targets .*\b1\b"):
        matched_features([0, 1], density, seed=0)


def test_a_random_direction_has_length_one_and_follows_its_seed():
    direction = random_direction(128, seed=0)
    assert float(direction.norm()) == pytest.approx(1.0, rel=1e-6)
    assert torch.equal(direction, random_direction(128, seed=0))
    assert abs(float(direction @ random_direction(128, seed=1))) < 0.4
