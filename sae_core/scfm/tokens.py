"""Ragged tokens: the input of a model for many cells, without padding.

Token t of cell c is row offsets[c] + t of every flat array and of every activation matrix made from them. The arrays
are flat because the number of genes differs ten-fold between cells: padded to the longest cell, most entries would be
empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int64

from sae_core.errors import TokenizationError


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Tokens of `n_cells` cells, in flat arrays. A cell without genes has no token."""

    offsets: Int64[np.ndarray, " cell_plus_1"]
    """First row of each cell, then the number of tokens."""
    gene_id: Int64[np.ndarray, " token"]
    """Id in the model's vocabulary."""
    value: Float32[np.ndarray, " token"]
    """Value as the model takes it: a bin (scGPT), expression in medians (Geneformer), log1p CP10k (scFoundation), a
    count (TranscriptFormer)."""
    is_special: Bool[np.ndarray, " token"]

    def __post_init__(self) -> None:
        """Check that offsets and arrays fit together.

        Raises:
            TokenizationError: the offsets do not rise from 0 to the number of tokens, or the arrays differ in length.
        """
        n = len(self.gene_id)
        rising = len(self.offsets) > 0 and self.offsets[0] == 0 and (np.diff(self.offsets) >= 0).all()
        if not rising or self.offsets[-1] != n or len(self.value) != n or len(self.is_special) != n:
            raise TokenizationError(
                f"offsets must rise from 0 to the number of tokens: {len(self.offsets)} offsets, {n} gene ids, "
                f"{len(self.value)} values, {len(self.is_special)} flags"
            )

    @property
    def n_cells(self) -> int:
        """Number of cells, including those without tokens."""
        return len(self.offsets) - 1

    @property
    def n_tokens(self) -> int:
        """Number of tokens of all cells, special tokens included."""
        return len(self.gene_id)

    @property
    def lengths(self) -> Int64[np.ndarray, " cell"]:
        """Number of tokens of each cell."""
        return np.diff(self.offsets)

    def cell_of_token(self) -> Int64[np.ndarray, " token"]:
        """Index of the cell of each token."""
        return np.repeat(np.arange(self.n_cells, dtype=np.int64), self.lengths)

    def rows(self, cells: Int64[np.ndarray, " chosen"]) -> Int64[np.ndarray, " chosen_token"]:
        """Rows of the tokens of the given cells, cell after cell."""
        lengths = self.offsets[cells + 1] - self.offsets[cells]
        ends = np.cumsum(lengths)
        starts = np.repeat(self.offsets[cells] - ends + lengths, lengths)
        return starts + np.arange(len(starts))

    def take(self, cells: Int64[np.ndarray, " chosen"]) -> Tokens:
        """Tokens of the given cells, in the order given."""
        rows = self.rows(cells)
        return Tokens(
            offsets=np.concatenate([[0], np.cumsum(self.lengths[cells])]).astype(np.int64),
            gene_id=self.gene_id[rows],
            value=self.value[rows],
            is_special=self.is_special[rows],
        )

    def cells(self, start: int, stop: int) -> Tokens:
        """Tokens of cells [start, stop), as views."""
        low, high = int(self.offsets[start]), int(self.offsets[stop])
        return Tokens(
            offsets=self.offsets[start : stop + 1] - low,
            gene_id=self.gene_id[low:high],
            value=self.value[low:high],
            is_special=self.is_special[low:high],
        )
