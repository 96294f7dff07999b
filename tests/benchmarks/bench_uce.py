"""Speed of reading one layer of a UCE of 4 layers with random weights on a data set; d 1280 unless --width divides it.

    python tests/benchmarks/bench_uce.py --data FILE.h5ad --cells 4 --repeats 2 --threads 2

The baseline is the stock way: sentences padded to 1,536 positions, as the authors' loader pads them, every token
projected from its row of the table, `nn.TransformerEncoder` in fp32 with all layers, a forward hook on the layer.
Ours: `FoundationModel.activations` in fp32 and with bf16 autocast. They take turns; a figure is the fastest of the
repeats. Real tokens are counted, padding never. Places on chromosomes and protein vectors are random.
"""

from __future__ import annotations

import platform
import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from bench_scfm import fastest, parser_of
from torch import nn
from torch.nn.functional import normalize

from feature_store.cells import open_source
from sae_core.scfm import UCE, Site, Tokens, UCEConfig, Vocabulary
from sae_core.scfm.uce.network import N_HEADS
from sae_core.scfm.uce.table import TokenTable
from sae_core.scfm.uce.tokenizer import CLS_ID, N_SPECIAL, PAD_ID, UCETokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SITE = Site(kind="layer", index=2)
N_CHROMOSOMES, N_POSITIONS = 24, 1536


def random_uce(symbols: Sequence[str], *, width: int) -> UCE:
    """A model of width 1280 / `width` with these genes, each at a random place of a random chromosome."""
    rng, n_genes = np.random.default_rng(0), len(symbols)
    first = N_SPECIAL + n_genes
    names = ("<pad>", "<open>", "<end>", "<cls>", *symbols, *(f"<chromosome {i}>" for i in range(N_CHROMOSOMES)))
    chromosome = np.full(len(names), -1)
    chromosome[N_SPECIAL:first] = first + rng.integers(N_CHROMOSOMES, size=n_genes)
    config = UCEConfig(
        n_layers=4,
        d_model=1280 // width,
        d_token=5120 // width,
        d_hidden=5120 // width,
        d_first=1024,
        d_output=1280,
        n_positions=N_POSITIONS,
    )
    vocabulary = Vocabulary(tokens=names, special=frozenset(names) - set(symbols))
    tokenizer = UCETokenizer(
        chromosome=chromosome, start=rng.random(len(names)), n_draws=config.n_draws, max_positions=N_POSITIONS
    )
    table = TokenTable(rows=torch.randn(len(names), config.d_token, generator=torch.Generator().manual_seed(0)))
    model = UCE(config, vocabulary, table, tokenizer).eval().requires_grad_(False)
    model.reset_weights(seed=0)
    model.pos_encoder.pe.zero_()
    return model


class Stock(nn.Module):
    """A stock encoder over padded sentences, a hook that keeps one layer's output."""

    def __init__(self, model: UCE, *, batch_cells: int = 4) -> None:
        super().__init__()
        c = model.config
        layer = nn.TransformerEncoderLayer(c.d_model, N_HEADS, c.d_hidden, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, c.n_layers, enable_nested_tensor=False).eval().requires_grad_(False)
        state = model.transformer_encoder.state_dict()
        self.encoder.load_state_dict({k.replace("Wqkv.", "in_proj_"): v for k, v in state.items()})
        self.encoder.layers[SITE.index].register_forward_hook(lambda module, args, out: self.kept.append(out))
        self.model, self.batch_cells = model, batch_cells
        self.kept: list[torch.Tensor] = []

    @torch.no_grad()
    def activations(self, tokens: Tokens) -> torch.Tensor:
        """Activations of every real token at the site."""
        out = []
        for start in range(0, tokens.n_cells, self.batch_cells):
            lengths = tokens.lengths[start : start + self.batch_cells]
            real = torch.from_numpy(np.arange(N_POSITIONS) < lengths[:, None])
            ids = torch.full(real.shape, PAD_ID)
            ids[real] = torch.from_numpy(tokens.gene_id[tokens.offsets[start] : tokens.offsets[start + len(lengths)]])
            rows = normalize(self.model.table.rows[ids], dim=-1)
            self.kept.clear()
            self.encoder(self.model.encoder(rows) * self.model.d_model**0.5, src_key_padding_mask=~real)
            out.append(self.kept[0][real])
        return torch.cat(out)


def main() -> None:
    """Run and print the table."""
    parser = parser_of(__doc__, cells=4, repeats=2)
    parser.add_argument("--width", type=int, default=1, help="divides every width of the network")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    source = open_source(options.data)
    model = random_uce(tuple(dict.fromkeys(map(str.upper, source.gene_symbols))), width=options.width)
    rows = source.read_rows(0, options.cells)
    match = model.match_genes(source.gene_symbols)

    def tokenize() -> Tokens:
        return model.tokenize(rows.indptr, rows.indices, rows.data, match, seed=0)

    tokens, stock = tokenize(), Stock(model)
    assert tokens.gene_id[0] == CLS_ID

    def ours(autocast: torch.dtype | None) -> torch.Tensor:
        model.autocast = autocast
        return model.activations(tokens, [SITE])[SITE]

    exact = ours(None)
    difference = float((exact - stock.activations(tokens)).abs().max())
    error = float((ours(torch.bfloat16) - exact).double().norm() / exact.double().norm())
    clock = time.process_time if options.cpu_time else time.perf_counter
    runs: list[Callable[[], object]] = [lambda: stock.activations(tokens), lambda: ours(None)]
    runs += [lambda: ours(torch.bfloat16), tokenize]
    baseline, fp32, bf16, tokenization = fastest(runs, options.repeats, clock)
    n, unit = tokens.n_tokens, "CPU s" if options.cpu_time else "s"
    print(f"{platform.processor() or platform.machine()}, {options.threads} threads, torch {torch.__version__}")
    print(f"{source.paths[0].name}: {tokens.n_cells} cells, {n} tokens; UCE 4 layers, d {model.d_model}, site {SITE}")
    for name, seconds in (("stock, padded, fp32", baseline), ("ours, fp32", fp32), ("ours, bf16 autocast", bf16)):
        print(f"{name:24}{n / seconds:10.0f} tokens/{unit}{baseline / seconds:8.2f}")
    print(f"largest difference to the baseline, fp32: {difference:.2e}; relative error of bf16: {error:.2e}")
    padding = 1 - n / tokens.n_cells / N_POSITIONS
    print(f"tokenization: {tokenization / tokens.n_cells * 1e3:.2f} ms a cell; the baseline's padding: {padding:.1%}")


if __name__ == "__main__":
    main()
