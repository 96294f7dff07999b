"""Cells per second of a full-size Nicheformer with random weights, against torch's layers on cells of 1,500 places.

    python tests/benchmarks/bench_nicheformer.py --data $SCSAE_DATA/kang18_ifnb_2000x9015_counts.h5ad
        [--cells 4] [--layers 12] [--repeats 2] [--threads 2] [--cpu-time]

Baseline: the same weights in stock `nn.TransformerEncoderLayer`s in evaluation mode, every cell padded to 1,500 places
and all layers, as the authors' code runs it. Ours: the layer in the middle read, the mean over the genes, and the
official embedding, which takes the padding in. The reference is the genes of the data, and the means are 1. Tokens are
timed for both orders of ties. Everything takes turns, and a figure is the fastest of the repeats.
"""

from __future__ import annotations

import platform
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from bench_scfm import fastest, parser_of
from torch import nn

from feature_store.cells import open_source
from sae_core.scfm import Nicheformer, NicheformerConfig, Tokens, Vocabulary
from sae_core.scfm.nicheformer.context import FIELDS, Context
from sae_core.scfm.nicheformer.tokenizer import N_AUXILIARY, NicheformerTokenizer, TechnologyMeans

if TYPE_CHECKING:
    from collections.abc import Callable

PLACES, HEADS, HIDDEN = 1500, 16, 1024


def stock_layers(model: Nicheformer) -> nn.ModuleList:
    """The weights of the model in torch's own layers."""
    layers = nn.ModuleList()
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(model.d_model, HEADS, HIDDEN, batch_first=True, layer_norm_eps=1e-12)
        layer.load_state_dict({key.replace("Wqkv.", "in_proj_"): value for key, value in block.state_dict().items()})
        layers.append(layer)
    return layers.eval().requires_grad_(False)


@torch.no_grad()
def stock_embedding(model: Nicheformer, layers: nn.ModuleList, tokens: Tokens) -> torch.Tensor:
    """The official embedding by torch's layers."""
    real = torch.from_numpy(np.arange(PLACES) < tokens.lengths[:, None])
    ids = torch.ones(real.shape, dtype=torch.int64)
    ids[real] = torch.from_numpy(tokens.gene_id)
    x = model.input_embedding(ids, torch.zeros(real.shape))
    for layer in layers:
        x = layer(x, src_key_padding_mask=~real)
    return x[:, 3:].mean(1)


def main() -> None:
    """Run and print the table."""
    parser = parser_of(__doc__, cells=4, repeats=2)
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    source = open_source(options.data)
    genes = tuple(dict.fromkeys(source.gene_symbols))
    auxiliary = tuple(f"<{i}>" for i in range(N_AUXILIARY))
    vocabulary = Vocabulary(tokens=(*auxiliary, *genes), special=frozenset(auxiliary))
    sizes = {"n_layers": options.layers, "n_heads": HEADS, "d_model": 512, "d_hidden": HIDDEN, "max_positions": PLACES}
    config = NicheformerConfig(**sizes, n_tokens=len(vocabulary), has_token_of=dict.fromkeys(FIELDS, True))
    means = TechnologyMeans({}, np.ones(len(genes)))
    by_id = NicheformerTokenizer(context=Context(), means=means, max_positions=PLACES)
    model = Nicheformer(config, vocabulary, by_id).eval().requires_grad_(False)
    model.reset_weights(seed=0)
    match, rows = model.match_genes(source.gene_symbols), source.read_rows(0, options.cells)

    def tokenize(tokenizer: NicheformerTokenizer) -> Tokens:
        return tokenizer(rows.indptr, rows.indices, rows.data, match)

    tokens, layers = tokenize(by_id), stock_layers(model)
    difference = (stock_embedding(model, layers, tokens) - model.embed(tokens, readout="official")).abs().max()
    site = f"layer.{options.layers // 2}"
    upstream = replace(by_id, ties="upstream")
    runs: dict[str, Callable[[], object]] = {
        "stock, 1,500 places, official": lambda: stock_embedding(model, layers, tokens),
        "ours, official": lambda: model.embed(tokens, readout="official"),
        "ours, mean over the genes": lambda: model.embed(tokens, readout="mean"),
        f"ours, activations at {site}": lambda: model.activations(tokens, [site]),
        "tokens, ties by id": lambda: tokenize(by_id),
        "tokens, ties as upstream": lambda: tokenize(upstream),
    }
    seconds = fastest(
        list(runs.values()), options.repeats, time.process_time if options.cpu_time else time.perf_counter
    )
    print(f"{platform.processor() or platform.machine()}, {options.threads} threads, torch {torch.__version__}")
    print(f"{tokens.n_cells} cells of {source.paths[0].name}, {tokens.n_tokens} tokens; {options.layers} layers, d 512")
    for name, took in zip(runs, seconds, strict=True):
        print(f"{name:32}{took / tokens.n_cells * 1e3:10.1f} ms a cell{seconds[0] / took:10.2f}")
    print(f"largest difference of the official embedding: {difference:.1e}")


if __name__ == "__main__":
    main()
