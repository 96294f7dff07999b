"""Quality of the six architectures on a planted dictionary or on stored activations, as a Markdown table.

    python tests/benchmarks/bench_quality.py planted [--features 512] [--d-model 256]
    python tests/benchmarks/bench_quality.py stored --activations STORE/activations/RUN --cells STORE/cells/DATASET
    python tests/benchmarks/bench_quality.py stored --arrays TRAIN.npy HELD_OUT.npy

All see the same batches. Standard and Gated have no k, so their L1 coefficient is searched first: short runs at three
coefficients in one `Sweep`, and the one that interpolates to L0 = k. Beside them stand PCA with the first k components,
PCA with each token's k largest coefficients, and an autoencoder with random directions whose threshold is calibrated to
k. FVU, L0 and the dead fraction are those of held-out tokens (`select` cells of a store). Recovery is the mean over
planted directions of the largest cosine with a decoder row, to be held against that of the random directions.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from sae_core.sae import (
    ARCHITECTURES,
    MetricAccumulator,
    Metrics,
    Normaliser,
    PlantedDictionary,
    SAEConfig,
    SparseAutoencoder,
    SparseCodes,
    Sweep,
    TrainConfig,
    Trainer,
    calibrate_threshold,
    calibrated_theta,
    evaluate,
    recovery,
)
from sae_core.sae.objectives import GATE_L1, L1

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

COEFFICIENTS = (0.1, 0.3, 0.9)
SEARCH_SHARE = 0.2  # of the steps, for each coefficient that is tried


class Data(NamedTuple):
    """Tokens to train on, tokens to judge by, and the planted directions if they are known."""

    train: Tensor
    held_out: Tensor
    directions: Tensor | None


def planted_data(options: argparse.Namespace) -> Data:
    planted = PlantedDictionary(n_features=options.features, d_model=options.d_model, l0=float(options.k))
    return Data(planted.sample(options.tokens, 1), planted.sample(16_384, 2), planted.directions)


def stored_data(options: argparse.Namespace) -> Data:
    if options.arrays:
        train, held_out = (torch.from_numpy(np.load(path)) for path in options.arrays)
        return Data(train, held_out[:32_768], None)
    from feature_store import commit, ingest
    from feature_store.activations import ActivationReader

    reader = ActivationReader(commit.Run.open(options.activations))
    split = ingest.read_cells(options.cells).get_column("split").to_numpy()
    parts: dict[str, list[Tensor]] = {"train": [], "select": []}
    for group in reader.row_groups:
        block = reader.read(group.shard, group.group)
        for name, found in parts.items():
            found.append(torch.from_numpy(block.act_f32()[split[block.cell_idx] == name]))
    return Data(shuffled(parts["train"], options.tokens), shuffled(parts["select"], 32_768), None)


def shuffled(parts: list[Tensor], n_tokens: int) -> Tensor:
    tokens = torch.cat(parts)
    return tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))[:n_tokens]]


def batches(x: Tensor, n_steps: int, size: int) -> Iterator[Tensor]:
    for step in range(n_steps):
        start = step % (len(x) // size) * size
        yield x[start : start + size]


def fit(configs: list[SAEConfig], data: Data, normaliser: Normaliser, *, n_steps: int, size: int) -> Sweep:
    sweep = Sweep([Trainer(config, TrainConfig(n_steps=n_steps, batch_size=size), normaliser) for config in configs])
    for x in batches(data.train, n_steps, size):
        sweep.step(x)
    return sweep


def coefficient_for(config: SAEConfig, data: Data, normaliser: Normaliser, *, n_steps: int, size: int) -> float:
    """The L1 coefficient whose L0 is k, by log-log interpolation between short runs."""
    configs = [SAEConfig.from_dict(config.to_dict() | {"l1_coefficient": value}) for value in COEFFICIENTS]
    sweep = fit(configs, data, normaliser, n_steps=n_steps, size=size)
    l0 = [sae.encode(data.held_out[:4096]).nnz / 4096 for sae in sweep.finish([])]
    order = np.argsort(l0)
    found = np.interp(math.log(config.k), np.log(np.maximum(l0, 1e-3))[order], np.log(COEFFICIENTS)[order])
    return float(np.exp(found))


def pca(data: Data, k: int) -> dict[str, MetricAccumulator]:
    """Rank-k PCA, and PCA from which each token takes the k components that it has most of."""
    mean = data.train.mean(dim=0)
    _, _, components = torch.linalg.svd(data.train[:65_536] - mean, full_matrices=False)
    score = (data.held_out - mean) @ components.T
    first = torch.zeros_like(score)
    first[:, :k] = score[:, :k]
    largest = torch.zeros_like(score).scatter(1, score.abs().topk(k, dim=1).indices, 1.0) * score
    found = {}
    for name, kept in {"PCA, first k": first, "PCA, k largest a token": largest}.items():
        found[name] = MetricAccumulator(score.shape[1], score.shape[1])
        found[name].update(data.held_out, kept @ components + mean, SparseCodes.from_dense(kept))
    return found


def random_sae(config: SAEConfig, data: Data, normaliser: Normaliser) -> SparseAutoencoder:
    sae = SparseAutoencoder(config, generator=torch.Generator().manual_seed(1)).requires_grad_(False)
    sae.mu.copy_(normaliser.mu)
    sae.scale.fill_(normaliser.scale)
    sae.theta.copy_(calibrated_theta(sae, calibrate_threshold(sae, data.held_out.split(4096))))
    return sae


def row(name: str, metrics: Metrics, match: float | None = None, note: str = "") -> str:
    dead, found = f"{100 * metrics.dead_fraction:.2f} %", "" if match is None else f"{match:.3f}"
    return f"| {name} | {metrics.fvu:.4f} | {metrics.l0:.1f} | {dead} | {found} | {note} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=["planted", "stored"])
    parser.add_argument("--activations", type=Path)
    parser.add_argument("--cells", type=Path)
    parser.add_argument("--arrays", type=Path, nargs=2, metavar=("TRAIN", "HELD_OUT"))
    parser.add_argument("--features", type=int, default=512, help="planted directions")
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=2**20)
    parser.add_argument("--width", type=int, help="features of the autoencoders; default: 2 x planted, or 8 d_model")
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = planted_data(options) if options.data == "planted" else stored_data(options)
    d_model = data.train.shape[1]
    width = options.width or (2 * options.features if data.directions is not None else 8 * d_model)
    normaliser = Normaliser.fit(data.train[: 2**20].split(4096))
    print(f"{len(data.train)} tokens of d_model {d_model}, gamma {normaliser.gamma:.2f}; F {width}, k {options.k},")
    print(f"{options.steps} steps of {options.batch} tokens\n")
    print("| | FVU | L0 | dead | recovery | |\n|---|---|---|---|---|---|")
    for name, accumulator in pca(data, options.k).items():
        print(row(name, accumulator.result()))
    base = SAEConfig(d_model=d_model, n_features=width, k=options.k)
    chance = random_sae(base, data, normaliser)
    judge = data.held_out.split(4096)

    def match(sae: SparseAutoencoder) -> float | None:
        return None if data.directions is None else recovery(data.directions, sae.W_dec)

    print(row("random directions", evaluate(chance, judge), match(chance)), flush=True)
    for arch in options.arch:
        config, clock = SAEConfig.from_dict(base.to_dict() | {"arch": arch}), time.process_time()
        if not {L1, GATE_L1}.isdisjoint(ARCHITECTURES[arch].objective):
            short = max(1, int(SEARCH_SHARE * options.steps))
            value = coefficient_for(config, data, normaliser, n_steps=short, size=options.batch)
            config = SAEConfig.from_dict(config.to_dict() | {"l1_coefficient": value})
        sweep = fit([config], data, normaliser, n_steps=options.steps, size=options.batch)
        (sae,) = sweep.finish(judge)
        note = f"{time.process_time() - clock:.0f} CPU s" + (
            f", l1 {config.l1_coefficient:.3f}" if config.l1_coefficient != base.l1_coefficient else ""
        )
        print(row(arch, evaluate(sae, judge), match(sae), note), flush=True)


if __name__ == "__main__":
    main()
