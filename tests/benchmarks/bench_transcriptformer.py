"""Tokens per second of TranscriptFormer's blocks, against plain padding to all places, both in this run.

    python tests/benchmarks/bench_transcriptformer.py --data $SCSAE_DATA/kang18_ifnb_2000x9015_counts.h5ad
        [--cells 2] [--repeats 1] [--threads 1] [--cpu-time]

Baseline: the same weights in torch's own layers, every cell padded to the 2,048 places of the official models, one cell
at a time, scores capped and masked as the authors have it, the vectors of all places computed. Ours:
`FoundationModel.activations`. Both read the last block, where the cell embedding is. The model has the official number
of places and 2 layers of width 128 with random weights, which takes seconds. The two take turns; a figure is the
fastest of the repeats. Real tokens are counted, padding never.
"""

from __future__ import annotations

import platform
import time
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from bench_scfm import fastest, parser_of

from feature_store.cells import Source, open_source
from sae_core.scfm import Site, Tokens, TranscriptFormer, TranscriptFormerConfig, Vocabulary
from sae_core.scfm.transcriptformer.tokenizer import TranscriptFormerTokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

SITE = Site(kind="layer", index=1)
PLACES, START = 2048, 0


def model_of(genes: list[str]) -> TranscriptFormer:
    """A model of the official length with random weights, whose vocabulary is `[START]` and these genes."""
    config = TranscriptFormerConfig(n_layers=2, n_heads=4, d_model=128, d_hidden=128, seq_len=PLACES - 1)
    n_rows = len(genes) + 1
    tokenizer = TranscriptFormerTokenizer(
        start_id=START,
        assay_ids={"unknown": n_rows, "any": n_rows + 1},
        assay="any",
        seq_len=PLACES - 1,
        clip_counts=30,
    )
    assays = ("[assay] unknown", "[assay] any")
    vocabulary = Vocabulary(
        tokens=("[START]", *genes, *assays), special=frozenset({"[START]", *assays}), genes_are="ids"
    )
    model = TranscriptFormer(config, vocabulary, tokenizer, n_rows=n_rows, n_assays=2, d_protein=2560)
    model.gene_embeddings.embedding.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    model.reset_weights(seed=0)
    return model.eval().requires_grad_(False)


def stock(model: TranscriptFormer, tokens: Tokens) -> Tensor:
    """Activations of every real token at the site, from cells that are padded to all places."""
    out, c = [], model.config
    causal = torch.ones(PLACES, PLACES, dtype=torch.bool).tril()
    for cell in range(tokens.n_cells):
        here = slice(*tokens.offsets[cell : cell + 2])
        n = here.stop - here.start
        ids, counts = torch.full((PLACES,), START), torch.zeros(PLACES)
        ids[:n], counts[:n] = torch.from_numpy(tokens.gene_id[here]), torch.from_numpy(tokens.value[here])
        ids[0] = START
        x = model.gene_embeddings.mlp(model.gene_embeddings.embedding(ids))
        x[0] = model.aux_embeddings["assay"].weight[1]
        allowed, bias = causal & (torch.arange(PLACES) < n), torch.log1p(counts + c.count_eps)
        for block in model.blocks:
            x = block.norm1(x)
            q, k, v = block.self_attn.Wqkv(x).view(PLACES, 3, c.n_heads, -1).permute(1, 2, 0, 3)
            score = c.softcap * torch.tanh((q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 + bias) / c.softcap)
            mixed = score.masked_fill(~allowed, -torch.inf).softmax(-1) @ v
            x = block.norm2(x + block.self_attn.out_proj(mixed.transpose(0, 1).reshape(PLACES, -1)))
            x = x + block.linear2(F.gelu(block.linear1(x)))
        out.append(x[:n])
    return torch.cat(out)


def tokens_of(source: Source, model: TranscriptFormer, n_cells: int) -> Tokens:
    """The tokens of a seeded sample of cells."""
    chosen = np.sort(np.random.default_rng(0).choice(source.n_cells, n_cells, replace=False))
    rows = source.read_cells(chosen)
    return model.tokenize(rows.indptr, rows.indices, rows.data, model.match_genes(source.gene_symbols), seed=0)


def main() -> None:
    """Run and print the table."""
    parser = parser_of(__doc__, cells=2, repeats=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    source = open_source(options.data)
    model = model_of(list(dict.fromkeys(source.gene_symbols)))
    tokens = tokens_of(source, model, options.cells)

    def ours() -> Tensor:
        return model.activations(tokens, [SITE])[SITE]

    with torch.no_grad():
        difference = float((ours() - stock(model, tokens)).abs().max())
        runs: list[Callable[[], object]] = [lambda: stock(model, tokens), ours]
        baseline, fast = fastest(runs, options.repeats, clock)
    print(f"{platform.processor() or platform.machine()}, {options.threads} threads, torch {torch.__version__}")
    print(f"{source.paths[0].name}: {tokens.n_cells} cells, {tokens.n_tokens} tokens, padded to {PLACES}; site {SITE}")
    for name, seconds in (("stock, padded", baseline), ("ours", fast)):
        print(f"{name:16}{tokens.n_tokens / seconds:10.0f} tokens/s{baseline / seconds:8.2f}")
    print(f"largest difference: {difference:.2e}")


if __name__ == "__main__":
    main()
