"""Tokens per second of reading one layer of a full-size scGPT or Tahoe-x1 70M, against what the field does, in one run.

    python tests/benchmarks/bench_scfm.py --data $SCSAE_DATA/kang18_ifnb_2000x9015_counts.h5ad
        [--family scgpt|tahoe] [--cells 64] [--repeats 3] [--threads 2] [--cpu-time] [--device cuda]

Baseline: the same weights in stock `nn.TransformerEncoder`, fp32, a forward hook on the layer, all 12 layers computed,
every cell padded to the longest of the data set (at most the model's own length), 8 cells a batch on a CPU, 64 on a
GPU. Ours: `FoundationModel.activations` in fp32 and with bf16 autocast. They take turns, so that another program on the
machine slows all; a figure is the fastest of the repeats. Cells are a seeded sample. Real tokens are counted, padding
never.
"""

from __future__ import annotations

import argparse
import platform
import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import nn

from feature_store.cells import Source, open_source
from sae_core.scfm import GeneMatch, ScGPT, ScGPTConfig, Site, Tahoe, TahoeConfig, Tokens, Vocabulary
from sae_core.scfm.batches import plan_batches

if TYPE_CHECKING:
    from collections.abc import Callable

SITE = Site(kind="layer", index=6)
Model = ScGPT | Tahoe


def full_size_scgpt(source: Source) -> ScGPT:
    """An scGPT of 12 layers with random weights, which knows the symbols of the data."""
    config = ScGPTConfig(n_layers=12, n_heads=8, d_model=512, d_hidden=512, max_seq_len=1200)
    vocabulary = Vocabulary(tokens=(*dict.fromkeys(source.gene_symbols), "<pad>", "<cls>", "<eoc>"))
    return ScGPT.empty(config, vocabulary, n_tokens=len(vocabulary))


def full_size_tahoe(source: Source) -> Tahoe:
    """A Tahoe-x1 of the size of 70M with random weights, which knows the symbols of the data."""
    config = TahoeConfig(
        n_layers=12,
        n_heads=8,
        d_model=512,
        d_hidden=2048,
        activation="relu",
        eps=1e-5,
        gene_norm=True,
        value_norm=True,
        value_activation="relu",
        max_value=512.0,
        head_layers=1,
        head_activation="leaky_relu",
        is_mvc_scaled=True,
        drug_activation=None,
        use_attn_mask=True,
        n_bins=51,
        right_binning=False,
        max_length=2048,
        pad_value=-2.0,
        mask_value=-1.0,
        mask_fraction=0.5,
        keep_first=1,
    )
    vocabulary = Vocabulary(tokens=("<pad>", "<cls>", "<eoc>", *dict.fromkeys(source.gene_symbols)))
    return Tahoe(config, vocabulary, n_rows=len(vocabulary)).eval()


class Stock(nn.Module):
    """The field's way: a stock encoder over padded cells, a hook that keeps one layer's output."""

    def __init__(self, model: Model, *, longest: int, batch_cells: int) -> None:
        super().__init__()
        c, block = model.config, model.blocks[0]
        layer = nn.TransformerEncoderLayer(
            c.d_model,
            c.n_heads,
            c.d_hidden,
            activation=block.activation,
            norm_first=block.norm_place == "pre",
            batch_first=True,
        )
        self.encoder = nn.TransformerEncoder(layer, c.n_layers, enable_nested_tensor=False).eval().requires_grad_(False)
        for own, theirs in zip(self.encoder.layers, model.blocks, strict=True):
            own.load_state_dict({k.replace("Wqkv.", "in_proj_"): v for k, v in theirs.state_dict().items()})
        self.encoder.layers[SITE.index].register_forward_hook(lambda module, args, out: self.kept.append(out))
        self.model, self.longest, self.batch_cells = model, longest, batch_cells
        self.kept: list[torch.Tensor] = []

    @torch.no_grad()
    def activations(self, tokens: Tokens) -> torch.Tensor:
        """Activations of every real token at the site."""
        out = []
        device = next(self.model.parameters()).device
        for start in range(0, tokens.n_cells, self.batch_cells):
            cells = slice(start, start + self.batch_cells)
            lengths = tokens.lengths[cells]
            real = torch.from_numpy(np.arange(self.longest) < lengths[:, None])
            ids = torch.full(real.shape, self.model.vocabulary.id_of("<pad>"))
            values = torch.full(real.shape, self.model.config.pad_value)
            rows = slice(tokens.offsets[start], tokens.offsets[start + len(lengths)])
            ids[real], values[real] = torch.from_numpy(tokens.gene_id[rows]), torch.from_numpy(tokens.value[rows])
            x = self.model.input_embedding(ids.to(device), values.to(device))
            self.kept.clear()
            self.encoder(x, src_key_padding_mask=~real.to(device))
            out.append(self.kept[0][real.to(device)].cpu())
        return torch.cat(out)


class Work(NamedTuple):
    """The cells of the benchmark."""

    tokens: Tokens
    longest: int
    tokenize: Callable[[], Tokens]


def cells(source: Source, model: Model, match: GeneMatch, n_cells: int) -> Work:
    """A seeded sample of cells, and the longest cell of the whole data set."""
    rows = source.read_rows(0, source.n_cells)
    longest = min(int(np.diff(rows.indptr).max()), model.max_genes or 0) + 1
    chosen = np.sort(np.random.default_rng(0).choice(source.n_cells, min(n_cells, source.n_cells), replace=False))
    parts = [np.arange(rows.indptr[i], rows.indptr[i + 1]) for i in chosen]
    indptr = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    where = np.concatenate(parts)
    indices, data = rows.indices[where], rows.data[where]

    def tokenize() -> Tokens:
        return model.tokenize(indptr, indices, data, match, seed=0)

    return Work(tokenize(), longest, tokenize)


def flops(model: Model, tokens: Tokens) -> float:
    """Operations that reading the site needs, on real tokens only: products with weights, and attention."""
    c, n = model.config, tokens.lengths.astype(float)
    per_token = 2 * (4 * c.d_model**2 + 2 * c.d_model * c.d_hidden)
    return (SITE.index + 1) * float((n * per_token + 4 * n**2 * c.d_model).sum())


def peak(dtype: torch.dtype, device: str, clock: Callable[[], float]) -> float:
    """Operations per second of a large matrix product, the fastest of ten."""
    n = 8192 if device == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / fastest([lambda: a @ b], 10, clock)[0]


def fastest(runs: list[Callable[[], object]], repeats: int, clock: Callable[[], float]) -> list[float]:
    """Seconds of the fastest call of each, taking turns after one call to warm up."""
    best = [np.inf] * len(runs)
    for repeat in range(repeats + 1):
        for i, run in enumerate(runs):
            began = clock()
            run()
            if repeat:
                best[i] = min(best[i], clock() - began)
    return best


def parser_of(doc: str, *, cells: int, repeats: int) -> argparse.ArgumentParser:
    """The options that the benchmarks of all families have, with these defaults."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--cells", type=int, default=cells)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="of this process: for a machine that others use")
    return parser


def main() -> None:
    """Run and print the table."""
    parser = parser_of(__doc__, cells=64, repeats=3)
    parser.add_argument("--family", choices=("scgpt", "tahoe"), default="scgpt")
    parser.add_argument("--max-batch-tokens", type=int)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tick = time.process_time if options.cpu_time else time.perf_counter

    def clock() -> float:
        if options.device == "cuda":
            torch.cuda.synchronize()
        return tick()

    source = open_source(options.data)
    model: Model = full_size_scgpt(source) if options.family == "scgpt" else full_size_tahoe(source)
    model.requires_grad_(False)
    model.reset_weights(seed=0)
    model.to(options.device)
    work = cells(source, model, model.match_genes(source.gene_symbols), options.cells)
    n, limit = work.tokens.n_tokens, options.max_batch_tokens
    batching = {} if limit is None else {"max_batch_tokens": limit}
    stock = Stock(model, longest=work.longest, batch_cells=64 if options.device == "cuda" else 8)

    def ours(autocast: torch.dtype | None) -> torch.Tensor:
        model.autocast = autocast
        return model.activations(work.tokens, [SITE], **batching)[SITE]

    exact = ours(None)
    difference = float((exact - stock.activations(work.tokens)).abs().max())
    error = float((ours(torch.bfloat16) - exact).double().norm() / exact.double().norm())
    runs: list[Callable[[], object]] = [lambda: stock.activations(work.tokens), lambda: ours(None)]
    runs += [lambda: ours(torch.bfloat16), work.tokenize]
    baseline, fp32, bf16, tokenization = fastest(runs, options.repeats, clock)
    plan = plan_batches(work.tokens.lengths, limit or 8192)
    padded = sum(len(batch) * work.tokens.lengths[batch].max() for batch in plan)

    device = torch.cuda.get_device_name() if options.device == "cuda" else f"{options.threads} threads"
    print(f"{platform.processor() or platform.machine()}, {device}, torch {torch.__version__}, {source.paths[0].name}")
    print(
        f"{work.tokens.n_cells} cells, {n} tokens, padded to {work.longest}; {model.name} 12 layers, d 512, site {SITE}"
    )
    print(f"{'':24}{'tokens/s':>10}{'ratio':>8}{'GFLOP/s':>10}{'of peak':>9}")
    work_of_site = flops(model, work.tokens)
    for name, seconds, dtype in (
        ("stock, padded, fp32", baseline, torch.float32),
        ("ours, fp32", fp32, torch.float32),
        ("ours, bf16 autocast", bf16, torch.bfloat16),
    ):
        speed = work_of_site / seconds
        share = speed / peak(dtype, options.device, clock)
        print(f"{name:24}{n / seconds:10.0f}{baseline / seconds:8.2f}{speed / 1e9:10.1f}{share:9.1%}")
    print(f"largest difference to the baseline, fp32: {difference:.2e}; relative error of bf16: {error:.2e}")
    print(f"tokenization: {tokenization / fp32:.2%} of the fp32 forward, {tokenization / bf16:.2%} of the bf16 one")
    share, theirs = 1 - n / padded, 1 - n / work.tokens.n_cells / work.longest
    print(f"padding: {share:.1%} of the positions; the baseline's {theirs:.1%}")
    if options.device == "cuda":
        print(f"memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
