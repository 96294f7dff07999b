"""scFoundation's tokenizer: every expressed gene with its log1p CP10k, then the target and source total counts T and S.

    value(gene) = log1p(x / sum(x) * 10,000);   value(T) = 4;   value(S) = log10 sum(x)

Sums are of the raw counts over the model's 19,264 genes, before any gene is left out. With log-normalised input, S
would be the log10 of the normalised sum, which is not the read depth; such input is turned back into counts where that
is exact, and refused otherwise. T is the read depth (log10) at which the model predicts, upstream's 't4'.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sae_core.errors import ConfigError
from sae_core.scfm.tokens import Tokens
from sae_core.scfm.values import check_values, matched_values, recover_counts, sample_per_cell
from sae_core.scfm.vocabulary import GeneMatch

_TARGET_SUM = 10_000.0


@dataclass(frozen=True, kw_only=True)
class ScFoundationTokenizer:
    """Turns cells in CSR form into tokens, with the ids of T (`target_id`) and S (`source_id`) and the value of T."""

    target_id: int
    source_id: int
    target: float = 4.0

    def __call__(
        self,
        indptr: np.ndarray,
        indices: np.ndarray,
        data: np.ndarray,
        match: GeneMatch,
        *,
        seed: int,
        max_tokens: int | None = None,
    ) -> Tokens:
        """Tokens of cells in CSR form: genes in the model's order, then T and S.

        A cell without a matched gene has no token. `max_tokens`, which upstream does not have, keeps a sample of the
        genes drawn from (seed, cell); values, T and S are those of the whole cell.

        Raises:
            TokenizationError: the values are neither counts nor exactly log-normalised counts.
            ConfigError: `max_tokens` leaves no place for a gene.
        """
        if max_tokens is not None and max_tokens < 3:
            raise ConfigError(f"max_tokens was {max_tokens}; allowed: 3 or more (a gene, T and S)")
        check_values(indices, data, match)
        counts = recover_counts(indptr, data, need_total=True)
        n_cells = len(indptr) - 1
        gene_id, value, cell = matched_values(indptr, indices, counts, match)
        total = np.bincount(cell, value, minlength=n_cells)
        scaled = np.log1p(value / total[cell] * _TARGET_SUM)
        if max_tokens is not None:
            keep = sample_per_cell(gene_id, np.bincount(cell, minlength=n_cells), limit=max_tokens - 2, seed=seed)
            gene_id, scaled, cell = gene_id[keep], scaled[keep], cell[keep]
        lengths = np.bincount(cell, minlength=n_cells)
        lengths += np.where(lengths > 0, 2, 0)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        last = offsets[1:][lengths > 0] - 1
        ids, values = np.zeros(offsets[-1], dtype=np.int64), np.zeros(offsets[-1], dtype=np.float32)
        is_special = np.zeros(offsets[-1], dtype=bool)
        is_special[last - 1] = is_special[last] = True
        ids[~is_special], values[~is_special] = gene_id, scaled
        ids[last - 1], values[last - 1] = self.target_id, self.target
        ids[last], values[last] = self.source_id, np.log10(total[lengths > 0])
        return Tokens(offsets=offsets, gene_id=ids, value=values, is_special=is_special)
