"""The six architectures, PCA, ICA and random directions in a world of known features, as a Markdown table.

    python tests/benchmarks/bench_world.py [--features 16384 --d-model 768 --width 16384 --k 34 --steps 3000]

`planted_world` has the world and what recovery, splitting and absorption are. All see the same batches, drawn as they
go, so that memory is that of one batch. Standard and Gated have no k: their L1 coefficient is searched first.
"""

from __future__ import annotations

import argparse
import time

import torch
from bench_quality import Data, coefficient_for
from planted_world import World, recovery

from sae_core.sae import ARCHITECTURES, Normaliser, SAEConfig, TrainConfig, Trainer, evaluate, fit_baseline
from sae_core.sae.objectives import GATE_L1, L1

HELD_OUT, FIT_TOKENS, SEARCH_STEPS = 16_384, 65_536, 300
FIRST_HELD_OUT, FIRST_FIT = 1_000_000, 2_000_000
"""Seeds of the batches that nothing was trained on, and of those that baselines are fitted to."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=16_384, help="features of the world")
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--l0", type=float, default=34.0)
    parser.add_argument("--width", type=int, help="features of the autoencoders; default: those of the world")
    parser.add_argument("--k", type=int, nargs="+", default=[34])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    parser.add_argument("--baseline", nargs="*", default=["pca", "ica", "random"])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    world = World(options.features, options.d_model, l0=options.l0)
    width = options.width or options.features
    held_out = world.sample(HELD_OUT, FIRST_HELD_OUT)
    fit = torch.cat([world.sample(4096, FIRST_FIT + i).x for i in range(FIT_TOKENS // 4096)])
    normaliser = Normaliser.fit(fit.split(4096))
    print(f"world of {options.features} features, d {options.d_model}, L0 {float(world.density.sum()):.1f}; F {width},")
    print(f"{options.steps} steps of {options.batch} tokens, {options.threads} threads\n")
    print("| | k | FVU | dead | cosine | recovered | precision | recall | split | absorption | CPU s |")
    print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    judge = held_out.x.split(4096)

    def row(name: str, k: int, sae: torch.nn.Module, seconds: float) -> None:
        metrics = evaluate(sae, judge)
        codes = torch.cat([sae.encode(x).to_dense() > 0 for x in judge])
        found = recovery(world, torch.nn.functional.normalize(sae.W_dec, dim=1), codes, held_out.active)
        numbers = " | ".join(f"{value:.3f}" for value in found)
        print(
            f"| {name} | {k} | {metrics.fvu:.3f} | {metrics.dead_fraction:.3f} | {numbers} | {seconds:.0f} |",
            flush=True,
        )

    for k in options.k:
        for kind in options.baseline:
            clock = time.process_time()
            made = fit_baseline(kind, fit, judge, k=k, n_features=width, seed=1).sae
            row(kind, k, made, time.process_time() - clock)
        for arch in options.arch:
            clock = time.process_time()
            config = SAEConfig(d_model=options.d_model, n_features=width, k=k, arch=arch)
            if not {L1, GATE_L1}.isdisjoint(ARCHITECTURES[arch].objective):
                data = Data(fit, held_out.x, None)
                steps = min(SEARCH_STEPS, options.steps)
                value = coefficient_for(config, data, normaliser, n_steps=steps, size=options.batch)
                config = SAEConfig.from_dict(config.to_dict() | {"l1_coefficient": value})
            trainer = Trainer(config, TrainConfig(n_steps=options.steps, batch_size=options.batch), normaliser)
            for step in range(options.steps):
                trainer.step(world.sample(options.batch, step).x)
            row(arch, k, trainer.finish(judge), time.process_time() - clock)


if __name__ == "__main__":
    main()
