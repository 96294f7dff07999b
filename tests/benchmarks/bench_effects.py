"""What `scsae effects` and `scsae circuit` cost: one feature in one cell, with interventions and nulls.

    python tests/benchmarks/bench_effects.py [--tokens 60 240 1000] [--nulls 4] [--cells 40] [--threads 1]

A variant is one change of a cell's activations: 2 interventions times (the feature and two kinds of null), and the cell
unchanged. The bound is 1 + N (L - l) / L forward passes for N variants after l of L blocks; the yardstick is a forward
pass with the prediction of hidden genes, one cell at a time, in the same run. Cells and the autoencoder (random
directions, 1,024 features, a threshold that lets some 32 fire) are generated; the model is mini, the site layer 2. Last
column: CPU minutes of 1,024 features in 64 cells each, with the cells of 8 features read together, as the stage does.
The edges of `scsae circuit` are those to an autoencoder of layer 3: one intervention, and one block between. Markdown.
"""

from __future__ import annotations

import argparse
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from sae_core.effects import EffectSums, HiddenGenes, LaterCodes, LaterSums, add_cell, add_later, draw_directions
from sae_core.sae import SAEConfig, SparseAutoencoder
from sae_core.scfm import Site, Tokens, load_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sae_core.effects import CellAtSite, Directions
    from sae_core.scfm import FoundationModel

SITE, LATER_SITE, N_FEATURES, N_ACTIVE, TOGETHER = "layer.2", "layer.3", 1024, 32, 8


def cells_of(model: FoundationModel, n_cells: int, n_tokens: int) -> list[Tokens]:
    """Cells of `<cls>` and random genes with random bins."""
    rng, special = np.random.default_rng(0), model.vocabulary.id_of("<cls>")
    genes = np.setdiff1d(np.arange(model.vocabulary.n_genes), special)
    return [
        Tokens(
            offsets=np.array([0, n_tokens + 1]),
            gene_id=np.r_[special, rng.choice(genes, n_tokens, replace=False)].astype(np.int64),
            value=rng.integers(1, 50, n_tokens + 1).astype(np.float32),
            is_special=np.arange(n_tokens + 1) == 0,
        )
        for _ in range(n_cells)
    ]


def autoencoder(model: FoundationModel, cell: Tokens, site: str) -> SparseAutoencoder:
    """Random directions, with the threshold at which N_ACTIVE features fire in a token of the cell."""
    sae = SparseAutoencoder(
        SAEConfig(d_model=model.d_model, n_features=N_FEATURES, k=N_ACTIVE),
        generator=torch.Generator().manual_seed(0),
    )
    x = model.activations(cell, [site])[Site.parse(site)]
    with torch.no_grad():
        sae.theta.fill_(float(torch.quantile((x @ sae.W_enc.T)[1:], 1 - N_ACTIVE / N_FEATURES)))
    return sae.requires_grad_(False)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[60, 240, 1000])
    parser.add_argument("--nulls", type=int, default=4)
    parser.add_argument("--cells", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_model("mini")
    n_blocks = 1 + int(SITE.rpartition(".")[2])
    for title, n_interventions, n_after, measure in (
        ("effects on hidden genes", 2, model.n_layers - n_blocks, measure_effects),
        (f"edges to {LATER_SITE}", 1, int(LATER_SITE.rpartition(".")[2]) + 1 - n_blocks, measure_edges),
    ):
        n_variants = 1 + n_interventions * (1 + 2 * options.nulls)
        bound = 1 + n_variants * n_after / model.n_layers
        print(f"\n{title}\n")
        print("| tokens | forward ms | cell read ms | feature in a cell ms | forwards, of a bound of | CPU min |")
        print("|---|---|---|---|---|---|")
        for n_tokens in options.tokens:
            forward, read, move = measure(model, cells_of(model, options.cells, n_tokens), options.nulls)
            minutes = N_FEATURES * 64 * (move + read / TOGETHER) / 60
            print(
                f"| {n_tokens} | {1e3 * forward:.1f} | {1e3 * read:.1f} | {1e3 * move:.1f} | "
                f"{(read + move) / forward:.1f}, {bound:.1f} | {minutes:.1f} |",
                flush=True,
            )


def measure_effects(model: FoundationModel, cells: list[Tokens], n_nulls: int) -> tuple[float, float, float]:
    """CPU seconds of a forward pass, of reading a cell, and of one feature in it with both interventions."""
    sae = autoencoder(model, cells[0], SITE)
    clock = Clock()
    for tokens in cells:
        with clock("forward"):
            model.masked_gene_prediction(model.mask_genes(tokens, seed=0, fraction=model.mask_fraction))
        with clock("read"):
            cell = HiddenGenes(model, tokens, sae, SITE)
        for feature, directions in strongest(cell, n_nulls):
            sums = EffectSums(len(model.vocabulary), 1 + 2 * n_nulls)
            with clock("move"):
                add_cell(sums, cell, feature, directions, boosted=5.0, donor=0)
    return clock.mean("forward"), clock.mean("read"), clock.mean("move")


def measure_edges(model: FoundationModel, cells: list[Tokens], n_nulls: int) -> tuple[float, float, float]:
    """CPU seconds of a forward pass, of reading a cell, and of ablating one feature of it."""
    sae, later = autoencoder(model, cells[0], SITE), autoencoder(model, cells[0], LATER_SITE)
    clock = Clock()
    for tokens in cells:
        with clock("forward"):
            model.activations(tokens, [f"layer.{model.n_layers - 1}"])
        with clock("read"):
            cell = LaterCodes(model, tokens, sae, SITE, later_sae=later, later_site=LATER_SITE)
        for feature, directions in strongest(cell, n_nulls):
            sums = LaterSums(N_FEATURES, 1 + 2 * n_nulls)
            with clock("move"):
                add_later(sums, cell, feature, directions, donor=0)
    return clock.mean("forward"), clock.mean("read"), clock.mean("move")


def strongest(cell: CellAtSite, n_nulls: int) -> list[tuple[int, Directions]]:
    """The two strongest features of a cell, with their directions."""
    features = (cell.codes * cell.is_visible[:, None]).sum(0).argsort(descending=True)[:2].tolist()
    ones = torch.ones(N_FEATURES)
    return [(f, draw_directions(cell.sae.W_dec, f, ones, n_nulls=n_nulls, seed=0)) for f in features]


class Clock:
    """CPU seconds by name."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what is done inside."""
        began = time.process_time()
        yield
        self.spent.setdefault(name, []).append(time.process_time() - began)

    def mean(self, name: str) -> float:
        """The mean of the times of a name."""
        return float(np.mean(self.spent[name]))


if __name__ == "__main__":
    main()
