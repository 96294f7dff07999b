"""A model's own pretraining task as a measure: hide part of every cell, ask for it, read the answers, count the error.

What is hidden is drawn from (seed, cell), so two runs of one seed ask the same and differ only by what was done to the
activations: the way to say what a patch makes the model expect, and how much of its work survives. Answers and errors
are the family's own: the binned value and its squared error (scGPT), the log probability of the masked gene and its
negative, the cross-entropy (Geneformer), log1p CP10k and its squared error (scFoundation).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from sae_core.errors import ConfigError
from sae_core.scfm.batches import Batch
from sae_core.scfm.tokens import Tokens
from sae_core.scfm.values import cell_generator


@dataclass(frozen=True, kw_only=True)
class MaskedGeneTask:
    """What the encoder reads and what is asked, flat and sorted by cell.

    `position` is the row of `tokens` at which an answer is read, None where a decoder answers; `is_query_only` marks
    tokens that ask without being seen by the others.
    """

    tokens: Tokens
    cell: Int64[np.ndarray, " asked"]
    gene_id: Int64[np.ndarray, " asked"]
    target: Float32[np.ndarray, " asked"]
    position: Int64[np.ndarray, " asked"] | None = None
    is_query_only: Bool[np.ndarray, " token"] | None = None

    @property
    def is_masked_gene(self) -> Bool[np.ndarray, " token"] | None:
        """Tokens at which an answer is read, seen by the others or not."""
        if self.position is None:
            return None
        asks = np.zeros(self.tokens.n_tokens, dtype=bool)
        asks[self.position] = True
        return asks


@dataclass(frozen=True, kw_only=True)
class MaskedGeneBatch:
    """The part of a question that one batch answers; `row` and `column` are places in the padded batch."""

    which: Int64[np.ndarray, " asked"]
    """Rows of the question."""
    row: Int64[Tensor, " asked"]
    column: Int64[Tensor, " asked"]
    gene_id: Int64[Tensor, " asked"]
    target: Float[Tensor, " asked"]

    @classmethod
    def of(cls, question: MaskedGeneTask, batch: Batch) -> MaskedGeneBatch:
        """Everything that `question` asks the cells of `batch`."""
        cells = batch.cells.numpy()
        bounds = np.searchsorted(question.cell, [cells, cells + 1])
        which = np.concatenate([np.arange(start, stop) for start, stop in bounds.T])
        row = np.repeat(np.arange(len(cells)), bounds[1] - bounds[0])
        column = np.zeros_like(row)
        if question.position is not None:
            column = question.position[which] - question.tokens.offsets[cells[row]]

        def put(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(batch.gene_id.device)

        return cls(
            which=which,
            row=put(row),
            column=put(column),
            gene_id=put(question.gene_id[which]),
            target=put(question.target[which]).to(batch.value.dtype),
        )


@dataclass(frozen=True, kw_only=True)
class MaskedGenePrediction:
    """What a model's head says of the genes that were hidden from it, in the order of the question: sorted by cell."""

    cell: Int64[Tensor, " asked"]
    """Index into the tokens that were asked."""
    gene_id: Int64[Tensor, " asked"]
    prediction: Float32[Tensor, " asked"]
    target: Float32[Tensor, " asked"]
    """What a perfect model would have answered."""


@dataclass(frozen=True, kw_only=True)
class PretrainingLoss:
    """Mean error per cell (NaN where nothing was asked) and how much was asked."""

    per_cell: Float[Tensor, " cell"]
    n_masked: Int64[Tensor, " cell"]

    @property
    def mean(self) -> float:
        """Mean error over everything asked."""
        asked = self.n_masked > 0
        return float((self.per_cell[asked] * self.n_masked[asked]).sum() / self.n_masked.sum())


def sample_masked_genes(tokens: Tokens, *, seed: int, fraction: float) -> Bool[np.ndarray, " token"]:
    """The gene tokens to hide: `fraction` of each cell's, at least one, never all, drawn from (seed, the cell).

    Raises:
        ConfigError: the fraction is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"mask_fraction must lie between 0 and 1, got {fraction}")
    hidden = np.zeros(tokens.n_tokens, dtype=bool)
    for cell in range(tokens.n_cells):
        start, stop = tokens.offsets[cell : cell + 2]
        genes = start + np.flatnonzero(~tokens.is_special[start:stop])
        if len(genes) < 2:
            continue
        n_hidden = min(max(1, round(fraction * len(genes))), len(genes) - 1)
        rng = cell_generator(seed, tokens.gene_id[genes], tokens.value[genes])
        hidden[rng.permutation(genes)[:n_hidden]] = True
    return hidden
