from __future__ import annotations

import pytest
import torch

from sae_core.errors import CheckpointError, ConfigError, TrainingError
from sae_core.sae import (
    ARCHITECTURES,
    Normaliser,
    SAEConfig,
    TrainConfig,
    Trainer,
    TrainerState,
    evaluate,
    load_training,
    save_training,
)
from sae_core.sae.kernels import REFERENCE

CONFIG = SAEConfig(d_model=32, n_features=64, k=3)


def trainer(planted, *, config: SAEConfig = CONFIG, n_steps: int = 40, kernel=None, **options) -> Trainer:
    normaliser = Normaliser.fit([planted.sample(1000, 1)])
    return Trainer(config, TrainConfig(n_steps=n_steps, batch_size=128, **options), normaliser, kernel=kernel)


def assert_same_state(a: TrainerState, b: TrainerState) -> None:
    assert a.meta == b.meta
    assert set(a.tensors) == set(b.tensors)
    for name, value in a.tensors.items():
        assert torch.equal(value, b.tensors[name]), name


@pytest.mark.parametrize("arch", ["batchtopk", "topk", "jumprelu"])
def test_a_planted_dictionary_is_recovered(planted, arch):
    config = SAEConfig(d_model=32, n_features=64, k=3, arch=arch)
    learner = trainer(planted, config=config, n_steps=500)
    data = planted.sample(20_000, 2)
    for step in range(500):
        metrics = learner.step(data[128 * step % 19_000 :][:512])
    sae = learner.finish([planted.sample(4000, 3)])
    cosine = (planted.directions @ sae.W_dec.T).amax(dim=1)
    assert cosine.mean() >= 0.95
    assert cosine.min() >= 0.8
    found = evaluate(sae, [planted.sample(4000, 3)])
    assert found.fvu < {"batchtopk": 0.12, "topk": 0.18, "jumprelu": 0.12}[arch]
    assert found.l0 == pytest.approx(3, rel=0.05 if arch == "topk" else 0.02)
    assert found.dead_fraction == 0
    assert metrics.loss == pytest.approx(found.fvu, rel=0.15)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_decoder_rows_have_unit_norm_after_every_step_and_move(planted, arch):
    learner = trainer(planted, config=SAEConfig(d_model=32, n_features=64, k=3, arch=arch))
    start = learner.sae.W_dec.detach().clone()
    for seed in range(5):
        learner.step(planted.sample(128, seed))
        torch.testing.assert_close(learner.sae.W_dec.norm(dim=1).detach(), torch.ones(64))
    assert not torch.allclose(start, learner.sae.W_dec)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_sparse_kernel_trains_as_the_dense_one(planted, arch):
    fast, dense = (
        trainer(planted, config=of(arch), dead_window_tokens=256, kernel=kernel) for kernel in (None, REFERENCE)
    )
    for seed in range(10):
        x = planted.sample(128, seed)
        a, b = fast.step(x), dense.step(x)
        assert a.n_dead == b.n_dead
        assert a.loss == pytest.approx(b.loss, rel=1e-4)


def of(arch: str, **options) -> SAEConfig:
    return SAEConfig(d_model=32, n_features=64, k=3, arch=arch, **options)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(planted, arch, tmp_path):
    batches = [planted.sample(128, seed) for seed in range(20)]
    undisturbed = trainer(planted, config=of(arch), dead_window_tokens=300)
    expected = [undisturbed.step(x) for x in batches]
    first = trainer(planted, config=of(arch), dead_window_tokens=300)
    for x in batches[:7]:
        first.step(x)
    save_training(first.state_dict(), tmp_path)
    resumed = Trainer.from_state(load_training(tmp_path)[0])
    assert [resumed.step(x) for x in batches[7:]] == expected[7:]
    assert_same_state(resumed.state_dict(), undisturbed.state_dict())
    assert resumed.diagnose() == undisturbed.diagnose()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_step_moves_all_that_is_learned_and_nothing_else(planted, arch):
    learner = trainer(planted, config=of(arch))
    before = learner.state_dict().tensors
    for seed in range(3):
        learner.step(planted.sample(128, seed))
    after = learner.state_dict().tensors
    names = {"sae.theta": "theta", "r_mag": "r_mag"}
    for name, kind in names.items():
        learned = kind in learner.sae.architecture.learned
        running = name == "sae.theta" and learner.sae.architecture.calibrated
        assert torch.equal(before[name], after[name]) == (not learned and not running), name
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert not torch.equal(before[f"sae.{name}"], after[f"sae.{name}"]), name
    assert torch.equal(before["sae.mu"], after["sae.mu"])


def test_jumprelu_trains_towards_k_and_its_thresholds_differ_and_are_never_negative(planted):
    learner = trainer(planted, config=of("jumprelu"), n_steps=150)
    with torch.no_grad():
        learner.sae.theta.fill_(0.0)
    l0 = []
    for seed in range(150):
        l0.append(learner.step(planted.sample(128, seed)).l0)
        assert learner.sae.theta.min() >= 0
    assert l0[0] > 20
    assert 2.5 < sum(l0[-10:]) / 10 < 5
    assert learner.sae.theta.std() > 1e-3
    sae = learner.finish([planted.sample(3000, 99)])
    assert sae.encode(planted.sample(3000, 99)).nnz / 3000 == pytest.approx(3, rel=0.02)
    ratio = sae.theta / learner.sae.theta
    torch.testing.assert_close(ratio, ratio.mean().expand(64), rtol=1e-3, atol=0)


@pytest.mark.parametrize("arch", ["standard", "gated"])
def test_a_larger_l1_coefficient_makes_a_sparser_code(planted, arch):
    data, l0 = [planted.sample(256, seed) for seed in range(120)], []
    for coefficient in (0.02, 0.1, 0.5):
        learner = trainer(planted, config=of(arch, l1_coefficient=coefficient), n_steps=120)
        for x in data:
            metrics = learner.step(x)
        sae = learner.finish([])
        l0.append(sae.encode(data[0]).nnz / 256)
        assert l0[-1] == pytest.approx(metrics.l0, rel=0.3)
    assert l0[0] > 1.3 * l0[1] > 1.69 * l0[2]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_batch_with_fewer_positive_entries_than_k_or_none_at_all_is_a_step(planted, arch):
    learner = trainer(planted, config=of(arch))
    with torch.no_grad():
        learner.sae.b_enc[1:] = -100.0
    assert learner.step(planted.sample(128, 0)).l0 <= 1
    with torch.no_grad():
        learner.sae.b_enc.fill_(-100.0)
    before = learner.sae.b_dec.detach().clone()
    metrics = learner.step(planted.sample(128, 1))
    assert metrics.l0 == 0
    assert metrics.mse == pytest.approx(1.0, rel=0.2)
    assert not torch.equal(before, learner.sae.b_dec)
    assert learner.finish([planted.sample(128, 2)]).encode(planted.sample(128, 3)).nnz == 0


def test_places_of_value_zero_are_neither_firings_nor_counted_in_l0(planted):
    learner = trainer(planted, config=of("gated"), dead_window_tokens=100)
    with torch.no_grad():
        learner.sae.b_enc[:32] = -20.0
        learner.sae.theta[:32] = -100.0
    learner.step(planted.sample(128, 0))
    assert learner.tokens_since_fired[:32].tolist() == [128] * 32
    metrics = learner.step(planted.sample(128, 1))
    assert metrics.n_dead == 32
    assert metrics.l0 < 32


def test_a_saved_state_is_a_copy(planted):
    learner = trainer(planted)
    learner.step(planted.sample(128, 0))
    state = learner.state_dict()
    kept = {name: value.clone() for name, value in state.tensors.items()}
    learner.step(planted.sample(128, 1))
    assert all(torch.equal(kept[name], value) for name, value in state.tensors.items())


def test_a_state_taken_before_the_first_step_resumes(planted):
    learner = trainer(planted)
    resumed = Trainer.from_state(learner.state_dict())
    x = planted.sample(128, 0)
    assert resumed.step(x) == learner.step(x)


def test_a_state_of_another_configuration_is_refused_by_field(planted):
    state = trainer(planted).state_dict()
    other = trainer(planted, config=SAEConfig(d_model=32, n_features=64, k=4))
    with pytest.raises(CheckpointError, match=r"another sae_config: k \(4 here, 3 saved\)"):
        other.load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"another train_config: seed \(5 here, 0 saved\)"):
        trainer(planted, seed=5).load_state_dict(state)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_anything_has_changed(planted, arch, bad):
    learner = trainer(planted, config=of(arch))
    learner.step(planted.sample(128, 0))
    before = learner.state_dict()
    x = planted.sample(128, 1)
    x[3, 4] = bad
    with pytest.raises(TrainingError, match=r"the loss of step 2 is (nan|inf): the batch holds 1 values"):
        learner.step(x)
    assert_same_state(learner.state_dict(), before)
    learner.step(planted.sample(128, 1))


def test_a_gradient_that_is_not_finite_stops_before_anything_has_changed(planted, monkeypatch):
    learner = trainer(planted)
    learner.step(planted.sample(128, 0))
    before = learner.state_dict()
    original = torch.autograd.backward

    def overflow(loss):
        original(loss)
        learner.sae.W_enc.grad[5, 7] = float("inf")

    monkeypatch.setattr(torch.autograd, "backward", overflow)
    with pytest.raises(TrainingError, match=r"the loss of step 2 is \d.*, its gradient inf: the batch holds 0 values"):
        learner.step(planted.sample(128, 1))
    monkeypatch.undo()
    assert_same_state(learner.state_dict(), before)
    learner.step(planted.sample(128, 1))


def test_dead_features_that_grow_in_number_are_reported_and_those_that_shrink_are_not(planted):
    learner = trainer(planted, dead_window_tokens=256)
    assert learner.diagnose() == []
    with torch.no_grad():
        learner.sae.b_enc[:5] = -10.0
    for seed in range(2):
        learner.step(planted.sample(128, seed))
    (found,) = learner.diagnose()
    assert found.kind == "dead_growth"
    assert found.value == 5 / 64
    assert "5 of 64 features (7.8 %)" in found.message
    assert "up from 0" in found.message
    for seed in range(2):
        learner.step(planted.sample(128, seed))
    assert learner.diagnose() == []


def test_a_mean_that_is_long_against_the_spread_is_reported(planted):
    normaliser = Normaliser.fit([planted.sample(1000, 1) + 100.0])
    (found,) = Trainer(CONFIG, TrainConfig(n_steps=1), normaliser).diagnose()
    assert found.kind == "high_gamma"
    assert found.value == pytest.approx(normaliser.gamma, rel=1e-5)


def test_training_does_not_go_past_its_last_step(planted):
    learner = trainer(planted, n_steps=1)
    learner.step(planted.sample(128, 0))
    with pytest.raises(TrainingError, match="all 1 steps are done"):
        learner.step(planted.sample(128, 1))


def test_a_batch_of_another_width_or_of_no_token_is_refused(planted):
    learner = trainer(planted)
    with pytest.raises(ConfigError, match="d_model = 31"):
        learner.step(torch.zeros(4, 31))
    with pytest.raises(ConfigError, match="0 tokens"):
        learner.step(torch.zeros(0, 32))
    with pytest.raises(ConfigError, match=r"fitted on d_model = 31, the autoencoder has d_model = 32"):
        Trainer(CONFIG, TrainConfig(n_steps=1), Normaliser.fit([torch.randn(9, 31)]))


def test_dead_features_are_those_silent_for_the_window_and_firing_revives_them(planted):
    learner = trainer(planted, dead_window_tokens=256)
    with torch.no_grad():
        learner.sae.b_enc[[3, 8]] = -10.0
    n_dead = [learner.step(planted.sample(128, seed)).n_dead for seed in range(3)]
    assert n_dead == [0, 0, 2]
    assert learner.tokens_since_fired[[3, 8]].tolist() == [384, 384]
    with torch.no_grad():
        learner.sae.b_enc[3] = 10.0
    learner.step(planted.sample(128, 4))
    assert learner.tokens_since_fired[[3, 8]].tolist() == [0, 512]


def test_auxk_brings_back_features_that_are_too_small_ever_to_be_chosen(planted):
    alive = {}
    for coefficient in (0.0, 1 / 32):
        config = SAEConfig(d_model=32, n_features=64, k=3, aux_coefficient=coefficient)
        learner = trainer(planted, config=config, n_steps=200, dead_window_tokens=512)
        with torch.no_grad():
            learner.sae.W_enc[:32] *= 0.01
        for seed in range(200):
            learner.step(planted.sample(128, seed))
        alive[coefficient] = int((learner.tokens_since_fired[:32] < 2000).sum())
    assert alive == {0.0: 0, 1 / 32: 32}


def test_the_running_threshold_is_for_display_and_finish_replaces_it(planted):
    learner = trainer(planted)
    for seed in range(10):
        metrics = learner.step(planted.sample(128, seed))
    held_out = planted.sample(3000, 99)
    sae = learner.finish([held_out])
    assert metrics.theta == pytest.approx(learner.sae.theta[0].item())
    assert sae.encode(held_out).nnz / 3000 == pytest.approx(3, rel=0.02)
    assert sae.scale == 1.0


def test_finish_leaves_the_trainer_able_to_go_on(planted):
    learner = trainer(planted)
    learner.step(planted.sample(128, 0))
    before = learner.state_dict()
    learner.finish([planted.sample(500, 99)])
    assert_same_state(learner.state_dict(), before)


def test_training_uses_no_global_randomness(planted):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a = trainer(planted).step(planted.sample(128, 0))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    assert trainer(planted).step(planted.sample(128, 0)) == a


@pytest.mark.parametrize(
    "arch",
    ["batchtopk", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ARCHITECTURES if arch != "batchtopk")],
)
def test_ranking_in_bfloat16_changes_the_loss_of_a_whole_training_by_less_than_half_a_percent(planted, arch):
    data = planted.sample(20_000, 2)
    losses = {}
    for precision in ("f32", "bf16"):
        config = SAEConfig(d_model=32, n_features=64, k=3, arch=arch)
        learner = trainer(planted, config=config, n_steps=500, encoder_precision=precision)
        mse = [learner.step(data[128 * step % 19_000 :][:512]).mse for step in range(500)]
        losses[precision] = sum(mse[-50:]) / 50
    assert losses["bf16"] == pytest.approx(losses["f32"], rel=0.005)
    assert learner.sae.W_enc.dtype == torch.float32


def test_a_precision_that_is_not_known_is_refused():
    with pytest.raises(ConfigError, match="encoder_precision = 'f16' is not allowed: one of f32, bf16"):
        TrainConfig(n_steps=1, encoder_precision="f16")
