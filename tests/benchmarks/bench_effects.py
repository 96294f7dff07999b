"""What `scsae effects` costs: one feature in one cell, with both interventions and the nulls.

    python tests/benchmarks/bench_effects.py [--tokens 60 240 1000] [--nulls 4] [--cells 40] [--threads 1]

A variant is one change of a cell's activations: 2 interventions times (the feature and two kinds of null), and the cell
unchanged. The bound is 1 + N (L - l) / L forward passes for N variants after l of L blocks; the yardstick is a forward
pass with the prediction of hidden genes, one cell at a time, in the same run. Cells and the autoencoder (random
directions, 1,024 features, a threshold that lets some 32 fire) are generated; the model is mini, the site layer 2. Last
column: CPU minutes of 1,024 features in 64 cells each, with the cells of 8 features read together, as the stage does.
Markdown.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from sae_core.effects import EffectSums, HiddenGenes, add_cell, draw_directions
from sae_core.sae import SAEConfig, SparseAutoencoder
from sae_core.scfm import Site, Tokens, load_model

if TYPE_CHECKING:
    from sae_core.scfm import FoundationModel

SITE, N_FEATURES, N_ACTIVE, TOGETHER = "layer.2", 1024, 32, 8


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


def autoencoder(model: FoundationModel, cell: Tokens) -> SparseAutoencoder:
    """Random directions, with the threshold at which N_ACTIVE features fire in a token of the cell."""
    sae = SparseAutoencoder(
        SAEConfig(d_model=model.d_model, n_features=N_FEATURES, k=N_ACTIVE),
        generator=torch.Generator().manual_seed(0),
    )
    x = model.activations(cell, [SITE])[Site.parse(SITE)]
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
    n_variants = 1 + 2 * (1 + 2 * options.nulls)
    n_blocks = 1 + int(SITE.rpartition(".")[2])
    bound = 1 + n_variants * (model.n_layers - n_blocks) / model.n_layers
    print("| tokens | forward ms | cell read ms | feature in a cell ms | forwards, of a bound of | CPU min |")
    print("|---|---|---|---|---|---|")
    for n_tokens in options.tokens:
        cells = cells_of(model, options.cells, n_tokens)
        sae = autoencoder(model, cells[0])
        forward, read, move, moved = 0.0, 0.0, 0.0, 0
        for tokens in cells:
            began = time.process_time()
            model.masked_gene_prediction(model.mask_genes(tokens, seed=0, fraction=model.mask_fraction))
            forward += time.process_time() - began
            began = time.process_time()
            cell = HiddenGenes(model, tokens, sae, SITE)
            read += time.process_time() - began
            for feature in (cell.codes * cell.is_visible[:, None]).sum(0).argsort(descending=True)[:2].tolist():
                directions = draw_directions(sae.W_dec, feature, torch.ones(N_FEATURES), n_nulls=options.nulls, seed=0)
                sums = EffectSums(len(model.vocabulary), 1 + 2 * options.nulls)
                began = time.process_time()
                moved += add_cell(sums, cell, feature, directions, boosted=5.0, donor=0)
                move += time.process_time() - began
        forward, read, move = forward / len(cells), read / len(cells), move / max(moved, 1)
        minutes = N_FEATURES * 64 * (move + read / TOGETHER) / 60
        print(
            f"| {n_tokens} | {1e3 * forward:.1f} | {1e3 * read:.1f} | {1e3 * move:.1f} | "
            f"{(read + move) / forward:.1f}, {bound:.1f} | {minutes:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
