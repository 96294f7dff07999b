"""Every kernel against the dense one. The tests of the CUDA kernel are marked `gpu`; where the package triton is
installed but no such device is, one test runs them all in Triton's interpreter, in another process, as the interpreter
has to be chosen before triton is imported."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.autograd import gradcheck

from sae_core.errors import ConfigError
from sae_core.sae import Normaliser, SAEConfig, TrainConfig, Trainer, kernels
from sae_core.sae.codes import SparseCodes
from sae_core.sae.kernels import CPU, DENSE, KERNELS, Kernel, kernel_for

SHAPES = [(1, 1, 1, 1.0), (7, 5, 13, 0.3), (33, 17, 41, 0.05), (4, 3, 6, 0.0), (6, 8, 3, 1.0), (0, 4, 9, 0.5)]
SHAPES += [(40, 133, 9, 0.9), (3, 256, 70, 0.8)]  # more nonzeros and wider than a tile of the Triton kernel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Tried(NamedTuple):
    """A kernel, and the device on which its tensors lie."""

    kernel: Kernel
    device: str


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def tried(request) -> Tried:
    if request.param == "cuda":
        pytest.importorskip("triton")
        if not INTERPRETED and not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1")
    return Tried(KERNELS[request.param](), "cpu" if INTERPRETED else request.param)


@pytest.fixture
def cuda(tried) -> Kernel:
    """The CUDA kernel on a real device."""
    if tried.device != "cuda":
        pytest.skip("needs a CUDA device")
    return tried.kernel


on_cuda = pytest.mark.parametrize("tried", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)


def moved(codes: SparseCodes, device: str) -> SparseCodes:
    return SparseCodes(
        crow=codes.crow.to(device), col=codes.col.to(device), value=codes.value.to(device), n_features=codes.n_features
    )


def weights(d_model: int, n_tokens: int, n_features: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(n_tokens, d_model), (n_features, d_model), (n_features,), (n_features, d_model)]
    return [torch.randn(s, generator=generator, dtype=dtype).to(device).requires_grad_() for s in shapes]


def run(kernel, codes: SparseCodes, x, W_enc, b_enc, W_dec):
    """A loss through both products, and its gradients."""
    places = codes.with_value((x @ W_enc.T + b_enc)[codes.row, codes.col.long()].detach())
    value = kernel.encode(x, W_enc, b_enc, places)
    x_hat = kernel.decode(places.with_value(value), W_dec)
    pull = torch.linspace(-1, 1, x_hat.numel(), dtype=x.dtype, device=x.device).view_as(x_hat)
    loss = (x_hat * pull).sum() + value.square().sum()
    return [value.detach(), x_hat.detach(), *torch.autograd.grad(loss, [x, W_enc, b_enc, W_dec])]


def assert_equals_the_dense_one(tried: Tried, codes: SparseCodes, d_model: int, dtype: torch.dtype) -> None:
    codes = moved(codes, tried.device)
    inputs = weights(d_model, codes.n_tokens, codes.n_features, dtype, tried.device)
    for fast, dense in zip(run(tried.kernel, codes, *inputs), run(DENSE, codes, *inputs), strict=True):
        scale = max(1.0, float(dense.abs().max())) if dense.numel() else 1.0
        torch.testing.assert_close(fast / scale, dense / scale, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("n_tokens", "d_model", "n_features", "density"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_kernels_equal_the_dense_one_in_values_and_gradients(
    tried, random_codes, n_tokens, d_model, n_features, density, dtype
):
    codes = random_codes(n_tokens, n_features, density=density, dtype=dtype)
    assert_equals_the_dense_one(tried, codes, d_model, dtype)


def test_rows_and_columns_much_longer_than_the_others_are_summed_whole(tried):
    dense = torch.zeros(100, 90, dtype=torch.float64)
    dense[50], dense[:, 7], dense[99, 89] = 1.0, 2.0, 3.0
    assert_equals_the_dense_one(tried, SparseCodes.from_dense(dense), 6, torch.float64)


def test_values_of_a_coarser_type_are_computed_anew(tried, random_codes):
    codes = moved(random_codes(9, 21, density=0.3, dtype=torch.float32), tried.device)
    x, W_enc, b_enc, _ = weights(7, 9, 21, torch.float32, tried.device)
    exact = (x @ W_enc.T + b_enc)[codes.row, codes.col.long()].detach()
    for kernel in (tried.kernel, DENSE):
        found = kernel.encode(x, W_enc, b_enc, codes.with_value(exact.bfloat16()))
        torch.testing.assert_close(found.detach(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("n_tokens", "d_model", "n_features", "density"), SHAPES[1:4])
def test_gradients_of_sparse_kernels_equal_finite_differences(
    tried, random_codes, n_tokens, d_model, n_features, density
):
    codes = moved(random_codes(n_tokens, n_features, density=density), tried.device)
    if INTERPRETED:  # it takes some milliseconds a tile: a few places of all are enough
        codes = codes.take(torch.arange(min(n_tokens, 3)))
    x, W_enc, b_enc, W_dec = weights(d_model, codes.n_tokens, n_features, torch.float64, tried.device)

    def encoded(x, W_enc, b_enc):
        at_places = (x @ W_enc.T + b_enc)[codes.row, codes.col.long()].detach()
        return tried.kernel.encode(x, W_enc, b_enc, codes.with_value(at_places))

    assert gradcheck(encoded, (x, W_enc, b_enc), fast_mode=INTERPRETED)
    value = codes.value.clone().requires_grad_()
    decoded = (lambda value, W_dec: tried.kernel.decode(codes.with_value(value), W_dec), (value, W_dec))
    assert gradcheck(*decoded, fast_mode=INTERPRETED)


@on_cuda
def test_cuda_kernel_sums_bfloat16_in_float32(tried):
    codes = SparseCodes.from_dense(torch.ones(2, 257, device=tried.device).bfloat16())
    table = torch.ones(257, 5, device=tried.device).bfloat16()
    table[0] = 256.0
    # careful: in bfloat16 itself, 256 + 1 is 256
    assert tried.kernel.decode(codes, table).tolist() == [[512.0] * 5] * 2


@on_cuda
def test_training_with_the_cuda_kernel_follows_the_one_on_a_cpu(tried):
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
    config, train = SAEConfig(d_model=6, n_features=16, k=3), TrainConfig(n_steps=3, batch_size=24)

    def losses(device: str, kernel: Kernel) -> list[float]:
        trainer = Trainer(config, train, Normaliser.fit([x]), device=device, kernel=kernel)
        return [trainer.step(x.to(device)).loss for _ in range(3)]

    assert losses(tried.device, tried.kernel) == pytest.approx(losses("cpu", CPU), rel=1e-4)


@on_cuda
def test_cuda_kernel_gives_the_same_bits_each_time(cuda, random_codes):
    codes = moved(random_codes(512, 64, density=0.5, dtype=torch.float32), "cuda")
    inputs = weights(65, 512, 64, torch.float32, "cuda")
    for once, again in zip(run(cuda, codes, *inputs), run(cuda, codes, *inputs), strict=True):
        assert torch.equal(once, again)


@on_cuda
def test_cuda_kernel_keeps_no_matrix_of_tokens_and_features(cuda):
    n_tokens, n_features, d_model, k = 2048, 16384, 64, 8
    col = torch.arange(k, dtype=torch.int32, device="cuda").repeat(n_tokens)
    crow = torch.arange(0, n_tokens * k + 1, k, device="cuda")
    codes = SparseCodes(crow=crow, col=col, value=torch.ones(n_tokens * k, device="cuda"), n_features=n_features)
    x, W_enc, b_enc, W_dec = weights(d_model, n_tokens, n_features, torch.float32, "cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    value = cuda.encode(x, W_enc, b_enc, codes)
    cuda.decode(codes.with_value(value), W_dec).square().sum().backward()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < n_tokens * n_features * 4 / 4


@on_cuda
def test_cuda_kernel_reaches_rows_beyond_two_to_the_31_numbers(cuda):
    n_features, d_model = 2**23, 257
    if torch.cuda.mem_get_info()[0] < 6e9:
        pytest.skip("needs 6 GB of device memory")
    table = torch.zeros(n_features, d_model, dtype=torch.bfloat16, device="cuda")
    table[-1] = 1.0
    last = torch.tensor([n_features - 1], dtype=torch.int32, device="cuda")
    value = torch.full((1,), 3.0, dtype=torch.bfloat16, device="cuda")
    codes = SparseCodes(crow=torch.tensor([0, 1], device="cuda"), col=last, value=value, n_features=n_features)
    assert cuda.decode(codes, table).tolist() == [[3.0] * d_model]


def test_triton_kernel_passes_the_tests_of_a_gpu_in_the_interpreter():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the package triton is not installed")
    if INTERPRETED:
        pytest.skip("this is the interpreter")
    here = Path(__file__)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", here.name, "-m", "gpu", "-p", "no:cacheprovider", "-rs"],
        cwd=here.parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp64"])
def test_triton_kernels_compile_for_a_device_that_is_not_here(dtype):
    triton = pytest.importorskip("triton")
    if INTERPRETED:
        pytest.skip("the interpreter compiles nothing")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sae_core.sae.kernels import triton as module

    tile = {"SUM": triton.language.float64 if dtype == "fp64" else triton.language.float32, "N": 32, "D": 128}
    table, ints, longs = f"*{dtype}", "*i32", "*i64"
    for program, types in [
        (module._bag_sums, [table, table, ints, table, longs, "i32"]),
        (module._bag_sums, [table, table, longs, table, longs, "i32"]),
        (module._inner_products, [table, table, table, longs, ints, "i32", "i32"]),
    ]:
        signature = dict(zip(program.arg_names, [*types, *["constexpr"] * 3], strict=True))
        places = {(program.arg_names.index(name),): value for name, value in tile.items()}
        compiled = triton.compile(ASTSource(program, signature, places), target=GPUTarget("cuda", 90, 32))
        assert "atom" not in compiled.asm["ptx"]


def test_a_cuda_device_without_triton_is_refused_with_the_command_that_installs_it(monkeypatch):
    kernels.triton_kernel.cache_clear()
    monkeypatch.delitem(sys.modules, "sae_core.sae.kernels.triton", raising=False)
    monkeypatch.delattr(kernels, "triton", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ConfigError, match="pip install triton"):
        kernel_for(torch.device("cuda"))


def test_importing_the_package_imports_no_triton():
    code = "import sys, sae_core.sae; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_encode_returns_the_values_that_the_selection_saw():
    codes = SparseCodes.from_dense(torch.tensor([[0.0, 2.0]]))
    x, W_enc, b_enc = torch.ones(1, 3), torch.ones(2, 3), torch.full((2,), -1.0)
    assert CPU.encode(x, W_enc, b_enc, codes).tolist() == [2.0]
    assert DENSE.encode(x, W_enc, b_enc, codes).tolist() == [2.0]


def test_a_device_without_a_kernel_of_its_own_gets_the_dense_one():
    assert kernel_for(torch.device("cpu")) is CPU
    assert kernel_for(torch.device("meta")) is DENSE
