"""What steering costs: N interventions on the same cells, in forwards of the whole model.

    python tests/benchmarks/bench_steering.py [--cells 8] [--variants 20] [--features 50] [--repeats 3] [--threads 1]
        [--model mini-240 mini-1200 large-600]

A forward is `FoundationModel.embeddings` of the same cells at the last layer, one cell at a time, in the same run; the
bound is 1 + N (L - l) / L of them, with l the blocks before the site. Timed is `SteeredModel`, made anew, and the
embeddings of N variants that move 50 features on every token of every cell (shift by group and gene), so that nothing
can be left out; and ablation of 50 features. Encoding is part of it and no part of the bound. They take turns; a figure
is the fastest of the repeats, in CPU seconds of this process. Last column: the same forward in batches of 8192 tokens.
Cells and the autoencoder (random directions, about 32 active features) are generated; the large model has 12 layers of
width 256 with random weights. Markdown on stdout.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from sae_core.sae import SAEConfig, SparseAutoencoder
from sae_core.scfm import FoundationModel, ScGPT, ScGPTConfig, Site, Tokens, Vocabulary, load_model
from sae_core.scfm.scgpt.network import init_weights
from sae_core.steering import Ablate, GroupMeans, Shift, SteeredModel, Steering

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sae_core.steering import Intervention

N_GENES, N_GROUPS, L0 = 2000, 2, 32


class Setting(NamedTuple):
    """A model and the length of its cells."""

    name: str
    model: FoundationModel
    length: int
    n_features: int


def settings(names: Sequence[str]) -> list[Setting]:
    """The models by name."""
    found = []
    for name in names:
        kind, _, length = name.partition("-")
        found.append(Setting(name, load_model("mini") if kind == "mini" else large(), int(length), 2048))
    return found


def large() -> ScGPT:
    """A scGPT of 12 layers of width 256 with random weights."""
    vocabulary = Vocabulary(tokens=(*(f"GENE{i}" for i in range(N_GENES)), "<pad>", "<cls>", "<eoc>"))
    config = ScGPTConfig(n_layers=12, n_heads=8, d_model=256, d_hidden=512)
    model = ScGPT.empty(config, vocabulary, n_tokens=len(vocabulary)).requires_grad_(False)
    init_weights(model, seed=0)
    return model


def cells(model: FoundationModel, n_cells: int, length: int) -> Tokens:
    """Cells of `length` tokens, <cls> the first, of random genes and bins."""
    rng = np.random.default_rng(0)
    gene_id = np.stack([rng.choice(N_GENES, length, replace=False) for _ in range(n_cells)])
    gene_id[:, 0] = model.vocabulary.id_of("<cls>")
    value = rng.integers(1, 51, gene_id.shape).astype(np.float32)
    value[:, 0] = -2
    is_special = np.zeros(gene_id.shape, dtype=bool)
    is_special[:, 0] = True
    return Tokens(
        offsets=np.arange(n_cells + 1) * length,
        gene_id=gene_id.ravel(),
        value=value.ravel(),
        is_special=is_special.ravel(),
    )


def autoencoder(x: torch.Tensor, n_features: int) -> SparseAutoencoder:
    """Random directions with one threshold, which about `L0` features of a token pass."""
    sae = SparseAutoencoder(SAEConfig(d_model=x.shape[1], n_features=n_features, k=L0)).requires_grad_(False)
    sae.mu.copy_(x.mean(0))
    sae.scale.copy_((x - x.mean(0)).square().sum(1).mean().sqrt())
    pre = sae.pre_activations(sae.normalise(x[:512]))
    sae.theta.fill_(float(pre.quantile(1 - L0 / n_features, dim=1).mean()))
    return sae.folded()


def variants(sae: SparseAutoencoder, n_cells: int, n: int, n_chosen: int) -> dict[str, list[Intervention]]:
    """Of each kind, n interventions on other features each."""
    group, gene = (a.flatten() for a in torch.meshgrid(torch.arange(N_GROUPS), torch.arange(N_GENES), indexing="ij"))
    groups = torch.arange(n_cells) % N_GROUPS
    made: dict[str, list[Intervention]] = {"shift": [], "ablate": []}
    for i in range(n):
        generator = torch.Generator().manual_seed(i)
        features = torch.randperm(sae.config.n_features, generator=generator)[:n_chosen].sort().values.tolist()
        values = torch.randn(len(group), n_chosen, generator=generator)
        difference = GroupMeans(group=group, gene_id=gene, values=values)
        made["shift"].append(Shift(features=features, difference=difference, group_of_cell=groups))
        made["ablate"].append(Ablate(features=features))
    return made


def fastest(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """CPU seconds of the fastest call of each, taking turns after one call to warm up."""
    best = dict.fromkeys(runs, np.inf)
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            began = time.process_time()
            run()
            if repeat:
                best[name] = min(best[name], time.process_time() - began)
    return best


def encode(sae: SparseAutoencoder, x: torch.Tensor, length: int) -> None:
    """Codes, one cell at a time."""
    for part in torch.split(x, length):
        sae.encode(part)


def steer(
    model: FoundationModel, tokens: Tokens, sae: SparseAutoencoder, site: Site, chosen: list[Intervention]
) -> None:
    """Prepare, and embed the cells under every intervention."""
    steered = SteeredModel(model, tokens, sae, site)
    for intervention in chosen:
        steered.embeddings(Steering(sae=sae, intervention=intervention), [model.sites[-1]])


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=8)
    parser.add_argument("--variants", type=int, default=20)
    parser.add_argument("--features", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", nargs="+", default=["mini-240", "mini-1200", "large-600"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        "| cells | site | intervention | forwards | of which encoding | bound | ratio | one forward, s | in batches |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, model, length, n_features in settings(options.model):
        tokens, last = cells(model, options.cells, length), model.sites[-1]
        blocks = sorted({0, model.n_layers // 2 - 1, model.n_layers - 2})
        for site in (Site(kind="layer", index=index) for index in blocks):
            sae = autoencoder(model.activations(tokens, [site])[site], n_features)
            made = variants(sae, options.cells, options.variants, options.features)

            forward = partial(model.embeddings, tokens, [last])
            runs: dict[str, Callable[[], object]] = {
                "one": partial(forward, max_batch_tokens=1),
                "batch": partial(forward, max_batch_tokens=8192),
            }
            runs["encode"] = partial(encode, sae, model.activations(tokens, [site])[site], length)
            for kind, chosen in made.items():
                runs[kind] = partial(steer, model, tokens, sae, site, chosen)
            took = fastest(runs, options.repeats)
            bound = 1 + options.variants * (model.n_layers - (site.n_blocks or 0)) / model.n_layers
            for kind in made:
                forwards = took[kind] / took["one"]
                print(
                    f"| {name} | {site} | {kind} | {forwards:.2f} | {took['encode'] / took['one']:.2f} | {bound:.2f} | "
                    f"{forwards / bound:.2f} | {took['one']:.3f} | {took['batch']:.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
