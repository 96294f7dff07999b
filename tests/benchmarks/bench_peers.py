"""Time of one training step against the steps of other packages, on the same batches, in this run on this machine.

    pip install 'scsae[peers]'
    python tests/benchmarks/bench_peers.py [--threads 2] [--repeats 5] [--shape 4096 512 4096 32] [--out FOLDER]
    python tests/benchmarks/bench_peers.py --loss-steps 500 --shape 512 64 512 8
    python tests/benchmarks/bench_peers.py --device cuda

All start from the same weights, with Adam at one constant learning rate and without a dead feature, and do what the
package's own trainer does in a step: sparsify 1.3 (TopK alone), dictionary_learning 0.1, SAELens 6.54 (its sparse
option too), and on a GPU flex_sae's loss under a plain encoder where it can be imported. A package that is not
installed is left out, with the reason. The steps take turns, so that another program on the machine slows all; a figure
is the median of the repeats, and a ratio the median of the ratios of each turn. `product` is x W_enc^T alone, which all
need.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import statistics
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bench_sae_step import device_clock, in_turn, peak_gib, planted, product
from machine import as_markdown, machine_facts
from torch.nn import functional

from sae_core.errors import ConfigError
from sae_core.sae import Normaliser, SAEConfig, TrainConfig, Trainer

if TYPE_CHECKING:
    from collections.abc import Callable

    Step = Callable[[torch.Tensor], float | torch.Tensor]
    """(x [token d_model]) -> the squared error per token of the reconstruction before the step."""

SHAPES = [(4096, 512, 4096, 32), (4096, 512, 16384, 32), (4096, 512, 65536, 32)]
CUDA_SHAPES = [*SHAPES, (4096, 2304, 65536, 64)]
WARM_UP = 3  # steps before the clock
LAST = 20  # steps whose errors are averaged in a comparison of losses
LR = 1e-3
NEVER_DEAD = 10**9  # tokens without firing after which a feature is dead: AuxK would differ between the packages
PACKAGES = {"sparsify": "eai-sparsify", "dictionary_learning": "dictionary-learning", "sae_lens": "sae-lens"}


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every package trains: the starting weights, the sparsity and the length of the run."""

    W: torch.Tensor
    """Unit rows [feature d_model], with which encoder and decoder start."""
    k: int
    arch: str
    n_steps: int

    @property
    def device(self) -> torch.device:
        return self.W.device


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One way to do a step."""

    name: str
    make: Callable[[Task], Step]
    archs: tuple[str, ...] = ("topk", "batchtopk")
    only_on: str | None = None
    """The only type of device on which it runs."""


def ours(task: Task, precision: str) -> Step:
    """The trainer's step, as `scsae train` runs it."""
    n_features, d_model = task.W.shape
    config = SAEConfig(d_model=d_model, n_features=n_features, k=task.k, arch=task.arch)
    train = TrainConfig(
        n_steps=task.n_steps,
        lr=LR,
        warmup_fraction=0.0,
        decay_fraction=0.0,
        dead_window_tokens=NEVER_DEAD,
        encoder_precision=precision,
    )
    unit = Normaliser(d_model)
    unit.n_tokens, unit.squares = 1, 1.0  # mean 0 and scale 1: the batches are normalised already
    trainer = Trainer(config, train, unit, device=task.device)
    if trainer.ranking != precision:
        raise ConfigError(f"this machine ranks in {trainer.ranking} where {precision} is asked for")
    with torch.no_grad():
        trainer.sae.W_enc.copy_(task.W)
        trainer.sae.W_dec.copy_(task.W)
    return lambda x: trainer.step(x).mse


def sparsify(task: Task) -> Step:
    """The step of `sparsify.Trainer` with Adam: its loss is the FVU of a batch."""
    from sparsify import SparseCoder, SparseCoderConfig

    n_features, d_model = task.W.shape
    coder = SparseCoder(d_model, SparseCoderConfig(num_latents=n_features, k=task.k), device=task.device)
    with torch.no_grad():
        coder.encoder.weight.copy_(task.W)
        coder.W_dec.copy_(task.W)
    adam = torch.optim.Adam(coder.parameters(), lr=LR)

    def step(x: torch.Tensor) -> torch.Tensor:
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x)
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        return out.fvu.detach() * (x - x.mean(0)).square().sum() / len(x)

    return step


def dictionary_learning(task: Task) -> Step:
    """The `update` of dictionary_learning's trainers."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    n_features, d_model = task.W.shape
    trainer = (BatchTopKTrainer if task.arch == "batchtopk" else TopKTrainer)(
        steps=task.n_steps,
        activation_dim=d_model,
        dict_size=n_features,
        k=task.k,
        layer=0,
        lm_name="none",
        lr=LR,
        warmup_steps=0,
        seed=0,
        device=str(task.device),
    )
    with torch.no_grad():
        trainer.ae.encoder.weight.copy_(task.W)
        trainer.ae.decoder.weight.copy_(task.W.T)
    count = itertools.count()
    return lambda x: trainer.update(next(count), x)


def sae_lens(task: Task, *, sparse: bool = False) -> Step:
    """The step of `sae_lens.training.sae_trainer.SAETrainer`."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    n_features, d_model = task.W.shape
    size: dict[str, Any] = {"d_in": d_model, "d_sae": n_features, "k": task.k, "device": str(task.device)}
    if task.arch == "batchtopk":
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**size, use_sparse_activations=sparse))
    else:
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**size, use_sparse_activations=sparse))
    with torch.no_grad():
        sae.W_enc.copy_(task.W.T)
        sae.W_dec.copy_(task.W)
    config = SAETrainerConfig(
        total_training_samples=4096 * task.n_steps,
        train_batch_size_samples=4096,
        lr=LR,
        lr_end=LR,
        device=str(task.device),
        dead_feature_window=NEVER_DEAD,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(config, sae, data_provider=iter(()))

    def step(x: torch.Tensor) -> torch.Tensor:
        out = trainer.step(x)
        trainer.n_training_steps += 1
        return out.losses["mse_loss"].detach()

    return step


def flex_sae(task: Task) -> Step:
    """The TopK loss of flex_sae, which has kernels and no trainer, under a plain encoder with Adam."""
    from flex_sae import triton_topk_sae_loss

    W_enc, W_dec = task.W.clone().requires_grad_(), task.W.clone().requires_grad_()
    b_enc = torch.zeros(len(task.W), device=task.device, requires_grad=True)
    b_dec = torch.zeros(task.W.shape[1], device=task.device, requires_grad=True)
    adam = torch.optim.Adam([W_enc, W_dec, b_enc, b_dec], lr=LR, fused=True)

    def step(x: torch.Tensor) -> torch.Tensor:
        value, index = functional.linear(x, W_enc, b_enc).relu().topk(task.k, dim=1, sorted=False)
        loss = triton_topk_sae_loss(index, W_dec, value, b_dec, x)
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))
        return loss.detach()

    return step


PEERS = [
    Peer(name="scsae f32", make=lambda task: ours(task, "f32")),
    Peer(name="scsae bf16", make=lambda task: ours(task, "bf16")),
    Peer(name="scsae int8", make=lambda task: ours(task, "int8"), archs=("batchtopk",)),
    Peer(name="sparsify", make=sparsify, archs=("topk",)),
    Peer(name="dictionary_learning", make=dictionary_learning),
    Peer(name="SAELens", make=sae_lens),
    Peer(name="SAELens sparse", make=lambda task: sae_lens(task, sparse=True), archs=("topk",)),
    Peer(name="flex_sae", make=flex_sae, archs=("topk",), only_on="cuda"),
]


def tried(device: str, names: list[str] | None) -> tuple[dict[str, tuple[str, Peer]], dict[str, str]]:
    """(architecture, peer) of every step that runs here, by its label, and the reason why each of the others does not.

    Each does two steps of a small size.
    """
    runs, missing = {}, {}
    small = planted(64, 16, 32, 4).to(device)
    for peer in PEERS:
        if names is not None and not peer.name.startswith("scsae") and peer.name not in names:
            continue
        for arch in peer.archs:
            label = f"{peer.name}, {arch}"
            if peer.only_on not in (None, device):
                missing[label] = f"runs on {peer.only_on} alone"
                continue
            try:
                with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                    warnings.simplefilter("ignore")
                    step = peer.make(Task(W=unit_rows(32, 16).to(device), k=4, arch=arch, n_steps=3))
                    step(small)
                    step(small)
                runs[label] = (arch, peer)
            except Exception as error:  # noqa: BLE001  a broken package must not end the comparison of the others
                missing[label] = f"{type(error).__name__}: {str(error).splitlines()[0].split('. ')[0]}"
    return runs, missing


def time_shape(
    shape: tuple[int, int, int, int],
    runs: dict[str, tuple[str, Peer]],
    device: str,
    repeats: int,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """Milliseconds of each step in each turn, and on a GPU its peak memory in GiB."""
    n_tokens, d_model, n_features, k = shape
    x = planted(n_tokens, d_model, n_features, k).to(device)
    W = unit_rows(n_features, d_model).to(device)
    tasks = {label: (peer, Task(W=W, k=k, arch=arch, n_steps=10**6)) for label, (arch, peer) in runs.items()}
    steps = {label: peer.make(task) for label, (peer, task) in tasks.items()}
    functions: list[Callable[[], object]] = [partial(step, x) for step in steps.values()]
    for function in functions:
        for _ in range(WARM_UP):
            function()
    turns = in_turn([*functions, product(x, n_features)], repeats, clock)
    result: dict[str, Any] = {"shape": shape, "ms": dict(zip([*steps, "product"], turns, strict=True))}
    if device == "cuda":
        del functions, steps
        result["peak_gib"] = {
            label: peak_gib(lambda peer=peer, task=task: partial(peer.make(task), x))
            for label, (peer, task) in tasks.items()
        }
    return result


def compare_losses(
    shape: tuple[int, int, int, int], runs: dict[str, tuple[str, Peer]], device: str, n_steps: int
) -> dict[str, float]:
    """The mean squared error of the last steps of each, trained on the same fresh batches."""
    n_tokens, d_model, n_features, k = shape
    data = planted(n_tokens * 32, d_model, n_features, k).to(device)
    W = unit_rows(n_features, d_model).to(device)
    steps = {label: peer.make(Task(W=W, k=k, arch=arch, n_steps=n_steps + 1)) for label, (arch, peer) in runs.items()}
    errors: dict[str, list[float]] = {label: [] for label in steps}
    generator = torch.Generator().manual_seed(1)
    for _ in range(n_steps):
        x = data[torch.randint(len(data), (n_tokens,), generator=generator).to(device)]
        for label, step in steps.items():
            errors[label].append(float(step(x)))
    return {label: statistics.mean(values[-LAST:]) for label, values in errors.items()}


def unit_rows(n_features: int, d_model: int) -> torch.Tensor:
    """Random unit directions."""
    return functional.normalize(torch.randn(n_features, d_model, generator=torch.Generator().manual_seed(0)), dim=1)


def ratio(turns: dict[str, list[float]], slow: str, fast: str) -> float:
    """The median over the turns of how many times longer one took than the other."""
    return statistics.median(a / b for a, b in zip(turns[slow], turns[fast], strict=True))


def timing_table(results: list[dict[str, Any]]) -> list[str]:
    """The medians of all steps as Markdown, as multiples of each way that our BatchTopK step is done here."""
    own = [label for label in results[0]["ms"] if label.startswith("scsae") and label.endswith(", batchtopk")]
    lines = [
        f"| B / d / F / k | step | ms | {' | '.join(f'times {label}' for label in own)} | peak GiB |",
        "|---|---|---|---|" + "---|" * len(own),
    ]
    for result in results:
        turns = result["ms"]
        shape = " / ".join(map(str, result["shape"]))
        for label in turns:
            peak = f"{result['peak_gib'][label]:.2f}" if label in result.get("peak_gib", {}) else ""
            against = [f"{ratio(turns, label, one):.2f}" for one in own]
            cells = [shape, label, f"{statistics.median(turns[label]):.1f}", *against, peak]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def loss_table(shape: tuple[int, int, int, int], n_steps: int, losses: dict[str, float]) -> list[str]:
    """The losses as Markdown, with their difference from our step of the same architecture."""
    lines = [f"Loss at B / d / F / k {' / '.join(map(str, shape))} after {n_steps} steps, mean of the last {LAST}:", ""]
    lines += ["| step | squared error | scsae f32 less this |", "|---|---|---|"]
    for label, loss in losses.items():
        own = losses[f"scsae f32, {label.split(', ')[-1]}"]
        lines.append(f"| {label} | {loss:.5f} | {own / loss - 1:+.2%} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shape", type=int, nargs=4, action="append", metavar=("B", "D", "F", "K"))
    parser.add_argument("--only", action="append", help="names of steps, such as sparsify; default: all")
    parser.add_argument("--loss-steps", type=int, default=0, help="compare losses after so many steps and time nothing")
    parser.add_argument("--out", type=Path, help="folder for peers.json and peers.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    on_gpu = options.device == "cuda"
    clock = device_clock if on_gpu else time.perf_counter
    runs, missing = tried(options.device, options.only)
    for name, reason in missing.items():
        print(f"{name} is left out: {reason}")
    facts = machine_facts(*PACKAGES.values())
    results: list[dict[str, Any]] = []
    lines: list[str] = []
    for shape in options.shape or (CUDA_SHAPES if on_gpu else SHAPES):
        started = time.perf_counter()
        if options.loss_steps:
            losses = compare_losses(tuple(shape), runs, options.device, options.loss_steps)
            results.append({"shape": shape, "n_steps": options.loss_steps, "loss": losses})
            lines += [*loss_table(tuple(shape), options.loss_steps, losses), ""]
        else:
            results.append(time_shape(tuple(shape), runs, options.device, options.repeats, clock))
        print(f"{shape} took {time.perf_counter() - started:.0f} s", flush=True)
    table = "\n".join([*(lines or [*timing_table(results), ""]), as_markdown(facts)])
    print(table)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        report = {"machine": facts, "missing": missing, "results": results}
        (options.out / "peers.json").write_text(json.dumps(report, indent=1))
        (options.out / "peers.md").write_text(table + "\n")


if __name__ == "__main__":
    main()
