from __future__ import annotations

import pytest
import torch

from sae_core.errors import ConfigError
from sae_core.sae import Normaliser, SAEConfig, SparseAutoencoder, calibrate_threshold, calibrated_theta


def random_sae(k: int, *, scale: float = 1.0, arch: str = "batchtopk") -> SparseAutoencoder:
    sae = SparseAutoencoder(SAEConfig(d_model=8, n_features=40, k=k, arch=arch))
    sae.scale.fill_(scale)
    return sae


def activations(n_tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(n_tokens, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_held_out_tokens_have_k_active_features_on_average(k, scale):
    sae, x = random_sae(k, scale=scale), scale * activations(3000, 0)
    found = calibrate_threshold(sae, x.split(700))
    sae.theta.copy_(calibrated_theta(sae, found))
    l0 = sae.encode(x).nnz / 3000
    assert l0 == pytest.approx(k, rel=0.02)
    assert found.l0 == l0
    assert found.n_tokens == 3000


def test_theta_is_the_order_statistic_to_the_width_of_a_bin():
    sae, x = random_sae(3), activations(500, 0)
    exact = sae.pre_activations(x).flatten().topk(3 * 500).values[-1].item()
    assert calibrate_threshold(sae, [x]).factor == pytest.approx(exact, rel=2**-10)


def test_theta_does_not_depend_on_the_batches():
    sae, x = random_sae(3), activations(500, 0)
    assert calibrate_threshold(sae, [x]) == calibrate_threshold(sae, x.split(11))


def test_too_few_positive_pre_activations_give_a_threshold_of_zero_and_say_the_l0_reached():
    sae, x = random_sae(40), activations(500, 0)
    found = calibrate_threshold(sae, [x])
    assert found.factor == 0.0
    assert found.l0 == int((sae.pre_activations(x) > 0).sum()) / 500
    assert found.l0 < 40


def test_calibration_leaves_the_autoencoder_as_it_is_and_folding_keeps_its_l0():
    sae, x = random_sae(3), 5 + 2 * activations(2000, 0)
    fitted = Normaliser.fit([x])
    sae.mu.copy_(fitted.mu)
    sae.scale.fill_(fitted.scale)
    found = calibrate_threshold(sae, [x])
    assert not sae.theta.any()
    sae.theta.copy_(calibrated_theta(sae, found))
    assert sae.folded().encode(x).nnz / 2000 == pytest.approx(3, rel=0.02)


def test_no_held_out_token_is_refused():
    with pytest.raises(ConfigError, match=r"\b0 tokens"):
        calibrate_threshold(random_sae(3), [])


@pytest.mark.parametrize("k", [1, 3, 10])
def test_learned_thresholds_keep_their_proportions_and_reach_k(k):
    sae, x = random_sae(k, arch="jumprelu").requires_grad_(False), activations(3000, 0)
    learned = torch.linspace(0.1, 0.5, 40)
    sae.theta.copy_(learned)
    found = calibrate_threshold(sae, x.split(700))
    assert torch.equal(sae.theta, learned)
    sae.theta.copy_(calibrated_theta(sae, found))
    torch.testing.assert_close(sae.theta, found.factor * learned)
    assert sae.encode(x).nnz / 3000 == pytest.approx(k, rel=0.02)
    assert found.l0 == pytest.approx(k, rel=0.02)


def test_learned_thresholds_of_zero_can_be_raised():
    sae, x = random_sae(3, arch="jumprelu").requires_grad_(False), activations(3000, 0)
    sae.theta.zero_()
    sae.theta.copy_(calibrated_theta(sae, calibrate_threshold(sae, [x])))
    assert sae.encode(x).nnz / 3000 == pytest.approx(3, rel=0.02)
