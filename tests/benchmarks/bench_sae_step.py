"""Time of one BatchTopK training step against a dense one, both in this run on this machine.

    python tests/benchmarks/bench_sae_step.py [--threads 2] [--cpu-time] [--repeats 7] [--shape 4096 512 4096 32]
    python tests/benchmarks/bench_sae_step.py --device cuda [--shape 16384 768 32768 64]

The dense baseline is the common way to write a step: dense encoder, top-k over the flattened batch, dense decoder,
dense gradients by autograd, Adam, projection of the decoder's gradient, renormalisation of its rows. The two take
turns, so that another program on the machine slows both; a figure is the fastest of the repeats. `product` is
x W_enc^T alone, which both need; `bf16` ranks the pre-activations in bfloat16 (values and gradients stay float32).
`--loss-steps N` trains both precisions for N steps on fresh planted batches and prints their losses.

With `--device cuda`, not yet run on a GPU, the dense baseline and `product` are in bfloat16 (autocast; weights and Adam
in float32), the clock waits for the device, and each step's peak memory is printed, weights and moments included.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from sae_core.sae import Normaliser, SAEConfig, TrainConfig, Trainer
from sae_core.sae.synthetic import own_seed

if TYPE_CHECKING:
    from collections.abc import Callable

CUDA_SHAPES = [(16384, 768, 32768, 64)]
SHAPES = [(4096, 128, 1024, 16), (4096, 512, 4096, 32), (4096, 512, 8192, 32), (4096, 512, 16384, 32)]
WARM_UP = 12  # steps before the clock: the sparse step learns where the cutoff lies


def planted(n_tokens: int, d_model: int, n_features: int, k: int) -> torch.Tensor:
    """Normalised sums of about k random unit directions, which are not those from which a step starts."""
    generator = torch.Generator().manual_seed(own_seed(0, "planted"))
    directions = functional.normalize(torch.randn(n_features, d_model, generator=generator), dim=1)
    index = torch.randint(n_features, (n_tokens, k), generator=generator)
    x = functional.embedding_bag(index, directions, mode="sum")
    return (x - x.mean(0)) / x.var(0).sum().sqrt()


def dense_step(x: torch.Tensor, n_features: int, k: int) -> Callable[[], None]:
    """The baseline, in normalised units; in bfloat16 on a GPU."""
    generator = torch.Generator().manual_seed(0)
    start = functional.normalize(torch.randn(n_features, x.shape[1], generator=generator), dim=1).to(x.device)
    W_dec, W_enc = start.clone().requires_grad_(), start.clone().requires_grad_()
    b_enc = torch.zeros(n_features, device=x.device, requires_grad=True)
    b_dec = torch.zeros(x.shape[1], device=x.device, requires_grad=True)
    adam = torch.optim.Adam([W_dec, W_enc, b_enc, b_dec], lr=1e-3)

    def step() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            acts = functional.linear(x, W_enc, b_enc).relu()
            top = acts.flatten().topk(k * x.shape[0], sorted=False)
            z = torch.zeros_like(acts).flatten().scatter(0, top.indices, top.values).view_as(acts)
            loss = (x - (z @ W_dec + b_dec)).square().sum(dim=1).mean()
        adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            W_dec.grad.sub_((W_dec.grad * W_dec).sum(dim=1, keepdim=True) * W_dec)
            adam.step()
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))

    return step


def make_trainer(x: torch.Tensor, n_features: int, k: int, precision: str, n_steps: int = 10**6) -> Trainer:
    """A BatchTopK trainer, as `scsae train` makes it."""
    config = SAEConfig(d_model=x.shape[1], n_features=n_features, k=k)
    train = TrainConfig(n_steps=n_steps, batch_size=x.shape[0], lr=1e-3, encoder_precision=precision)
    return Trainer(config, train, Normaliser.fit([x.cpu()]), device=x.device)


def sparse_step(x: torch.Tensor, n_features: int, k: int, precision: str) -> Callable[[], None]:
    """The trainer's step, as `scsae train` runs it."""
    trainer = make_trainer(x, n_features, k, precision)
    for _ in range(WARM_UP):
        trainer.step(x)
    return lambda: trainer.step(x) and None


def product(x: torch.Tensor, n_features: int) -> Callable[[], torch.Tensor]:
    """x W_enc^T alone; in bfloat16 on a GPU."""
    dtype = torch.bfloat16 if x.is_cuda else torch.float32
    a, weight = x.to(dtype), torch.randn(n_features, x.shape[1]).to(x.device, dtype)
    out = torch.empty(x.shape[0], n_features, device=x.device, dtype=dtype)
    return lambda: torch.mm(a, weight.T, out=out)


def peak_gib(make_step: Callable[[], Callable[[], object]]) -> float:
    """What making a step's weights and then running it adds to the memory of the GPU at its highest."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    make_step()()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def device_clock() -> float:
    """Seconds, once the GPU has done all that it was asked to."""
    torch.cuda.synchronize()
    return time.perf_counter()


def compare_losses(shape: tuple[int, int, int, int], n_steps: int, device: str) -> None:
    """Train in both precisions on the same fresh batches and print the mean squared error of the last 20 steps."""
    n_tokens, d_model, n_features, k = shape
    data = planted(n_tokens * 32, d_model, n_features, k).to(device)
    trainers = {p: make_trainer(data[:n_tokens], n_features, k, p, n_steps) for p in ("f32", "bf16")}
    errors: dict[str, list[float]] = {p: [] for p in trainers}
    generator = torch.Generator().manual_seed(1)
    for _ in range(n_steps):
        x = data[torch.randint(len(data), (n_tokens,), generator=generator).to(device)]
        for precision, trainer in trainers.items():
            errors[precision].append(trainer.step(x).mse)
    f32, bf16 = (sum(errors[p][-20:]) / 20 for p in ("f32", "bf16"))
    print(
        f"F {n_features}: loss after {n_steps} steps: f32 {f32:.5f}, bf16 {bf16:.5f}, difference {bf16 / f32 - 1:+.3%}"
    )


def in_turn(functions: list[Callable[[], object]], repeats: int, clock: Callable[[], float]) -> list[list[float]]:
    """Milliseconds of each call of each function, which take turns."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, own in zip(functions, times, strict=True):
            start = clock()
            function()
            own.append(1e3 * (clock() - start))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cpu-time", action="store_true", help="on a busy machine, with --threads 1")
    parser.add_argument("--shape", type=int, nargs=4, action="append", metavar=("B", "D", "F", "K"))
    parser.add_argument("--loss-steps", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    on_gpu = options.device == "cuda"
    if on_gpu and options.cpu_time:
        parser.error("--cpu-time times a CPU: leave it out with --device cuda")
    clock, kind = (time.process_time, "CPU") if options.cpu_time else (time.perf_counter, "wall")
    where = torch.cuda.get_device_name() if on_gpu else f"{options.threads} threads"
    print(f"torch {torch.__version__}, {where}, fastest of {options.repeats}, {kind} ms a step")
    head = f"{'B':>6} {'d':>5} {'F':>6} {'k':>3} {'dense':>9} {'f32':>9} {'bf16':>9} {'product':>9}"
    print(f"{head} {'ratio f32':>9} {'ratio bf16':>10} {'bf16/product':>12}")
    for n_tokens, d_model, n_features, k in options.shape or (CUDA_SHAPES if on_gpu else SHAPES):
        if options.loss_steps:
            compare_losses((n_tokens, d_model, n_features, k), options.loss_steps, options.device)
            continue
        x = planted(n_tokens, d_model, n_features, k).to(options.device)
        makers = {
            "dense": partial(dense_step, x, n_features, k),
            "f32": partial(sparse_step, x, n_features, k, "f32"),
            "bf16": partial(sparse_step, x, n_features, k, "bf16"),
        }
        steps = [*(make() for make in makers.values()), product(x, n_features)]
        times = in_turn(steps, options.repeats, device_clock if on_gpu else clock)
        dense, f32, bf16, alone = map(min, times)
        print(
            f"{n_tokens:>6} {d_model:>5} {n_features:>6} {k:>3} {dense:>9.1f} {f32:>9.1f} {bf16:>9.1f} "
            f"{alone:>9.1f} {dense / f32:>9.1f} {dense / bf16:>10.1f} {bf16 / alone:>12.1f}",
            flush=True,
        )
        if on_gpu:
            del steps
            peaks = ", ".join(f"{name} {peak_gib(make):.2f}" for name, make in makers.items())
            print(f"peak GiB: {peaks}; one [B F] matrix in float32 {n_tokens * n_features / 2**28:.2f}", flush=True)


if __name__ == "__main__":
    main()
