"""Geneformer's tokenizer: genes of a cell by falling expression relative to their median, up to the input length.

    rank genes by x / total * 10,000 / median(gene), ties by token id;  V2: <cls> genes <eos>

The total of a cell divides the values of all its genes and changes no rank. Ties occur (72 genes of V2 share a median)
and are broken by token id, so that the order of the data's columns does not matter; upstream's sort leaves the order of
ties undefined. V2 keeps the first max_positions - 2 genes and adds `<cls>` and `<eos>`. Values are counts, or
log-normalised counts that can be turned back into counts exactly (`sae_core.scfm.values`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from sae_core.errors import CheckpointError, ConfigError
from sae_core.scfm.tokens import Tokens
from sae_core.scfm.values import check_values, chosen_values, matched_values, recover_counts
from sae_core.scfm.vocabulary import GeneMatch, Vocabulary

_TARGET_SUM = 10_000.0


@dataclass(frozen=True, kw_only=True)
class GeneformerTokenizer:
    """Turns cells in CSR form into tokens."""

    medians: Float64[np.ndarray, " vocabulary"]
    """Median expression by token id, NaN for special tokens."""
    max_positions: int
    """Largest number of tokens of a cell."""
    cls_eos_ids: tuple[int, int] | None
    """Ids of `<cls>` and `<eos>`; None in V1, which has neither."""

    @classmethod
    def of(
        cls, vocabulary: Vocabulary, medians: Mapping[str, float], *, max_positions: int, has_cls_eos: bool
    ) -> GeneformerTokenizer:
        """Tokenizer of a vocabulary of Ensembl ids.

        Raises:
            CheckpointError: a median is not a positive number.
        """
        if wrong := [f"{name}: {value}" for name, value in medians.items() if not 0 < value < np.inf]:
            raise CheckpointError(f"gene medians must be positive numbers; got {', '.join(wrong[:5])}")
        cls_eos_ids = (vocabulary.id_of("<cls>"), vocabulary.id_of("<eos>")) if has_cls_eos else None
        found = [np.nan if t in vocabulary.special else float(medians.get(t, np.nan)) for t in vocabulary.tokens]
        return cls(medians=np.array(found, dtype=np.float64), max_positions=max_positions, cls_eos_ids=cls_eos_ids)

    @property
    def gene_ids(self) -> Int64[np.ndarray, " gene"]:
        """Ids of the tokens that are genes."""
        return np.flatnonzero(~np.isnan(self.medians))

    def max_genes(self, max_tokens: int | None) -> int:
        """Largest number of genes of a cell of at most `max_tokens` tokens (None: of `max_positions`).

        Raises:
            ConfigError: not even one gene fits.
        """
        n_special = 0 if self.cls_eos_ids is None else 2
        max_genes = (self.max_positions if max_tokens is None else min(max_tokens, self.max_positions)) - n_special
        if max_genes < 1:
            raise ConfigError(
                f"max_tokens was {max_tokens}; allowed: {n_special + 1} or more (a gene and {n_special} special tokens)"
            )
        return max_genes

    def __call__(
        self,
        indptr: np.ndarray,
        indices: np.ndarray,
        data: np.ndarray,
        match: GeneMatch,
        *,
        max_tokens: int | None = None,
    ) -> Tokens:
        """Tokens of cells in CSR form; the value of a token is the gene's expression divided by its median.

        Where the genes are chosen (`GeneMatch.only`), these alone are ranked; the total stays that of all genes, as it
        is upstream, where it is counted before genes are selected. A cell without such genes has no token.

        Raises:
            TokenizationError: the values are neither counts nor exactly log-normalised counts.
            ConfigError: `max_tokens` leaves no place for a gene.
        """
        max_genes = self.max_genes(max_tokens)
        check_values(indices, data, match)
        counts = recover_counts(indptr, data)
        n_cells = len(indptr) - 1
        total = np.bincount(np.repeat(np.arange(n_cells), np.diff(indptr)), counts, minlength=n_cells)
        gene_id, value, cell = chosen_values(matched_values(indptr, indices, counts, match), match)
        scaled = value / self.medians[gene_id]
        order = np.lexsort((gene_id, -scaled, cell))
        n_of_cell = np.bincount(cell, minlength=n_cells)
        rank = np.arange(len(cell)) - np.repeat(np.cumsum(n_of_cell) - n_of_cell, n_of_cell)
        kept = order[rank < max_genes]
        return self._with_special_tokens(
            gene_id[kept], scaled[kept] / total[cell[kept]] * _TARGET_SUM, np.minimum(n_of_cell, max_genes)
        )

    def _with_special_tokens(self, gene_id: np.ndarray, value: np.ndarray, n_of_cell: np.ndarray) -> Tokens:
        lengths = n_of_cell + np.where(n_of_cell > 0, 0 if self.cls_eos_ids is None else 2, 0)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        ids, values = np.zeros(offsets[-1], dtype=np.int64), np.zeros(offsets[-1], dtype=np.float32)
        is_special = np.zeros(offsets[-1], dtype=bool)
        if self.cls_eos_ids is not None:
            first, last = offsets[:-1][lengths > 0], offsets[1:][lengths > 0] - 1
            is_special[first] = is_special[last] = True
            ids[first], ids[last] = self.cls_eos_ids
        ids[~is_special], values[~is_special] = gene_id, value
        return Tokens(offsets=offsets, gene_id=ids, value=values, is_special=is_special)
