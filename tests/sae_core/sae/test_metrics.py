from __future__ import annotations

import pytest
import torch

from sae_core.errors import ConfigError
from sae_core.sae import MetricAccumulator, SAEConfig, SparseAutoencoder, SparseCodes, evaluate


def activations(n_tokens: int = 400, d_model: int = 6) -> torch.Tensor:
    return 3 + torch.randn(n_tokens, d_model, generator=torch.Generator().manual_seed(0))


def test_predicting_the_mean_has_an_fvu_of_one_and_a_perfect_copy_of_zero():
    x = activations()
    nothing = SparseCodes.from_dense(torch.zeros(400, 2))
    mean, copy = MetricAccumulator(6, 2), MetricAccumulator(6, 2)
    for batch, tokens in zip(x.split(33), torch.arange(400).split(33), strict=True):
        mean.update(batch, x.mean(0).expand_as(batch), nothing.take(tokens))
        copy.update(batch, batch, nothing.take(tokens))
    assert mean.result().fvu == pytest.approx(1.0, rel=1e-6)
    assert copy.result().fvu == 0.0


def test_fvu_equals_one_minus_the_r_squared_of_sklearn():
    sklearn = pytest.importorskip("sklearn.metrics")
    x = activations()
    sae = SparseAutoencoder(SAEConfig(d_model=6, n_features=30, k=3, arch="topk"))
    x_hat = sae(x).detach()
    expected = 1 - sklearn.r2_score(x.numpy(), x_hat.numpy(), multioutput="variance_weighted")
    assert evaluate(sae, [x]).fvu == pytest.approx(expected, rel=1e-5)


def test_no_metric_depends_on_the_batches():
    x = activations()
    sae = SparseAutoencoder(SAEConfig(d_model=6, n_features=30, k=3))
    sae.theta.fill_(4.0)
    whole, parts = evaluate(sae, [x]), evaluate(sae, x.split(17))
    assert (whole.l0, whole.dead_fraction, whole.n_tokens) == (parts.l0, parts.dead_fraction, parts.n_tokens)
    assert torch.equal(whole.density, parts.density)
    assert whole.fvu == pytest.approx(parts.fvu, rel=1e-6)


def test_l0_density_and_dead_fraction_are_those_counted_by_hand():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    codes = SparseCodes.from_dense(torch.tensor([[1.0, 0, 0], [2.0, 3.0, 0], [0, 0, 0], [4.0, 0, 0]]))
    accumulator = MetricAccumulator(2, 3)
    accumulator.update(x, x, codes)
    found = accumulator.result()
    assert found.l0 == 1.0
    assert found.density.tolist() == [0.75, 0.25, 0.0]
    assert found.dead_fraction == pytest.approx(1 / 3)


def test_a_stored_zero_is_no_firing():
    codes = SparseCodes.from_dense(torch.tensor([[1.0], [2.0]])).with_value(torch.tensor([0.0, 2.0]))
    accumulator = MetricAccumulator(1, 1)
    accumulator.update(torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1), codes)
    assert accumulator.result().l0 == 0.5


def test_no_token_is_refused():
    with pytest.raises(ConfigError, match=r"\b0 tokens"):
        evaluate(SparseAutoencoder(SAEConfig(d_model=6, n_features=30, k=3)), [])
