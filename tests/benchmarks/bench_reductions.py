"""Nonzeros a second of the streamed reduction of token codes, beside numpy on the whole shard.

    python tests/benchmarks/bench_reductions.py [--device cuda] [--blocks 64] [--repeats 2] [--profile]

Two shapes: F 1,024, k 16, 60 tokens a cell, and F 8,192, k 32, 1,000 tokens a cell; blocks of 8,192 tokens. Half of a
token's features follow from its gene, so that pairs of feature and gene recur, and genes are unequally frequent;
`--uniform` draws all alike, the worst case for counts by gene. Numpy pools, takes the top tokens and, by gene, counts
the pairs, all on the whole shard in memory; it counts no firing and takes no top cells. The variants take turns; times
are the fastest of the repeats, on one thread.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import sparse

from sae_core.sae import SparseCodes
from sae_core.sae.reductions import ShardReduction

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
import codes_oracle as oracle

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK_TOKENS = 8192
SHAPES = ((1024, 16, 60, 2_000), (8192, 32, 1000, 20_000))
"""Features, nonzeros a token, tokens a cell, genes."""


def make_tokens(
    n_tokens: int, n_features: int, k: int, tokens_per_cell: int, n_genes: int, *, uniform: bool
) -> oracle.TokenCodes:
    """Random codes of k distinct features a token."""
    rng = np.random.default_rng(0)
    gene = rng.integers(n_genes, size=n_tokens) if uniform else (n_genes * rng.random(n_tokens) ** 2).astype(int)
    cols = []
    for low in range(0, n_tokens, BLOCK_TOKENS):
        genes = gene[low : low + BLOCK_TOKENS, None]
        # an odd step visits k distinct features; half of them follow from the gene
        step = 1 + 2 * rng.integers(n_features // 2, size=(len(genes), 1))
        col = (rng.integers(n_features, size=(len(genes), 1)) + step * np.arange(k)) % n_features
        if not uniform:
            half = k // 2
            col[:, :half] = (genes * 7919 + np.arange(half) * (n_features // half)) % n_features
            col = np.sort(col, axis=1)
            col[:, 1:][col[:, 1:] == col[:, :-1]] = -1
        cols.append(np.sort(col, axis=1).astype(np.int32))
    col = np.concatenate(cols)
    fires = col >= 0
    indptr = np.concatenate([[0], np.cumsum(fires.sum(1))])
    value = rng.exponential(size=indptr[-1]).astype(np.float32) + np.float32(0.01)
    cell = np.arange(n_tokens) // tokens_per_cell
    return oracle.TokenCodes(
        codes=sparse.csr_array((value, col[fires], indptr), shape=(n_tokens, n_features)),
        cell_idx=cell,
        token_pos=(np.arange(n_tokens) % tokens_per_cell).astype(np.int32),
        gene_id=gene.astype(np.int32),
        split=(cell % 3).astype(np.uint8),
    )


def blocks_of(tokens: oracle.TokenCodes, device: str) -> list[tuple[SparseCodes, dict[str, np.ndarray]]]:
    """The tokens in blocks, on the device."""
    blocks = []
    for low in range(0, tokens.codes.shape[0], BLOCK_TOKENS):
        part = tokens.codes[low : low + BLOCK_TOKENS]
        codes = SparseCodes(
            crow=torch.from_numpy(part.indptr.astype(np.int64)).to(device),
            col=torch.from_numpy(part.indices.astype(np.int32)).to(device),
            value=torch.from_numpy(part.data).to(device),
            n_features=part.shape[1],
        )
        names = ("cell_idx", "token_pos", "gene_id", "split")
        blocks.append((codes, {name: getattr(tokens, name)[low : low + BLOCK_TOKENS] for name in names}))
    return blocks


def by_numpy(tokens: oracle.TokenCodes, by_gene: bool) -> None:
    """What the reduction gives, except top cells and firing counts, by numpy."""
    oracle.pool(tokens, "max")
    oracle.top_tokens(tokens, 20)
    oracle.cell_statistics(tokens)
    if by_gene:
        oracle.gene_statistics(tokens)
        oracle.feature_gene_statistics(tokens)


def streamed(blocks: list[tuple[SparseCodes, dict[str, np.ndarray]]], **options: object) -> None:
    """Reduce all blocks."""
    given = {"pooling": "max", "keep": None, "level": "cell", "n_top_cells": 20, "n_top_tokens": 20, "by_gene": False}
    reduction = ShardReduction(n_features=blocks[0][0].n_features, **{**given, **options})
    for codes, keys in blocks:
        codes.__dict__.pop("row", None)
        reduction.add(codes, **keys)
    reduction.finish()


def main() -> None:
    """Make codes, reduce them, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--uniform", action="store_true")
    parser.add_argument("--profile", action="store_true", help="profile the reduction by gene instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for n_features, k, tokens_per_cell, n_genes in SHAPES:
        n_tokens = args.blocks * BLOCK_TOKENS
        tokens = make_tokens(n_tokens, n_features, k, tokens_per_cell, n_genes, uniform=args.uniform)
        blocks = blocks_of(tokens, args.device)
        print(f"F {n_features} k {k}, {tokens_per_cell} tokens a cell, {tokens.codes.nnz:,} nonzeros, {args.device}")
        if args.profile:
            with cProfile.Profile() as profile:
                streamed(blocks, by_gene=True)
            pstats.Stats(profile).sort_stats("tottime").print_stats(22)
            continue
        variants: dict[str, Callable[[], None]] = {
            "numpy": lambda tokens=tokens: by_numpy(tokens, False),
            "numpy, by gene": lambda tokens=tokens: by_numpy(tokens, True),
            "streamed": lambda blocks=blocks: streamed(blocks),
            "streamed, mean": lambda blocks=blocks: streamed(blocks, pooling="mean"),
            "streamed, keep 256": lambda blocks=blocks: streamed(blocks, keep=256),
            "streamed, by gene": lambda blocks=blocks: streamed(blocks, by_gene=True),
        }
        seconds = dict.fromkeys(variants, np.inf)
        for _ in range(args.repeats):
            for name, run in variants.items():
                start = time.perf_counter()
                run()
                seconds[name] = min(seconds[name], time.perf_counter() - start)
        for name, took in seconds.items():
            base = seconds["numpy, by gene" if "gene" in name else "numpy"]
            print(f"  {name:20s} {tokens.codes.nnz / took / 1e6:7.1f} M nonzeros/s   {base / took:5.1f} x numpy")


if __name__ == "__main__":
    main()
