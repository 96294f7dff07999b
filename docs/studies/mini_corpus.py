"""Training inputs of the mini model: binned control cells, and batches of visible genes and queries.

A batch is a function of (seed, step). Building the corpus takes 15 s, a batch 4 ms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from mini_data import (
    balance_weights,
    choose_vocabulary,
    gene_vectors,
    on_vocabulary,
    training_cohorts,
)
from torch import Tensor

from sae_core.scfm.scgpt.tokenizer import ScGPTTokenizer
from sae_core.scfm.vocabulary import GeneMatch

if TYPE_CHECKING:
    from pathlib import Path

    from sae_core.scfm import ScGPT, Vocabulary


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Size of the network and course of the training."""

    n_genes: int = 6000
    n_layers: int = 4
    n_heads: int = 4
    d_model: int = 128
    d_hidden: int = 256
    steps: int = 3000
    positions_per_step: int = 8000
    """Visible genes and queries of one batch together; the number of cells follows from it."""
    min_visible: int = 48
    max_visible: int = 512
    n_queries: int = 96
    lr: float = 1e-3
    warmup: int = 150
    decay_share: float = 0.3
    """Share of the steps, at the end, over which the rate falls; before it the course does not depend on `steps`."""
    weight_decay: float = 0.01
    mvc_weight: float = 1.0
    value_scale: float = 25.0
    """Losses are in units of this many bins; the heads are rescaled on saving, so a checkpoint predicts bins."""
    held_out_share: float = 0.05
    checkpoint_every: int = 250
    seed: int = 0


class Corpus(NamedTuple):
    """Binned training cells over the vocabulary, [cell gene], and how they are drawn."""

    digits: sp.csr_matrix
    """Bin of each nonzero gene (half bins occur: ties take the midpoint)."""
    dense: np.ndarray
    """True where the gene is nonzero."""
    cohort: np.ndarray
    zero_cdf: np.ndarray
    """[cohort gene] cumulative probability of drawing a gene as a zero query; flat where it was not measured."""
    weight: np.ndarray
    """Probability of drawing a cell for training; 0 for held-out cells."""
    held_out_weight: np.ndarray
    """The same for the held-out control cells."""


class Batch(NamedTuple):
    """Inputs [row position]: `<cls>`, visible genes (`n_keys` positions; `is_key` marks the real), then queries."""

    gene_id: Tensor
    value: Tensor
    is_key: Tensor
    n_keys: int
    target: Tensor
    """Bin of each query, 0 for a gene with zero counts."""


def build_corpus(data: Path, config: PretrainConfig) -> tuple[Corpus, Vocabulary, np.ndarray]:
    """Corpus, vocabulary and the start of the gene vectors, from the control cells in the folder `data`."""
    cohorts = training_cohorts(data)
    vocabulary = choose_vocabulary(cohorts, config.n_genes)
    tokenizer = ScGPTTokenizer(
        cls_id=vocabulary.id_of("<cls>"), cls_value=-2.0, n_bins=51, max_seq_len=2**31, tie_break="midpoint"
    )
    identity = GeneMatch(token_id=np.arange(len(vocabulary)), matched=np.ones(len(vocabulary), dtype=bool))
    blocks, cdfs = [], []
    for cohort in cohorts:
        counts, measured = on_vocabulary(cohort, vocabulary)
        tokens = tokenizer(counts.indptr, counts.indices, counts.data, identity, seed=config.seed)
        gene = ~tokens.is_special
        shape = (tokens.n_cells, len(vocabulary))
        blocks.append(
            sp.csr_matrix((tokens.value[gene], (tokens.cell_of_token()[gene], tokens.gene_id[gene])), shape=shape)
        )
        detection = np.diff(sp.csc_matrix(counts).indptr) / counts.shape[0]
        cumulative = np.cumsum(np.where(measured, np.sqrt(detection * (1 - detection)), 0.0))
        cdfs.append(cumulative / cumulative[-1])
    digits = sp.csr_matrix(sp.vstack(blocks))
    held_out = np.random.default_rng(config.seed).random(digits.shape[0]) < config.held_out_share
    weight = balance_weights(cohorts) * (np.diff(digits.indptr) > 2)
    corpus = Corpus(
        digits=digits,
        dense=(digits > 0).toarray(),
        cohort=np.repeat(np.arange(len(cohorts)), [b.shape[0] for b in blocks]),
        zero_cdf=np.stack(cdfs),
        weight=weight * ~held_out / weight[~held_out].sum(),
        held_out_weight=weight * held_out / weight[held_out].sum(),
    )
    return corpus, vocabulary, gene_vectors(cohorts, vocabulary, config.d_model, seed=config.seed)


def make_batch(
    corpus: Corpus, cells: np.ndarray, n_visible: int, config: PretrainConfig, model: ScGPT, rng: np.random.Generator
) -> Batch:
    """Visible genes and queries of `cells`; at most a third of a cell's nonzero genes become queries."""
    n_rows, n_queries, args = len(cells), config.n_queries, model.config
    cls_id, pad_id = model.vocabulary.id_of("<cls>"), model.vocabulary.id_of("<pad>")
    gene_id = np.full((n_rows, 1 + n_visible + n_queries), pad_id, dtype=np.int64)
    value = np.full(gene_id.shape, args.pad_value, dtype=np.float32)
    target = np.zeros((n_rows, n_queries), dtype=np.float32)
    gene_id[:, 0], value[:, 0], value[:, 1 + n_visible :] = cls_id, args.cls_value, args.mask_value
    draws = rng.random((n_rows, 4 * n_queries))
    for row, cell in enumerate(cells):
        start, stop = corpus.digits.indptr[cell : cell + 2]
        order = start + rng.permutation(stop - start)
        n_hidden = min(n_queries // 2, len(order) // 3)
        hidden, shown = order[:n_hidden], order[n_hidden : n_hidden + n_visible]
        gene_id[row, 1 : 1 + len(shown)], value[row, 1 : 1 + len(shown)] = _pairs(corpus, shown)
        queries = gene_id[row, 1 + n_visible :]
        queries[:n_hidden], target[row, :n_hidden] = _pairs(corpus, hidden)
        drawn = np.searchsorted(corpus.zero_cdf[corpus.cohort[cell]], draws[row], side="right")
        drawn = np.unique(drawn[~corpus.dense[cell, drawn]])
        zeros = rng.permutation(drawn)[: n_queries - n_hidden]
        # a short supply of zero genes repeats some of them rather than leaving holes
        queries[n_hidden:] = np.resize(zeros, n_queries - n_hidden)
    used = 1 + n_visible - int((gene_id[:, 1 : 1 + n_visible] == pad_id).sum(1).min())
    keep = np.r_[0:used, 1 + n_visible : gene_id.shape[1]]
    gene_id, value = gene_id[:, keep], value[:, keep]
    return Batch(
        gene_id=torch.from_numpy(gene_id),
        value=torch.from_numpy(value),
        is_key=torch.from_numpy(gene_id[:, :used] != pad_id),
        n_keys=used,
        target=torch.from_numpy(target),
    )


def _pairs(corpus: Corpus, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return corpus.digits.indices[at], corpus.digits.data[at]


def training_batch(corpus: Corpus, step: int, config: PretrainConfig, model: ScGPT) -> Batch:
    """Batch of a step: number of visible genes log-uniform, cells drawn by weight; a function of (seed, step)."""
    rng = np.random.default_rng((config.seed, step))
    n_visible = int(np.exp(rng.uniform(np.log(config.min_visible), np.log(config.max_visible))))
    n_rows = max(config.positions_per_step // (n_visible + config.n_queries), 8)
    cells = rng.choice(len(corpus.weight), size=n_rows, p=corpus.weight)
    return make_batch(corpus, cells, n_visible, config, model, rng)
