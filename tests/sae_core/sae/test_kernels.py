from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from sae_core.sae.codes import SparseCodes
from sae_core.sae.kernels import CPU, KERNELS, REFERENCE, kernel_for

SHAPES = [(1, 1, 1, 1.0), (7, 5, 13, 0.3), (33, 17, 41, 0.05), (4, 3, 6, 0.0), (6, 8, 3, 1.0), (0, 4, 9, 0.5)]


def weights(d_model: int, n_tokens: int, n_features: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(n_tokens, d_model), (n_features, d_model), (n_features,), (n_features, d_model)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def run(kernel, codes: SparseCodes, x, W_enc, b_enc, W_dec):
    """A loss through both products, and its gradients."""
    places = codes.with_value((x @ W_enc.T + b_enc)[codes.row, codes.col.long()].detach())
    value = kernel.encode(x, W_enc, b_enc, places)
    x_hat = kernel.decode(places.with_value(value), W_dec)
    loss = (x_hat * torch.linspace(-1, 1, x_hat.numel(), dtype=x.dtype).view_as(x_hat)).sum() + value.square().sum()
    return [value.detach(), x_hat.detach(), *torch.autograd.grad(loss, [x, W_enc, b_enc, W_dec])]


@pytest.mark.parametrize(("n_tokens", "d_model", "n_features", "density"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cpu_kernel_equals_the_dense_one_in_values_and_gradients(
    random_codes, n_tokens, d_model, n_features, density, dtype
):
    codes = random_codes(n_tokens, n_features, density=density, dtype=dtype)
    inputs = weights(d_model, n_tokens, n_features, dtype)
    for fast, dense in zip(run(CPU, codes, *inputs), run(REFERENCE, codes, *inputs), strict=True):
        scale = max(1.0, float(dense.abs().max())) if dense.numel() else 1.0
        torch.testing.assert_close(fast / scale, dense / scale, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_values_of_a_coarser_type_are_computed_anew(random_codes, kernel):
    codes = random_codes(9, 21, density=0.3, dtype=torch.float32)
    x, W_enc, b_enc, _ = weights(7, 9, 21, torch.float32)
    exact = (x @ W_enc.T + b_enc)[codes.row, codes.col.long()].detach()
    found = kernel.encode(x, W_enc, b_enc, codes.with_value(exact.bfloat16()))
    torch.testing.assert_close(found.detach(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("n_tokens", "d_model", "n_features", "density"), SHAPES[1:4])
def test_gradients_of_the_cpu_kernel_equal_finite_differences(random_codes, n_tokens, d_model, n_features, density):
    codes = random_codes(n_tokens, n_features, density=density)
    x, W_enc, b_enc, W_dec = weights(d_model, n_tokens, n_features, torch.float64)

    def encoded(x, W_enc, b_enc):
        at_places = (x @ W_enc.T + b_enc)[codes.row, codes.col.long()].detach()
        return CPU.encode(x, W_enc, b_enc, codes.with_value(at_places))

    assert gradcheck(encoded, (x, W_enc, b_enc))
    value = codes.value.clone().requires_grad_()
    assert gradcheck(lambda value, W_dec: CPU.decode(codes.with_value(value), W_dec), (value, W_dec))


def test_encode_returns_the_values_that_the_selection_saw():
    codes = SparseCodes.from_dense(torch.tensor([[0.0, 2.0]]))
    x, W_enc, b_enc = torch.ones(1, 3), torch.ones(2, 3), torch.full((2,), -1.0)
    assert CPU.encode(x, W_enc, b_enc, codes).tolist() == [2.0]
    assert REFERENCE.encode(x, W_enc, b_enc, codes).tolist() == [2.0]


def test_a_device_without_a_kernel_of_its_own_gets_the_dense_one():
    assert kernel_for(torch.device("cpu")) is CPU
    assert kernel_for(torch.device("meta")) is REFERENCE
    assert {name: kernel.name for name, kernel in KERNELS.items()} == {name: name for name in KERNELS}
