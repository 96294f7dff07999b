"""What `scsae inputs` costs: one feature in one cell, with its gradient and with each of its genes left out.

    python tests/benchmarks/bench_inputs.py [--tokens 60 240 1000] [--genes 100] [--cells 20] [--threads 1]

A pass is a forward pass of one cell up to the site, one cell at a time, in the same run. A cell without a gene is one
pass over one token less, so that n genes cost n passes, if a batch were no faster than its cells one by one; the
gradient is one pass and one back. Cells and the autoencoder (random directions, 1,024 features, a threshold that lets
some 32 fire) are generated; the model is mini, the site layer 2. Last column: CPU minutes of 1,024 features in 64
`select` and 64 `test` cells each, if no two of a shard share a cell. Markdown.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from bench_effects import N_FEATURES, SITE, autoencoder, cells_of

from sae_core.effects import CellInputs
from sae_core.scfm import load_model

CELLS = 64


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[60, 240, 1000])
    parser.add_argument("--genes", type=int, default=100)
    parser.add_argument("--cells", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_model("mini")
    print(
        "| tokens | pass to the site ms | gradient ms | genes left out | feature in a test cell ms | passes | CPU min |"
    )
    print("|---|---|---|---|---|---|---|")
    for n_tokens in options.tokens:
        cells = cells_of(model, options.cells, n_tokens)
        sae = autoencoder(model, cells[0], SITE)
        rng, n_left_out = np.random.default_rng(0), min(options.genes, n_tokens)
        forward, gradient, without = 0.0, 0.0, 0.0
        for tokens in cells:
            feature = int(CellInputs(model, tokens, sae, SITE, range(N_FEATURES)).total.argmax())
            began = time.process_time()
            sae.encode(next(iter(model.activations(tokens, [SITE]).values())))
            forward += time.process_time() - began
            began = time.process_time()
            cell = CellInputs(model, tokens, sae, SITE, [feature])
            cell.attributions()
            gradient += time.process_time() - began
            began = time.process_time()
            cell.totals_without(1 + np.sort(rng.choice(n_tokens, n_left_out, replace=False)))
            without += time.process_time() - began
        forward, gradient, without = (1e3 * total / len(cells) for total in (forward, gradient, without))
        minutes = N_FEATURES * CELLS * (2 * gradient + without) / 60e3
        print(
            f"| {n_tokens} | {forward:.1f} | {gradient:.1f} | {n_left_out} | {gradient + without:.0f} | "
            f"{(gradient + without) / forward:.0f} | {minutes:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
