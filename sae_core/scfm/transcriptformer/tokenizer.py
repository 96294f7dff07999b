"""TranscriptFormer's tokenizer: the assay of a cell, `[START]`, and its expressed genes with their clipped counts.

    [assay, [START], g_1 .. g_n]    counts [1, 1, c_1 .. c_n],    n <= seq_len - 1,    c = min(count, 30)

The network is causal, so the order of genes matters. Upstream takes the order of the data's columns, so that the same
cell of two files gets two embeddings. Here genes are in the order of the checkpoint's vocabulary, and the first
seq_len - 1 of a longer cell stay; upstream keeps the first ones by column. Data whose columns are in the vocabulary's
order give upstream's tokens exactly (tested). Upstream also reads gene number seq_len, whose count it predicts and
whose vector it never uses; it is left out here.

Counts are not normalised. Log-normalised counts are turned back where that is exact (`sae_core.scfm.values`); other
values, which upstream takes as they are after a warning, are refused. An assay that the checkpoint does not know, or
that is missing, is "unknown", as upstream. Columns of one gene, which upstream refuses, are added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from sae_core.errors import ConfigError
from sae_core.scfm.cell_context import values_of_cells
from sae_core.scfm.tokens import Tokens
from sae_core.scfm.values import check_values, chosen_values, matched_values, recover_counts
from sae_core.scfm.vocabulary import GeneMatch

UNKNOWN = "unknown"
"""The assay of cells whose own is not among those of the checkpoint."""
N_SPECIAL = 2


@dataclass(frozen=True, kw_only=True)
class TranscriptFormerTokenizer:
    """Turns cells in CSR form into tokens."""

    start_id: int
    """Token of `[START]`."""
    assay_ids: Mapping[str, int]
    """Token of each assay, "unknown" among them."""
    assay: str
    """The assay of all cells, or "obs:COLUMN"."""
    seq_len: int
    """Number of places behind the assay."""
    clip_counts: float
    """Larger counts are set to this one."""

    @property
    def unknown_assay(self) -> int:
        """Token of the unknown assay, to which no place attends."""
        return self.assay_ids[UNKNOWN]

    def max_genes(self, max_tokens: int | None) -> int:
        """Largest number of genes of a cell of at most `max_tokens` tokens (None: of all places).

        Raises:
            ConfigError: not even one gene fits.
        """
        most = self.seq_len - 1 if max_tokens is None else min(max_tokens - N_SPECIAL, self.seq_len - 1)
        if most < 1:
            raise ConfigError(f"max_tokens was {max_tokens}; allowed: 3 or more (the assay, [START] and a gene)")
        return most

    def __call__(
        self,
        indptr: np.ndarray,
        indices: np.ndarray,
        data: np.ndarray,
        match: GeneMatch,
        *,
        max_tokens: int | None = None,
        obs: Mapping[str, Sequence[str]] | None = None,
    ) -> Tokens:
        """Tokens of cells in CSR form; the value of a gene is its clipped count, that of assay and `[START]` is 1.

        Where the genes are chosen (`GeneMatch.only`), these alone are tokens. A cell without such genes has no token.

        Raises:
            TokenizationError: the values are neither counts nor exactly log-normalised counts, or the assays of the
                cells are to be taken from a column that `obs` does not have.
            ConfigError: `max_tokens` leaves no place for a gene.
        """
        max_genes, n_cells = self.max_genes(max_tokens), len(indptr) - 1
        check_values(indices, data, match)
        counts = recover_counts(indptr, data, need_total=True)
        gene_id, value, cell = chosen_values(matched_values(indptr, indices, counts, match), match)
        n_of_cell = np.bincount(cell, minlength=n_cells)
        place = np.arange(len(cell)) - np.repeat(np.cumsum(n_of_cell) - n_of_cell, n_of_cell)
        kept = place < max_genes
        n_of_cell = np.minimum(n_of_cell, max_genes)
        lengths = np.where(n_of_cell > 0, n_of_cell + N_SPECIAL, 0)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        first = offsets[:-1][lengths > 0]
        is_special = np.zeros(offsets[-1], dtype=bool)
        is_special[first] = is_special[first + 1] = True
        ids, values = np.full(offsets[-1], self.start_id, dtype=np.int64), np.ones(offsets[-1], dtype=np.float32)
        ids[first] = self._assays(n_cells, obs)[lengths > 0]
        ids[~is_special], values[~is_special] = gene_id[kept], np.minimum(value[kept], self.clip_counts)
        return Tokens(offsets=offsets, gene_id=ids, value=values, is_special=is_special)

    def _assays(self, n_cells: int, obs: Mapping[str, Sequence[str]] | None) -> Int64[np.ndarray, " cell"]:
        """The token of the assay of each cell."""
        names = values_of_cells("assay", self.assay, n_cells, obs)
        return np.array([self.assay_ids.get(name, self.unknown_assay) for name in names], dtype=np.int64)
