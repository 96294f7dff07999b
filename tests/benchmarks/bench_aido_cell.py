"""Tokens per second of reading one layer of a small AIDO.Cell with random weights, against the stock way, in one run.

    python tests/benchmarks/bench_aido_cell.py --data $SCSAE_DATA/kang18_ifnb_2000x9015_counts.h5ad
        [--cells 1] [--layers 4] [--repeats 1] [--threads 2] [--cpu-time]

The model has the official 19,264 genes and two depth places in every cell, and is narrow (d 128), because a CPU needs
minutes a cell at the published widths. Baseline: the same weights as torch functions, one cell at a time, query, key
and value apart, all layers, the output of the layer in the middle kept. Ours: `FoundationModel.activations` in fp32
and with bf16 autocast. They take turns, and a figure is the fastest of the repeats.
"""

from __future__ import annotations

import platform
import time
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from bench_scfm import fastest, parser_of
from torch import Tensor

from feature_store.cells import open_source
from sae_core.scfm import Site, Tokens, Vocabulary
from sae_core.scfm.aido_cell.network import AIDOCell, AIDOCellConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

N_GENES, D, HEADS = 19_264, 128, 4


def model_of(symbols: Sequence[str], *, n_layers: int) -> AIDOCell:
    """A model whose first genes are those of the data."""
    genes = (*symbols, *(f"<unmeasured {i}>" for i in range(N_GENES - len(symbols))))
    config = AIDOCellConfig(
        n_layers=n_layers,
        n_heads=HEADS,
        d_model=D,
        d_hidden=320,
        n_genes=N_GENES,
        n_bins=100,
        bin_alpha=1.0,
        eps=1e-5,
        norm="rms",
        has_bias=True,
        mask_value=-1.0,
        pad_value=-2.0,
        init_std=0.1,
    )
    model = AIDOCell(config, Vocabulary(tokens=genes)).eval().requires_grad_(False)
    model.reset_weights(seed=0)
    return model


@torch.no_grad()
def stock(model: AIDOCell, tokens: Tokens, layer: int) -> Tensor:
    """The output of a layer, from all layers of each cell by torch's functions."""
    out = []
    for cell in range(tokens.n_cells):
        here = slice(*tokens.offsets[cell : cell + 2].tolist())
        x = model.input_embedding(
            torch.from_numpy(tokens.gene_id[here])[None], torch.from_numpy(tokens.value[here])[None]
        )[0]
        for i, block in enumerate(model.blocks):
            h = F.rms_norm(x, (D,), block.norm1.weight, eps=1e-5)
            weights, biases = block.self_attn.Wqkv.weight.chunk(3), block.self_attn.Wqkv.bias.chunk(3)
            q, k, v = (
                F.linear(h, w, b).view(1, len(h), HEADS, -1).transpose(1, 2)
                for w, b in zip(weights, biases, strict=True)
            )
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(h), D)
            x = x + block.self_attn.out_proj(mixed)
            h = F.rms_norm(x, (D,), block.norm2.weight, eps=1e-5)
            x = x + block.linear2(F.silu(block.gate(h)) * block.linear1(h))
            if i == layer:
                out.append(x)
    return torch.cat(out)


def main() -> None:
    """Run and print the table."""
    parser = parser_of(__doc__, cells=1, repeats=1)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    source = open_source(options.data)
    model = model_of(list(dict.fromkeys(source.gene_symbols)), n_layers=options.layers)
    layer = options.layers // 2
    site = Site(kind="layer", index=layer)
    chosen = np.sort(np.random.default_rng(0).choice(source.n_cells, options.cells, replace=False))
    rows = source.read_cells(chosen)
    tokens = model.tokenize(rows.indptr, rows.indices, rows.data, model.match_genes(source.gene_symbols), seed=0)

    def ours(autocast: torch.dtype | None) -> Tensor:
        model.autocast = autocast
        return model.activations(tokens, [site])[site]

    exact = ours(None)
    difference = float((exact - stock(model, tokens, layer)).abs().max())
    error = float((ours(torch.bfloat16) - exact).double().norm() / exact.double().norm())
    runs: list[Callable[[], object]] = [lambda: stock(model, tokens, layer), lambda: ours(None)]
    runs += [lambda: ours(torch.bfloat16)]
    seconds = fastest(runs, options.repeats, time.process_time if options.cpu_time else time.perf_counter)
    print(f"{platform.processor() or platform.machine()}, {options.threads} threads, torch {torch.__version__}")
    print(f"{tokens.n_cells} cells, {tokens.n_tokens} tokens; {options.layers} layers, d {D}, site {site}")
    for name, took in zip(("stock, all layers, fp32", "ours, fp32", "ours, bf16 autocast"), seconds, strict=True):
        print(f"{name:24}{tokens.n_tokens / took:10.0f} tokens/s{seconds[0] / took:8.2f}")
    print(f"largest difference in fp32: {difference:.2e}; relative error of bf16: {error:.2e}")


if __name__ == "__main__":
    main()
