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
from sae_core.sae.kernels import DENSE

CONFIG = SAEConfig(d_model=32, n_features=64, k=3)


def trainer(synthetic, *, config: SAEConfig = CONFIG, n_steps: int = 40, kernel=None, **options) -> Trainer:
    normaliser = Normaliser.fit([synthetic.sample(1000, 1)])
    return Trainer(config, TrainConfig(n_steps=n_steps, batch_size=128, **options), normaliser, kernel=kernel)


def assert_same_state(a: TrainerState, b: TrainerState) -> None:
    assert a.meta == b.meta
    assert set(a.tensors) == set(b.tensors)
    for name, value in a.tensors.items():
        assert torch.equal(value, b.tensors[name]), name


@pytest.mark.parametrize(
    "arch", ["batchtopk", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("topk", "jumprelu"))]
)
def test_a_synthetic_dictionary_is_recovered(synthetic, arch):
    # twice as many features as there are; with as many, some rows stay sums of two (mean cosine .91 to .98)
    config = SAEConfig(d_model=32, n_features=128, k=3, arch=arch)
    learner = trainer(synthetic, config=config, n_steps=1500)
    data = synthetic.sample(20_000, 2)
    for step in range(1500):
        metrics = learner.step(data[128 * step % 19_000 :][:512])
    sae = learner.finish([synthetic.sample(4000, 3)])
    cosine = (synthetic.directions @ sae.W_dec.T).amax(dim=1)
    assert cosine.mean() >= 0.98
    assert cosine.min() >= 0.9
    found = evaluate(sae, [synthetic.sample(4000, 3)])
    assert found.fvu < {"batchtopk": 0.12, "topk": 0.18, "jumprelu": 0.12}[arch]
    assert found.l0 == pytest.approx(3, rel=0.05 if arch == "topk" else 0.02)
    assert (1 - found.dead_fraction) * 128 >= 64
    assert metrics.mse == pytest.approx(found.fvu, rel=0.15)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_decoder_rows_have_unit_norm_after_every_step_and_move(synthetic, arch):
    learner = trainer(synthetic, config=SAEConfig(d_model=32, n_features=64, k=3, arch=arch))
    start = learner.sae.W_dec.detach().clone()
    for seed in range(5):
        learner.step(synthetic.sample(128, seed))
        torch.testing.assert_close(learner.sae.W_dec.norm(dim=1).detach(), torch.ones(64))
    assert not torch.allclose(start, learner.sae.W_dec)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_sparse_kernel_trains_as_the_dense_one(synthetic, arch):
    fast, dense = (
        trainer(synthetic, config=of(arch), dead_window_tokens=256, kernel=kernel) for kernel in (None, DENSE)
    )
    for seed in range(10):
        x = synthetic.sample(128, seed)
        a, b = fast.step(x), dense.step(x)
        assert a.n_dead == b.n_dead
        assert a.loss == pytest.approx(b.loss, rel=1e-4)


def of(arch: str, **options) -> SAEConfig:
    return SAEConfig(d_model=32, n_features=64, k=3, arch=arch, **options)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(synthetic, arch, tmp_path):
    batches = [synthetic.sample(128, seed) for seed in range(20)]
    undisturbed = trainer(synthetic, config=of(arch), dead_window_tokens=300)
    expected = [undisturbed.step(x) for x in batches]
    first = trainer(synthetic, config=of(arch), dead_window_tokens=300)
    for x in batches[:7]:
        first.step(x)
    save_training(first.state_dict(), tmp_path)
    resumed = trainer(synthetic, config=of(arch), dead_window_tokens=300)
    resumed.load_state_dict(load_training(tmp_path)[0])
    assert [resumed.step(x) for x in batches[7:]] == expected[7:]
    assert_same_state(resumed.state_dict(), undisturbed.state_dict())
    assert resumed.dead_feature_risks() == undisturbed.dead_feature_risks()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_step_moves_all_that_is_learned_and_nothing_else(synthetic, arch):
    learner = trainer(synthetic, config=of(arch))
    before = learner.state_dict().tensors
    for seed in range(3):
        learner.step(synthetic.sample(128, seed))
    after = learner.state_dict().tensors
    names = {"sae.theta": "theta", "r_mag": "r_mag"}
    for name, kind in names.items():
        learned = kind in learner.sae.architecture.learned
        running = name == "sae.theta" and learner.sae.architecture.calibrated
        assert torch.equal(before[name], after[name]) == (not learned and not running), name
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert not torch.equal(before[f"sae.{name}"], after[f"sae.{name}"]), name
    assert torch.equal(before["sae.mu"], after["sae.mu"])


def test_jumprelu_trains_towards_k_and_its_thresholds_differ_and_are_never_negative(synthetic):
    learner = trainer(synthetic, config=of("jumprelu"), n_steps=150)
    with torch.no_grad():
        learner.sae.theta.fill_(0.0)
    l0 = []
    for seed in range(150):
        l0.append(learner.step(synthetic.sample(128, seed)).l0)
        assert learner.sae.theta.min() >= 0
    assert l0[0] > 20
    assert 2.5 < sum(l0[-10:]) / 10 < 5
    assert learner.sae.theta.std() > 1e-3
    sae = learner.finish([synthetic.sample(3000, 99)])
    assert sae.encode(synthetic.sample(3000, 99)).nnz / 3000 == pytest.approx(3, rel=0.02)
    ratio = sae.theta / learner.sae.theta
    torch.testing.assert_close(ratio, ratio.mean().expand(64), rtol=1e-3, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["standard", "gated"])
def test_a_larger_l1_coefficient_makes_a_sparser_code(synthetic, arch):
    data, l0 = [synthetic.sample(256, seed) for seed in range(120)], []
    for coefficient in (0.02, 0.1, 0.5):
        learner = trainer(synthetic, config=of(arch, l1_coefficient=coefficient), n_steps=120)
        for x in data:
            metrics = learner.step(x)
        sae = learner.finish([])
        l0.append(sae.encode(data[0]).nnz / 256)
        assert l0[-1] == pytest.approx(metrics.l0, rel=0.3)
    assert l0[0] > 1.3 * l0[1] > 1.69 * l0[2]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_batch_with_fewer_positive_entries_than_k_or_none_at_all_is_a_step(synthetic, arch):
    learner = trainer(synthetic, config=of(arch))
    with torch.no_grad():
        learner.sae.b_enc[1:] = -100.0
    assert learner.step(synthetic.sample(128, 0)).l0 <= 1
    with torch.no_grad():
        learner.sae.b_enc.fill_(-100.0)
    before = learner.sae.b_dec.detach().clone()
    metrics = learner.step(synthetic.sample(128, 1))
    assert metrics.l0 == 0
    assert metrics.mse == pytest.approx(1.0, rel=0.2)
    assert not torch.equal(before, learner.sae.b_dec)
    assert learner.finish([synthetic.sample(128, 2)]).encode(synthetic.sample(128, 3)).nnz == 0


def test_places_of_value_zero_are_neither_firings_nor_counted_in_l0(synthetic):
    learner = trainer(synthetic, config=of("gated"), dead_window_tokens=100)
    with torch.no_grad():
        learner.sae.b_enc[:32] = -20.0
        learner.sae.theta[:32] = -100.0
    learner.step(synthetic.sample(128, 0))
    assert learner.tokens_since_fired[:32].tolist() == [128] * 32
    metrics = learner.step(synthetic.sample(128, 1))
    assert metrics.n_dead == 32
    assert metrics.l0 < 32


def test_a_saved_state_is_a_copy(synthetic):
    learner = trainer(synthetic)
    learner.step(synthetic.sample(128, 0))
    state = learner.state_dict()
    kept = {name: value.clone() for name, value in state.tensors.items()}
    learner.step(synthetic.sample(128, 1))
    assert all(torch.equal(kept[name], value) for name, value in state.tensors.items())


def test_a_state_taken_before_the_first_step_resumes_with_its_own_normaliser(synthetic):
    learner = trainer(synthetic)
    resumed = Trainer(CONFIG, learner.config, Normaliser.fit([torch.randn(9, 32)]))
    resumed.load_state_dict(learner.state_dict())
    x = synthetic.sample(128, 0)
    assert resumed.step(x) == learner.step(x)


def test_a_state_of_another_configuration_is_refused_by_field(synthetic):
    state = trainer(synthetic).state_dict()
    other = trainer(synthetic, config=SAEConfig(d_model=32, n_features=64, k=4))
    with pytest.raises(CheckpointError, match=r"sae_config: k \(4 .*3 "):
        other.load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"train_config: seed \(5 .*0 "):
        trainer(synthetic, seed=5).load_state_dict(state)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_anything_has_changed(synthetic, arch, bad):
    learner = trainer(synthetic, config=of(arch))
    learner.step(synthetic.sample(128, 0))
    before = learner.state_dict()
    x = synthetic.sample(128, 1)
    x[3, 4] = bad
    with pytest.raises(TrainingError, match=r"step 2 is (nan|inf).*\b1 values.*`scsae verify`"):
        learner.step(x)
    assert_same_state(learner.state_dict(), before)
    learner.step(synthetic.sample(128, 1))


def test_a_gradient_that_is_not_finite_stops_before_anything_has_changed(synthetic, monkeypatch):
    learner = trainer(synthetic)
    learner.step(synthetic.sample(128, 0))
    before = learner.state_dict()
    original = torch.autograd.backward

    def overflow(loss):
        original(loss)
        learner.sae.W_enc.grad[5, 7] = float("inf")

    monkeypatch.setattr(torch.autograd, "backward", overflow)
    with pytest.raises(TrainingError, match=r"step 2 is \d.*\binf.*\b0 values"):
        learner.step(synthetic.sample(128, 1))
    monkeypatch.undo()
    assert_same_state(learner.state_dict(), before)
    learner.step(synthetic.sample(128, 1))


def test_dead_features_that_grow_in_number_are_reported_and_those_that_shrink_are_not(synthetic):
    learner = trainer(synthetic, dead_window_tokens=256)
    assert learner.dead_feature_risks() == []
    with torch.no_grad():
        learner.sae.b_enc[:5] = -10.0
    for seed in range(2):
        learner.step(synthetic.sample(128, seed))
    (found,) = learner.dead_feature_risks()
    assert found.kind == "dead_growth"
    assert found.value == 5 / 64
    assert "5 of 64 features (7.8 %)" in found.message
    assert " 0. " in found.message
    for seed in range(2):
        learner.step(synthetic.sample(128, seed))
    assert learner.dead_feature_risks() == []


def test_a_mean_that_is_long_against_the_spread_is_reported(synthetic):
    normaliser = Normaliser.fit([synthetic.sample(1000, 1) + 100.0])
    (found,) = Trainer(CONFIG, TrainConfig(n_steps=1), normaliser).dead_feature_risks()
    assert found.kind == "high_gamma"
    assert found.value == pytest.approx(normaliser.gamma, rel=1e-5)


def test_training_does_not_go_past_its_last_step(synthetic):
    learner = trainer(synthetic, n_steps=1)
    learner.step(synthetic.sample(128, 0))
    with pytest.raises(TrainingError, match=r"all 1 steps .*finish\(\).*n_steps"):
        learner.step(synthetic.sample(128, 1))


def test_a_batch_of_another_width_or_of_no_token_is_refused(synthetic):
    learner = trainer(synthetic)
    with pytest.raises(ConfigError, match="d_model = 31"):
        learner.step(torch.zeros(4, 31))
    with pytest.raises(ConfigError, match=r"\b0 tokens"):
        learner.step(torch.zeros(0, 32))
    with pytest.raises(ConfigError, match=r"d_model = 31\b.*\b32\b"):
        Trainer(CONFIG, TrainConfig(n_steps=1), Normaliser.fit([torch.randn(9, 31)]))


def test_dead_features_are_those_silent_for_the_window_and_firing_revives_them(synthetic):
    learner = trainer(synthetic, dead_window_tokens=256)
    with torch.no_grad():
        learner.sae.b_enc[[3, 8]] = -10.0
    n_dead = [learner.step(synthetic.sample(128, seed)).n_dead for seed in range(3)]
    assert n_dead == [0, 0, 2]
    assert learner.tokens_since_fired[[3, 8]].tolist() == [384, 384]
    with torch.no_grad():
        learner.sae.b_enc[3] = 10.0
    learner.step(synthetic.sample(128, 4))
    assert learner.tokens_since_fired[[3, 8]].tolist() == [0, 512]


@pytest.mark.slow
def test_auxk_brings_back_features_that_are_too_small_ever_to_be_chosen(synthetic):
    alive = {}
    for coefficient in (0.0, 1 / 32):
        config = SAEConfig(d_model=32, n_features=64, k=3, aux_coefficient=coefficient)
        learner = trainer(synthetic, config=config, n_steps=200, dead_window_tokens=512)
        with torch.no_grad():
            learner.sae.W_enc[:32] *= 0.01
        for seed in range(200):
            learner.step(synthetic.sample(128, seed))
        alive[coefficient] = int((learner.tokens_since_fired[:32] < 2000).sum())
    assert alive == {0.0: 0, 1 / 32: 32}


def test_the_running_threshold_is_for_display_and_finish_replaces_it(synthetic):
    learner = trainer(synthetic)
    for seed in range(10):
        metrics = learner.step(synthetic.sample(128, seed))
    held_out = synthetic.sample(3000, 99)
    sae = learner.finish([held_out])
    assert metrics.theta == pytest.approx(learner.sae.theta[0].item())
    assert sae.encode(held_out).nnz / 3000 == pytest.approx(3, rel=0.02)
    assert sae.scale == 1.0


def test_finish_leaves_the_trainer_able_to_go_on(synthetic):
    learner = trainer(synthetic)
    learner.step(synthetic.sample(128, 0))
    before = learner.state_dict()
    learner.finish([synthetic.sample(500, 99)])
    assert_same_state(learner.state_dict(), before)


def test_training_uses_no_global_randomness(synthetic):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a = trainer(synthetic).step(synthetic.sample(128, 0))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    assert trainer(synthetic).step(synthetic.sample(128, 0)) == a


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "coarse"), [*((arch, "bf16") for arch in ARCHITECTURES), ("batchtopk", "int8"), ("matryoshka", "int8")]
)
def test_ranking_coarsely_changes_the_loss_of_a_whole_training_by_less_than_half_a_percent(synthetic, arch, coarse):
    data = synthetic.sample(20_000, 2)
    losses = {}
    for precision in ("f32", coarse):
        config = SAEConfig(d_model=32, n_features=64, k=3, arch=arch)
        learner = trainer(synthetic, config=config, n_steps=500, encoder_precision=precision)
        learner.ranking = precision  # also where this machine is slower with it
        mse = [learner.step(data[128 * step % 19_000 :][:512]).mse for step in range(500)]
        losses[precision] = sum(mse[-50:]) / 50
    assert losses[coarse] == pytest.approx(losses["f32"], rel=0.005)
    assert learner.sae.W_enc.dtype == torch.float32


def test_a_precision_that_is_not_known_is_refused():
    with pytest.raises(ConfigError, match=r"encoder_precision = 'f16'.*f32, bf16, int8"):
        TrainConfig(n_steps=1, encoder_precision="f16")
