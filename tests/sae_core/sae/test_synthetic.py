from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from sae_core.errors import ConfigError
from sae_core.sae import (
    Normaliser,
    SAEConfig,
    SparseAutoencoder,
    SyntheticDictionary,
    TrainConfig,
    Trainer,
    mean_max_cosine,
)


def test_directions_are_unit_and_tokens_are_sums_of_them_around_the_mean():
    synthetic = SyntheticDictionary(n_features=40, d_model=20, l0=4.0, spread=10.0, noise=0.0)
    torch.testing.assert_close(synthetic.directions.norm(dim=1), torch.ones(40))
    x = synthetic.sample(20_000, 1) - synthetic.mean
    expected = (1.5 * synthetic.density) @ synthetic.directions  # a length is 0.5 plus an exponential of mean 1
    torch.testing.assert_close(x.mean(dim=0), expected, atol=0.03, rtol=0)


def test_densities_span_the_spread_and_their_sum_is_l0():
    density = SyntheticDictionary(n_features=5000, d_model=8, l0=16.0, spread=100.0).density
    assert density.sum() == pytest.approx(16, rel=1e-5)
    assert density.max() / density.min() == pytest.approx(100, rel=0.02)


def test_a_seed_gives_the_same_tokens_and_the_global_generator_is_untouched():
    before = torch.get_rng_state()
    synthetic = SyntheticDictionary(n_features=40, d_model=20, l0=4.0, spread=10.0)
    assert torch.equal(synthetic.sample(10, 3), synthetic.sample(10, 3))
    assert not torch.equal(synthetic.sample(10, 3), synthetic.sample(10, 4))
    assert torch.equal(before, torch.get_rng_state())


def test_an_l0_that_needs_a_feature_on_more_than_every_token_is_refused():
    with pytest.raises(ConfigError, match=r"l0 = 16\.0 .*\b20 "):
        SyntheticDictionary(n_features=20, d_model=8)


@pytest.mark.parametrize("seed", [0, 1])
def test_an_autoencoder_of_the_same_seed_does_not_start_at_the_truth(seed):
    synthetic = SyntheticDictionary(n_features=64, d_model=32, l0=4.0, seed=seed)
    config = SAEConfig(d_model=32, n_features=64, k=4)
    sae = SparseAutoencoder(config, generator=torch.Generator().manual_seed(seed))
    other = SparseAutoencoder(config, generator=torch.Generator().manual_seed(seed + 7))
    started, by_chance = (mean_max_cosine(synthetic.directions, one.W_dec.detach()) for one in (sae, other))
    assert started == pytest.approx(by_chance, abs=0.05)


def test_mean_max_cosine_is_the_mean_of_the_largest_cosines():
    learned = functional.normalize(torch.tensor([[1.0, 1, 0], [0, 0, 1], [1, 0, 0]]), dim=1)
    assert mean_max_cosine(torch.eye(3)[:2], learned) == pytest.approx((1 + 0.5**0.5) / 2)


def recovered(arch: str, *, n_features: int, d_model: int, l0: float, width: int, n_steps: int) -> float:
    synthetic = SyntheticDictionary(n_features=n_features, d_model=d_model, l0=l0)
    config = SAEConfig(d_model=d_model, n_features=width, k=round(l0), arch=arch)
    pool = synthetic.sample(2**16, 1)
    trainer = Trainer(config, TrainConfig(n_steps=n_steps, batch_size=1024), Normaliser.fit([pool[:8192]]))
    for step in range(n_steps):
        start = 1024 * step % len(pool)
        trainer.step(pool[start : start + 1024])
    return mean_max_cosine(synthetic.directions, trainer.finish([synthetic.sample(4096, 2)]).W_dec)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["batchtopk", "matryoshka"])
def test_directions_superposed_twice_are_recovered(arch):
    assert recovered(arch, n_features=128, d_model=64, l0=6.0, width=256, n_steps=800) >= 0.88


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["batchtopk", "matryoshka"])
def test_512_directions_in_256_dimensions_are_recovered(arch):
    assert recovered(arch, n_features=512, d_model=256, l0=16.0, width=1024, n_steps=1500) >= 0.95
