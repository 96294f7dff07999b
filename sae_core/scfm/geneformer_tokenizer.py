"""Geneformer's tokenizer: genes of a cell by falling x / median, cut to the input length.

    rank genes by x / total * 10,000 / median(gene), ties by token id;  V2: <cls> ... <eos>

The total of a cell is a factor of all its genes and changes no rank. Ties are real (72 genes of V2 share one median)
and are broken by token id, so that the order of the data's columns does not matter; upstream's sort leaves them open.
V2 cuts to max_positions - 2 genes, then adds its two ends. Values are counts, or log-normalised counts that can be
turned back into counts exactly (`sae_core.scfm.values`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from sae_core.errors import CheckpointError, ConfigError
from sae_core.scfm.tokens import Tokens
from sae_core.scfm.values import check_values, matched_values, recover_counts
from sae_core.scfm.vocabulary import GeneMatch, Vocabulary

_TARGET_SUM = 10_000.0


@dataclass(frozen=True, kw_only=True)
class GeneformerTokenizer:
    """Medians by token id (NaN where there is none) and the special tokens, and the way from CSR rows to tokens."""

    medians: Float64[np.ndarray, " vocabulary"]
    max_positions: int
    ends: tuple[int, int] | None
    """Ids of `<cls>` and `<eos>` where the model has them."""

    @classmethod
    def of(
        cls, vocabulary: Vocabulary, medians: Mapping[str, float], *, max_positions: int, with_ends: bool
    ) -> GeneformerTokenizer:
        """Tokenizer of a vocabulary of Ensembl ids.

        Raises:
            CheckpointError: a median is not a positive number.
        """
        if wrong := [f"{name}: {value}" for name, value in medians.items() if not 0 < value < np.inf]:
            raise CheckpointError(f"medians must be positive numbers, got {', '.join(wrong[:5])}")
        ends = (vocabulary.id_of("<cls>"), vocabulary.id_of("<eos>")) if with_ends else None
        found = [np.nan if t in vocabulary.special else float(medians.get(t, np.nan)) for t in vocabulary.tokens]
        return cls(medians=np.array(found, dtype=np.float64), max_positions=max_positions, ends=ends)

    @property
    def gene_ids(self) -> Int64[np.ndarray, " gene"]:
        """Ids of the tokens that are genes."""
        return np.flatnonzero(~np.isnan(self.medians))

    def room(self, max_tokens: int | None) -> int:
        """Genes that fit into a cell of at most `max_tokens` tokens.

        Raises:
            ConfigError: none does.
        """
        n_ends = 0 if self.ends is None else 2
        room = (self.max_positions if max_tokens is None else min(max_tokens, self.max_positions)) - n_ends
        if room < 1:
            raise ConfigError(f"max_tokens must be at least {n_ends + 1} (a gene and {n_ends} ends), got {max_tokens}")
        return room

    def __call__(
        self,
        indptr: np.ndarray,
        indices: np.ndarray,
        data: np.ndarray,
        match: GeneMatch,
        *,
        max_tokens: int | None = None,
    ) -> Tokens:
        """Tokens of CSR rows; the value of a gene is its expression in medians. A cell without genes has no token.

        Raises:
            TokenizationError: values that are neither counts nor exactly log-normalised counts.
            ConfigError: `max_tokens` leaves no room for a gene.
        """
        room = self.room(max_tokens)
        check_values(indices, data, match)
        counts = recover_counts(indptr, data)
        n_cells = len(indptr) - 1
        total = np.bincount(np.repeat(np.arange(n_cells), np.diff(indptr)), counts, minlength=n_cells)
        gene_id, value, cell = matched_values(indptr, indices, counts, match)
        scaled = value / self.medians[gene_id]
        order = np.lexsort((gene_id, -scaled, cell))
        n_of_cell = np.bincount(cell, minlength=n_cells)
        rank = np.arange(len(cell)) - np.repeat(np.cumsum(n_of_cell) - n_of_cell, n_of_cell)
        kept = order[rank < room]
        return self._with_ends(
            gene_id[kept], scaled[kept] / total[cell[kept]] * _TARGET_SUM, np.minimum(n_of_cell, room)
        )

    def _with_ends(self, gene_id: np.ndarray, value: np.ndarray, n_of_cell: np.ndarray) -> Tokens:
        lengths = n_of_cell + np.where(n_of_cell > 0, 0 if self.ends is None else 2, 0)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        ids, values = np.zeros(offsets[-1], dtype=np.int64), np.zeros(offsets[-1], dtype=np.float32)
        is_special = np.zeros(offsets[-1], dtype=bool)
        if self.ends is not None:
            first, last = offsets[:-1][lengths > 0], offsets[1:][lengths > 0] - 1
            is_special[first] = is_special[last] = True
            ids[first], ids[last] = self.ends
        ids[~is_special], values[~is_special] = gene_id, value
        return Tokens(offsets=offsets, gene_id=ids, value=values, is_special=is_special)
