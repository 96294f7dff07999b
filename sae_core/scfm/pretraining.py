"""Masked-gene prediction: the pretraining task of a model, used to measure what a patch changes.

Part of every cell's genes is masked, the model's pretraining head predicts them, and the error is counted. The masked
genes are drawn from (seed, cell), so two runs with one seed differ only in what was done to the activations: they show
what a patch makes the model expect, and how much of the prediction survives it. Predictions and errors are the
family's own:

    scGPT, Tahoe-x1            binned value                              squared error
    Geneformer, Nicheformer    log probability of the masked gene (nats) cross-entropy, its negative
    scFoundation, AIDO.Cell    log1p CP10k                               squared error
    TranscriptFormer           rate of the count                         negative log likelihood of the count (nats)

TranscriptFormer is causal and hides nothing: the place before a gene knows neither the gene nor its count, and from
there the count is predicted. A change at a token reaches the places behind it alone. The rates of a cell add up to its
counts, so that those of the genes before it change by one common factor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from sae_core.errors import ConfigError
from sae_core.scfm.batches import Batch
from sae_core.scfm.tokens import Tokens
from sae_core.scfm.values import cell_generator


@dataclass(frozen=True, kw_only=True)
class MaskedGeneTask:
    """Cells with masked genes, and the genes to be predicted: flat arrays, sorted by cell."""

    tokens: Tokens
    """Input of the encoder, after masking."""
    cell: Int64[np.ndarray, " masked_gene"]
    """Index of the cell of each masked gene."""
    gene_id: Int64[np.ndarray, " masked_gene"]
    target: Float32[np.ndarray, " masked_gene"]
    """Value to be predicted; 0 in Geneformer, which predicts the gene itself."""
    token_rows: Int64[np.ndarray, " masked_gene"] | None = None
    """Row of `tokens` from which each gene is predicted; None where masked genes have no token (scFoundation)."""
    is_query_only: Bool[np.ndarray, " token"] | None = None
    """Tokens that attend to others and are never attended to; None where there is none."""

    @property
    def is_masked_gene(self) -> Bool[np.ndarray, " token"] | None:
        """Tokens from which a masked gene is predicted; None where masked genes have no token."""
        if self.token_rows is None:
            return None
        is_masked = np.zeros(self.tokens.n_tokens, dtype=bool)
        is_masked[self.token_rows] = True
        return is_masked


@dataclass(frozen=True, kw_only=True)
class MaskedGeneBatch:
    """The masked genes of one padded batch."""

    task_rows: Int64[np.ndarray, " masked_gene"]
    """Their rows in the arrays of the `MaskedGeneTask`."""
    row: Int64[Tensor, " masked_gene"]
    """Row of the batch: the cell."""
    column: Int64[Tensor, " masked_gene"]
    """Position in the row from which the gene is predicted; 0 where masked genes have no token."""
    gene_id: Int64[Tensor, " masked_gene"]
    target: Float[Tensor, " masked_gene"]

    @classmethod
    def of(cls, task: MaskedGeneTask, batch: Batch) -> MaskedGeneBatch:
        """The masked genes of `task` in the cells of `batch`."""
        cells = batch.cells.numpy()
        bounds = np.searchsorted(task.cell, [cells, cells + 1])
        task_rows = np.concatenate([np.arange(start, stop) for start, stop in bounds.T])
        row = np.repeat(np.arange(len(cells)), bounds[1] - bounds[0])
        column = np.zeros_like(row)
        if task.token_rows is not None:
            column = task.token_rows[task_rows] - task.tokens.offsets[cells[row]]

        def put(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(batch.gene_id.device)

        return cls(
            task_rows=task_rows,
            row=put(row),
            column=put(column),
            gene_id=put(task.gene_id[task_rows]),
            target=put(task.target[task_rows]).to(batch.value.dtype),
        )

    def places(self, n_rows: int) -> Int64[Tensor, "row place"]:
        """The columns of each row; a row with fewer masked genes than another repeats position 0."""
        counts = torch.bincount(self.row, minlength=n_rows)
        nth = torch.arange(len(self.row), device=self.row.device) - (counts.cumsum(0) - counts)[self.row]
        found = self.column.new_zeros(n_rows, int(counts.max()) if len(self.row) else 0)
        found[self.row, nth] = self.column
        return found


@dataclass(frozen=True, kw_only=True)
class MaskedGenePrediction:
    """Predictions of masked genes by a model's pretraining head, in the order of the task: sorted by cell."""

    cell: Int64[Tensor, " masked_gene"]
    """Index of the cell in the tokens that were masked."""
    gene_id: Int64[Tensor, " masked_gene"]
    prediction: Float32[Tensor, " masked_gene"]
    target: Float32[Tensor, " masked_gene"]
    """What a perfect model would have predicted."""


@dataclass(frozen=True, kw_only=True)
class PretrainingLoss:
    """Mean error of the masked genes per cell (NaN where none is masked), and their number."""

    per_cell: Float[Tensor, " cell"]
    n_masked: Int64[Tensor, " cell"]

    @property
    def mean(self) -> float:
        """Mean error over all masked genes."""
        has_any = self.n_masked > 0
        return float((self.per_cell[has_any] * self.n_masked[has_any]).sum() / self.n_masked.sum())


def sample_masked_genes(tokens: Tokens, *, seed: int, fraction: float) -> Bool[np.ndarray, " token"]:
    """Choose the gene tokens to mask: `fraction` of each cell's, at least one, never all, drawn from (seed, cell).

    Raises:
        ConfigError: the fraction does not lie between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"mask_fraction was {fraction}; allowed: a number between 0 and 1")
    is_masked = np.zeros(tokens.n_tokens, dtype=bool)
    for cell in range(tokens.n_cells):
        start, stop = tokens.offsets[cell : cell + 2]
        genes = start + np.flatnonzero(~tokens.is_special[start:stop])
        if len(genes) < 2:
            continue
        n_masked = min(max(1, round(fraction * len(genes))), len(genes) - 1)
        rng = cell_generator(seed, tokens.gene_id[genes], tokens.value[genes])
        is_masked[rng.permutation(genes)[:n_masked]] = True
    return is_masked


def hide_values(
    tokens: Tokens, is_masked: Bool[np.ndarray, " token"], *, value: float, is_query_only: bool = False
) -> MaskedGeneTask:
    """The task in which masked genes have `value` in the place of their own, which is to be predicted.

    `is_query_only`: no other token attends to a masked gene.
    """
    return MaskedGeneTask(
        tokens=replace(tokens, value=np.where(is_masked, np.float32(value), tokens.value)),
        cell=tokens.cell_of_token()[is_masked],
        gene_id=tokens.gene_id[is_masked],
        target=tokens.value[is_masked],
        token_rows=np.flatnonzero(is_masked),
        is_query_only=is_masked if is_query_only else None,
    )


def replace_genes(
    tokens: Tokens,
    *,
    seed: int,
    fraction: float,
    replacement: Callable[[np.random.Generator, Int64[np.ndarray, " masked_gene"]], np.ndarray],
) -> MaskedGeneTask:
    """The task of BERT (arXiv:1810.04805): masked genes become other tokens, and the gene itself is to be predicted.

    `replacement` gives the tokens in the place of the masked genes of a cell, drawn by the generator of the cell.

    Raises:
        ConfigError: the fraction does not lie between 0 and 1.
    """
    masked = np.flatnonzero(sample_masked_genes(tokens, seed=seed, fraction=fraction))
    gene_id, cell = tokens.gene_id.copy(), tokens.cell_of_token()[masked]
    bounds = np.searchsorted(cell, np.arange(tokens.n_cells + 1))
    for here in (masked[a:b] for a, b in pairwise(bounds) if a < b):
        gene_id[here] = replacement(cell_generator(seed, tokens.gene_id[here], here - here[0]), gene_id[here])
    return MaskedGeneTask(
        tokens=replace(tokens, gene_id=gene_id),
        cell=cell,
        gene_id=tokens.gene_id[masked],
        target=np.zeros(len(masked), dtype=np.float32),
        token_rows=masked,
    )


def log_probability(
    logits: Callable[[Tensor], Tensor], x: Float[Tensor, "row position d_model"], masked: MaskedGeneBatch
) -> Float[Tensor, " masked_gene"]:
    """Log probability, in nats, of each masked gene at its place; `logits` of [gene d_model] are [gene vocabulary].

    Logits of 1,024 genes are in memory at a time.
    """
    at_place = torch.split(x[masked.row, masked.column], 1024)
    parts = zip(at_place, torch.split(masked.gene_id, 1024), strict=True)
    return -torch.cat([F.cross_entropy(logits(t), gene, reduction="none") for t, gene in parts])
