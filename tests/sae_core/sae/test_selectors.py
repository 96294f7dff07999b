from __future__ import annotations

import pytest
import torch

from sae_core.sae import selectors
from sae_core.sae.selectors import above, above_threshold, batch_topk, token_topk


def pre_activations(n_tokens: int = 17, n_features: int = 29, seed: int = 0) -> torch.Tensor:
    return torch.randn(n_tokens, n_features, generator=torch.Generator().manual_seed(seed))


def test_batch_topk_keeps_the_k_times_n_largest_of_the_whole_batch():
    pre = pre_activations()
    kept = batch_topk(pre, 3).to_dense()
    assert int((kept != 0).sum()) == 3 * 17
    assert sorted(kept[kept != 0].tolist()) == sorted(pre.flatten().tolist())[-51:]


@pytest.mark.parametrize("n_tokens", [16, 100, 1001])
@pytest.mark.parametrize("order", ["as drawn", "loud tokens sampled", "quiet tokens sampled"])
def test_the_guess_of_the_cutoff_changes_no_result(monkeypatch, n_tokens, order):
    pre = pre_activations(n_tokens)
    if order != "as drawn":
        pre[:: selectors.SAMPLE] *= 100.0 if order.startswith("loud") else 0.01
    plain = batch_topk(pre, 3)
    monkeypatch.setattr(selectors, "SMALL", 50)
    guessed = batch_topk(pre, 3)
    assert torch.equal(plain.crow, guessed.crow)
    assert torch.equal(plain.col, guessed.col)
    assert torch.equal(plain.value, guessed.value)
    assert sorted(plain.value.tolist()) == sorted(pre.flatten().tolist())[-3 * n_tokens :]


def test_ties_at_the_cutoff_are_broken_by_order_and_the_count_stays_exact():
    pre = torch.tensor([[1.0, 2.0, 1.0], [1.0, 1.0, 3.0]])
    assert batch_topk(pre, 2).to_dense().tolist() == [[1.0, 2.0, 1.0], [0.0, 0.0, 3.0]]


@pytest.mark.parametrize("select", [batch_topk, token_topk])
def test_picks_of_zero_or_less_are_never_kept(select):
    pre = torch.tensor([[0.0, -1.0, 2.0], [-1.0, -2.0, 0.0]])
    codes = select(pre, 2)
    assert codes.to_dense().tolist() == [[0.0, 0.0, 2.0], [0.0, 0.0, 0.0]]
    assert codes.nnz == 1


def test_token_topk_keeps_the_k_largest_of_each_token():
    pre = pre_activations().abs()
    codes = token_topk(pre, 4)
    value, col = pre.topk(4, dim=1)
    assert torch.equal(codes.to_dense(), torch.zeros_like(pre).scatter(1, col, value))
    assert codes.crow.diff().tolist() == [4] * 17
    assert all(codes.col[4 * t : 4 * t + 4].tolist() == sorted(col[t].tolist()) for t in range(17))


@pytest.mark.parametrize("theta", [-1.0, 0.0, 0.7])
def test_threshold_keeps_what_is_above_it_and_positive(theta):
    pre = pre_activations()
    expected = torch.where((pre > theta) & (pre > 0), pre, 0.0)
    assert torch.equal(above_threshold(pre, torch.full((29,), theta)).to_dense(), expected)


def test_each_feature_has_its_own_threshold():
    pre, theta = torch.tensor([[0.5, 0.5, -0.1], [2.0, 0.2, -0.3]]), torch.tensor([1.0, 0.1, -0.2])
    assert above_threshold(pre, theta).to_dense().tolist() == torch.tensor([[0, 0.5, 0], [2.0, 0.2, 0]]).tolist()
    assert above(pre, theta).to_dense().tolist() == torch.tensor([[0, 0.5, -0.1], [2.0, 0.2, 0]]).tolist()


def test_k_equal_to_the_width_keeps_every_positive_entry():
    pre = pre_activations()
    for select in (batch_topk, token_topk):
        assert torch.equal(select(pre, 29).to_dense(), pre.relu())


def test_one_token_is_a_batch():
    pre = pre_activations(n_tokens=1)
    assert torch.equal(batch_topk(pre, 5).to_dense(), token_topk(pre, 5).to_dense())
