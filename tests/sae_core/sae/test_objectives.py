from __future__ import annotations

import math

import pytest
import torch

from sae_core.sae import SAEConfig, SparseAutoencoder
from sae_core.sae.constraints import normalise_rows, remove_parallel
from sae_core.sae.kernels import CPU
from sae_core.sae.objectives import Forward, auxk, mse, reconstruction_with_auxk
from sae_core.sae.selectors import batch_topk


def forward_pass(dead: list[int], *, n_aux: int = 2, aux_coefficient: float = 1 / 32, seed: int = 0):
    """An autoencoder of 5 dimensions and 8 features whose `dead` ones are kept from firing, and its forward pass."""
    generator = torch.Generator().manual_seed(seed)
    sae = SparseAutoencoder(SAEConfig(d_model=5, n_features=8, k=2), generator=generator)
    x = torch.randn(20, 5, generator=generator)
    is_dead = torch.zeros(8, dtype=torch.bool)
    is_dead[dead] = True
    with torch.no_grad():
        pre = sae.pre_activations(x)
    codes = batch_topk(pre.masked_fill(is_dead, -1.0), 2)
    codes = codes.with_value(CPU.encode(x, sae.W_enc, sae.b_enc, codes))
    x_hat = CPU.decode(codes, sae.W_dec) + sae.b_dec
    return sae, Forward(
        x=x,
        pre=pre,
        codes=codes,
        x_hat=x_hat,
        dead=is_dead,
        weights=sae.weights,
        n_aux=n_aux,
        aux_coefficient=aux_coefficient,
    )


def test_mse_is_the_mean_over_tokens_of_the_squared_length_of_the_error():
    assert mse(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0]])) == (5 + 4) / 2


@pytest.mark.parametrize("dead", [[1], [1, 4], [0, 2, 3, 6, 7]])
def test_auxk_equals_the_equation_written_densely(dead):
    sae, forward = forward_pass(dead)
    e = (forward.x - forward.x_hat).detach()
    acts = (forward.x @ sae.W_enc.T + sae.b_enc).relu()
    acts = torch.where(forward.dead, acts, 0.0)
    value, index = acts.topk(min(2, len(dead)), dim=1)
    kept = torch.zeros_like(acts).scatter(1, index, value)
    expected = (e - kept @ sae.W_dec).square().sum() / (e - e.mean(0)).square().sum()
    assert auxk(forward).item() == pytest.approx(expected.item(), rel=1e-5)


def test_auxk_reaches_encoder_decoder_and_bias_of_the_dead_features_and_no_others():
    sae, forward = forward_pass([1, 4, 5])
    grads = torch.autograd.grad(auxk(forward), [sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec], allow_unused=True)
    for grad in grads[:3]:
        touched = grad.reshape(8, -1).abs().sum(dim=1) > 0
        assert touched.tolist() == forward.dead.tolist()
    assert grads[3] is None


def test_the_main_loss_reaches_every_parameter():
    sae, forward = forward_pass([])
    fired = torch.zeros(8, dtype=torch.bool).index_fill(0, forward.codes.col.long(), True)
    grads = torch.autograd.grad(reconstruction_with_auxk(forward).total, sae.weights)
    for grad in grads[:3]:
        assert (grad.reshape(8, -1).abs().sum(dim=1) > 0).tolist() == fired.tolist()
    assert bool((grads[3] != 0).all())


def test_a_dead_feature_whose_pre_activation_is_not_positive_is_no_pick():
    sae, forward = forward_pass([1, 4])
    with torch.no_grad():
        sae.b_enc[4] = -100.0
    grad = torch.autograd.grad(auxk(forward), sae.W_enc)[0]
    assert bool((grad[1] != 0).any())
    assert not bool((grad[4] != 0).any())


def test_without_dead_features_the_loss_is_the_mse():
    _, forward = forward_pass([])
    loss = reconstruction_with_auxk(forward)
    assert loss.aux.item() == 0.0
    assert loss.total.item() == loss.mse.item()


def test_a_coefficient_of_zero_turns_auxk_off():
    _, forward = forward_pass([1, 4], aux_coefficient=0.0)
    assert reconstruction_with_auxk(forward).aux.item() == 0.0


def test_the_weight_of_auxk_is_its_coefficient():
    _, forward = forward_pass([1, 4], aux_coefficient=0.25)
    loss = reconstruction_with_auxk(forward)
    assert loss.total.item() == pytest.approx(loss.mse.item() + 0.25 * loss.aux.item(), rel=1e-6)


def test_a_perfect_reconstruction_leaves_auxk_zero_and_its_gradients_finite():
    sae, forward = forward_pass([1, 4])
    perfect = Forward(**{**vars(forward), "x_hat": forward.x})
    loss = auxk(perfect)
    assert loss.item() == 0.0
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(loss, sae.weights[:3], allow_unused=True))


def test_the_gradient_parallel_to_a_unit_row_is_removed():
    rows = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    grad = torch.tensor([[3.0, 4.0], [1.0, 1.0]])
    remove_parallel(grad, rows)
    torch.testing.assert_close((grad * rows).sum(dim=1), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(grad[0], torch.tensor([0.0, 4.0]))


def test_rows_are_brought_back_to_unit_length_without_turning():
    rows = torch.tensor([[3.0, 4.0], [0.0, -2.0]])
    normalise_rows(rows)
    torch.testing.assert_close(rows, torch.tensor([[0.6, 0.8], [0.0, -1.0]]))
    assert math.isclose(rows[0].norm().item(), 1.0, abs_tol=1e-6)
