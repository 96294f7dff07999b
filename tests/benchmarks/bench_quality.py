"""Quality of the six architectures on a planted dictionary or on stored activations, as a Markdown table.

    python tests/benchmarks/bench_quality.py planted [--features 512] [--d-model 256]
    python tests/benchmarks/bench_quality.py stored --activations STORE/activations/RUN
    python tests/benchmarks/bench_quality.py stored --arrays TRAIN.npy HELD_OUT.npy

All see the same batches. Standard and Gated have no k, so their L1 coefficient is searched first: short runs at three
coefficients in one `Sweep`, and the one that interpolates to L0 = k. Beside them stand the baselines of
`sae_core.sae.baselines` at L0 = k, and PCA with the first k components. FVU, L0 and the dead fraction are those of
held-out tokens (`select` cells of a store). Recovery: of a planted dictionary the mean over its directions of the
largest cosine with a decoder row, to be held against that of the random directions; of a store's activations that of
the model's embedding of some `select` cells with x_hat in the place of x (`pipelines.loss_recovered`).
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
    BASELINES,
    Metrics,
    Normaliser,
    SAEConfig,
    SparseAutoencoder,
    Sweep,
    SyntheticDictionary,
    TrainConfig,
    Trainer,
    evaluate,
    fit_baseline,
    mean_max_cosine,
)
from sae_core.sae.objectives import GATE_L1, L1

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

COEFFICIENTS = (0.1, 0.3, 0.9)
FIT_TOKENS = 65_536
SEARCH_SHARE = 0.2  # of the steps, for each coefficient that is tried


class Data(NamedTuple):
    """Tokens to train on, tokens to judge by, and what recovers: planted directions, or the embedding of cells."""

    train: Tensor
    held_out: Tensor
    recovery: Callable[[SparseAutoencoder], float] | None


def planted_data(options: argparse.Namespace) -> Data:
    planted = SyntheticDictionary(n_features=options.features, d_model=options.d_model, l0=float(options.k))
    directions = planted.directions
    return Data(
        planted.sample(options.tokens, 1), planted.sample(16_384, 2), lambda sae: mean_max_cosine(directions, sae.W_dec)
    )


def stored_data(options: argparse.Namespace) -> Data:
    if options.arrays:
        train, held_out = (torch.from_numpy(np.load(path)) for path in options.arrays)
        return Data(train, held_out[:32_768], None)
    from feature_store.activations import ActivationReader
    from feature_store.cells import SELECT, TRAIN, read_split_numbers
    from feature_store.storage import commit
    from feature_store.storage.layout import Layout
    from pipelines.training_loop import select_probe

    run = commit.Run.open(options.activations)
    reader, store = ActivationReader(run), options.activations.resolve().parents[1]
    split = read_split_numbers(Layout(store).cells_dir(run.plan["dataset"]))
    parts: dict[int, list[Tensor]] = {TRAIN: [], SELECT: []}
    for group in reader.row_groups:
        block = reader.read(group.shard, group.group)
        for which, found in parts.items():
            found.append(torch.from_numpy(block.act_f32()[split[block.cell_idx] == which]))
    probe = select_probe(run, str(store), split, n_cells=options.recovery_cells, seed=0, device="cpu")
    if isinstance(probe, str):
        print(f"no recovery: {probe}")
    measure = None if isinstance(probe, str) else lambda sae: probe.of(sae).embedding
    return Data(shuffled(parts[TRAIN], options.tokens), shuffled(parts[SELECT], 32_768), measure)


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


def first_components(data: Data, k: int) -> SparseAutoencoder:
    """PCA of rank k: its first components, each token has them all."""
    whole = fit_baseline("pca", data.train[:FIT_TOKENS], [data.held_out], k=k, n_features=k).sae
    rows = torch.cat([torch.arange(k), torch.arange(k) + whole.config.n_features // 2])
    sae = SparseAutoencoder(SAEConfig(d_model=whole.config.d_model, n_features=2 * k, k=k)).requires_grad_(False)
    sae.W_enc.copy_(whole.W_enc[rows])
    sae.W_dec.copy_(whole.W_dec[rows])
    sae.mu.copy_(whole.mu)
    sae.scale.copy_(whole.scale)
    return sae


def row(name: str, metrics: Metrics, match: float | None = None, note: str = "") -> str:
    dead, found = f"{100 * metrics.dead_fraction:.2f} %", "" if match is None else f"{match:.3f}"
    return f"| {name} | {metrics.fvu:.4f} | {metrics.l0:.1f} | {dead} | {found} | {note} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=["planted", "stored"])
    parser.add_argument("--activations", type=Path)
    parser.add_argument("--recovery-cells", type=int, default=32)
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
    width = options.width or (2 * options.features if options.data == "planted" else 8 * d_model)
    normaliser = Normaliser.fit(data.train[: 2**20].split(4096))
    print(f"{len(data.train)} tokens of d_model {d_model}, gamma {normaliser.gamma:.2f}; F {width}, k {options.k},")
    print(f"{options.steps} steps of {options.batch} tokens\n")
    print("| | FVU | L0 | dead | recovery | |\n|---|---|---|---|---|---|")
    base = SAEConfig(d_model=d_model, n_features=width, k=options.k)
    judge = data.held_out.split(4096)

    def match(sae: SparseAutoencoder) -> float | None:
        return None if data.recovery is None else data.recovery(sae)

    first = first_components(data, options.k)
    print(row("PCA, first k", evaluate(first, judge), match(first)), flush=True)
    for kind in BASELINES:
        fitted = fit_baseline(kind, data.train[:FIT_TOKENS], judge, k=options.k, n_features=width, seed=1)
        note = f"F {fitted.sae.config.n_features}"
        print(row(kind, evaluate(fitted.sae, judge), match(fitted.sae), note), flush=True)
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
