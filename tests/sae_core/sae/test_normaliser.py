from __future__ import annotations

import pytest
import torch

from sae_core.errors import ConfigError, TrainingError
from sae_core.sae import Normaliser


def activations() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 100 + torch.randn(503, 6, generator=generator) * torch.linspace(0.1, 5, 6)


@pytest.mark.parametrize("batch", [1, 7, 503])
def test_mean_and_scale_equal_those_of_all_tokens_at_once_whatever_the_batches(batch):
    x = activations()
    fitted = Normaliser.fit(x.split(batch))
    wide = x.double()
    assert fitted.n_tokens == 503
    torch.testing.assert_close(fitted.mean, wide.mean(0), rtol=1e-12, atol=0)
    assert fitted.scale == pytest.approx(wide.var(dim=0, correction=0).sum().sqrt().item(), rel=1e-9)
    assert fitted.gamma == pytest.approx((wide.mean(0).norm() / wide.var(0, correction=0).sum().sqrt()).item())


def test_normalised_activations_have_mean_zero_and_mean_squared_length_one():
    x = activations()
    fitted = Normaliser.fit([x])
    x_n = (x - fitted.mu) / fitted.scale
    torch.testing.assert_close(x_n.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    assert x_n.square().sum(1).mean().item() == pytest.approx(1.0, rel=1e-5)


def test_two_normalisers_merge_into_that_of_both_streams():
    x = activations()
    merged, rest = Normaliser.fit([x[:200]]), Normaliser.fit([x[200:]])
    merged.merge(rest)
    merged.merge(Normaliser(6))
    whole = Normaliser.fit([x])
    torch.testing.assert_close(merged.mean, whole.mean)
    assert merged.scale == pytest.approx(whole.scale)


def test_tokens_that_do_not_vary_and_no_tokens_at_all_are_refused():
    with pytest.raises(TrainingError, match=r"\b3 tokens"):
        _ = Normaliser.fit([torch.ones(3, 4)]).scale
    with pytest.raises(ConfigError, match="batches"):
        Normaliser.fit([])


def test_a_value_that_is_not_finite_is_refused_and_its_token_named():
    x = activations()
    x[5, 2] = float("nan")
    fitted = Normaliser(6)
    fitted.update(x[:4])
    with pytest.raises(TrainingError, match="token 5 "):
        fitted.update(x[4:])
    assert fitted.n_tokens == 4


def test_batches_of_another_width_are_refused():
    with pytest.raises(ConfigError, match=r"d_model = 5\b.*\b6\b"):
        Normaliser(6).update(torch.ones(2, 5))
