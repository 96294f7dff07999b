from __future__ import annotations

import pytest
import torch

from sae_core.errors import ConfigError, TrainingError
from sae_core.sae import ARCHITECTURES, Normaliser, SAEConfig, Sweep, TrainConfig, Trainer


@pytest.fixture
def made(synthetic):
    normaliser = Normaliser.fit([synthetic.sample(1000, 1)])

    def make(arch: str = "batchtopk", *, seed: int = 0, n_steps: int = 12, **options) -> Trainer:
        config = SAEConfig(d_model=32, n_features=64, k=3, arch=arch, **options)
        return Trainer(config, TrainConfig(n_steps=n_steps, batch_size=128, seed=seed), normaliser)

    return make


def assert_same(a: Trainer, b: Trainer) -> None:
    one, other = a.state_dict(), b.state_dict()
    assert one.meta == other.meta
    assert all(torch.equal(value, other.tensors[name]) for name, value in one.tensors.items())


def test_a_sweep_on_one_read_of_the_stream_equals_its_solo_runs_bit_for_bit(made, synthetic):
    kinds = [{"arch": arch} for arch in ARCHITECTURES] + [{"seed": 4}, {"arch": "standard", "l1_coefficient": 0.3}]
    sweep, batches = Sweep([made(**kind) for kind in kinds]), [synthetic.sample(128, seed) for seed in range(12)]
    together = [sweep.step(x) for x in batches]
    held_out = [synthetic.sample(500, 99)]
    finished = sweep.finish(iter(held_out))
    for place, kind in enumerate(kinds):
        solo = made(**kind)
        assert [solo.step(x) for x in batches] == [metrics[place] for metrics in together]
        assert_same(solo, sweep.trainers[place])
        alone = solo.finish(held_out).state_dict()
        assert all(torch.equal(value, finished[place].state_dict()[name]) for name, value in alone.items())


def test_one_that_diverges_is_set_aside_at_its_last_good_step_and_the_others_go_on(made, synthetic, monkeypatch):
    sweep = Sweep([made(seed=0), made(seed=1)])
    batches = [synthetic.sample(128, seed) for seed in range(6)]
    for x in batches[:3]:
        sweep.step(x)
    with torch.no_grad():
        sweep.trainers[0].sae.b_dec[0] = float("inf")
    for x in batches[3:]:
        first, second = sweep.step(x)
        assert first is None
        assert second is not None
    assert "the loss of step 4 is inf" in str(sweep.stopped[0])
    assert sweep.trainers[0].n_steps_done == 3
    solo = made(seed=1)
    for x in batches:
        solo.step(x)
    assert_same(solo, sweep.trainers[1])


def test_a_batch_that_stops_every_trainer_is_an_error_that_names_them(made, synthetic):
    sweep, x = Sweep([made(), made("jumprelu")]), synthetic.sample(128, 0)
    x[0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"trainer 0: .*; trainer 1: "):
        sweep.step(x)


def test_a_batch_of_another_width_changes_no_trainer(made, synthetic):
    sweep = Sweep([made(), made(seed=1)])
    with pytest.raises(ConfigError, match="d_model = 31"):
        sweep.step(torch.zeros(4, 31))
    assert [trainer.n_steps_done for trainer in sweep.trainers] == [0, 0]
    sweep.step(synthetic.sample(128, 0))


def test_a_sweep_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="trainers"):
        Sweep([])
