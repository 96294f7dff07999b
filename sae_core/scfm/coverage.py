"""Coverage of a data set by a model's vocabulary: matched genes and counts, and cells without a known gene."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64

from sae_core.errors import TokenizationError
from sae_core.scfm.values import matched_values, recover_counts
from sae_core.scfm.vocabulary import GeneMatch


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Coverage of cells of a data set by a model's vocabulary."""

    n_genes: int
    n_matched: int
    """Number of columns of the data that the model knows."""
    n_by_symbol: int
    """Number of columns among them that were found by symbol, as they give no Ensembl id that the model knows."""
    n_tokens_matched: int
    """Number of different genes of the model among them; smaller where several columns are one gene."""
    n_vocabulary: int
    """Number of genes in the vocabulary."""
    share_of_counts: float
    """Share of the cells' counts in matched columns (share of their values, where `value_kind` is "other")."""
    value_kind: str
    """"counts", "log-normalised" (turned back into counts) or "other": what the values of the data are."""
    genes_per_cell: Int64[np.ndarray, " cell"]
    """Number of expressed genes that the model knows, before any truncation."""
    unmatched: Float64[np.ndarray, " gene"]
    """Share of all counts that lies in each unmatched column; 0 for matched columns."""

    @property
    def is_empty(self) -> Bool[np.ndarray, " cell"]:
        """Whether the model knows no expressed gene of a cell; such cells have no tokens and NaN as embedding."""
        empty: Bool[np.ndarray, " cell"] = self.genes_per_cell == 0
        return empty

    def n_truncated(self, max_genes: int | None) -> int:
        """Number of cells with more than `max_genes` genes; 0 where there is no limit (None)."""
        return 0 if max_genes is None else int((self.genes_per_cell > max_genes).sum())

    def top_unmatched(self, names: Sequence[str], n: int = 5) -> dict[str, float]:
        """The n unmatched genes with the largest shares of all counts, by name."""
        top = np.argsort(-self.unmatched, kind="stable")[:n]
        return {str(names[i]): float(self.unmatched[i]) for i in top if self.unmatched[i] > 0}


def coverage_of(
    indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, match: GeneMatch, *, n_vocabulary: int
) -> Coverage:
    """Coverage of cells in CSR form. Log-normalised values are turned back into counts where that is exact."""
    n_cells = len(indptr) - 1
    matched = matched_values(indptr, indices, data, match)
    whole = bool((data == np.rint(data)).all())
    try:
        counts, kind = recover_counts(indptr, data), "counts" if whole else "log-normalised"
    except TokenizationError:
        counts, kind = data.astype(np.float64), "other"
    of_gene = np.bincount(indices, counts, minlength=match.n_genes) / max(counts.sum(), 1e-300)
    return Coverage(
        n_genes=match.n_genes,
        n_matched=match.n_matched,
        n_by_symbol=match.n_by_symbol,
        n_tokens_matched=len(np.unique(match.token_id[match.matched])),
        n_vocabulary=n_vocabulary,
        share_of_counts=float(of_gene[match.matched].sum()),
        value_kind=kind,
        genes_per_cell=np.bincount(matched.cell, minlength=n_cells).astype(np.int64),
        unmatched=np.where(match.matched, 0.0, of_gene),
    )
