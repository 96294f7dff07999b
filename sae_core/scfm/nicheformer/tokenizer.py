"""Nicheformer's tokenizer: the context of a cell, then its genes by falling expression relative to their technology.

    [species, assay, modality, genes by falling x * (10,000 / total) / mean],   cut to max_positions (1,500)

The total is that of the genes of the reference, whatever else the data hold; the mean is that of the gene in the
technology of the cell (`TechnologyMeans`). Genes that are not expressed have no token, and neither has a cell without
any of them, which upstream would embed by its context alone.

Most scores are tied, because means are whole numbers. Ties "id", the default, are broken by token; "upstream" gives the
order of the authors' code (`unstable_order`). In real cells the two orders agree in 10 to 12 % of the places.
Upstream computes the scores in the dtype of the matrix, and rounding decides which of them are equal: 3 x / 3 and x
differ in single precision more often than in double. "float64", the default, is what a matrix of float64 or integers
gets there; "float32" is what the usual .h5ad gets.

Three recipes are in official code. This is that of the tokenization notebooks, by which the pretraining data were made:
NaN of the means to 0, rounded half up, 0 to 1. The embedding notebook takes the file as it is, so each of its NaNs (60)
becomes a token of a gene that no cell expresses; the tokenizer on the hub takes no means unless they are given, does
not round them either, and pads with token 0. Tejada-Lapuerta, Schaar et al., 10.1101/2024.04.15.589472.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float64, Int64

from sae_core.errors import ConfigError, TokenizationError
from sae_core.scfm.nicheformer.context import CellContexts, Context
from sae_core.scfm.nicheformer.unstable_order import unstable_order
from sae_core.scfm.tokens import Tokens
from sae_core.scfm.values import GeneValues, check_values, chosen_values, matched_values, recover_counts
from sae_core.scfm.vocabulary import GeneMatch

Ties = Literal["id", "upstream"]
Precision = Literal["float64", "float32"]
N_AUXILIARY = 30
"""Number of tokens before those of genes: gene g of the reference is token 30 + g."""
_TARGET_SUM = 10_000.0


@dataclass(frozen=True)
class TechnologyMeans:
    """Mean expression of each gene of the reference in each technology, as the scores are divided by it."""

    of: Mapping[str, Float64[np.ndarray, " gene"]]
    """By technology; empty where one mean is given for all cells."""
    of_all: Float64[np.ndarray, " gene"] | None = None

    def of_values(
        self, contexts: CellContexts, cell: Int64[np.ndarray, " value"], gene: Int64[np.ndarray, " value"]
    ) -> Float64[np.ndarray, " value"]:
        """The mean of the gene of each value in the technology of its cell.

        Raises:
            TokenizationError: there are no means of the technology of a cell.
        """
        found: Float64[np.ndarray, " value"]
        if self.of_all is not None:
            found = self.of_all[gene]
            return found
        names = tuple(dict.fromkeys(contexts.technology))
        if lacking := [name for name in names if name not in self.of]:
            what = "Visium, or of cells whose assay is left out" if lacking[0] is None else lacking[0]
            raise TokenizationError(
                f"there are no technology means of {what}; there are means of {', '.join(self.of) or 'none'}; give a "
                "file for all cells: --model-option means=FILE.npy"
            )
        row_of_cell = np.array([names.index(name) for name in contexts.technology], dtype=np.int64)
        found = np.ones(len(cell))
        for row, name in enumerate(names):
            here = row_of_cell[cell] == row
            found[here] = self.of[str(name)][gene[here]]
        return found


def prepared_mean(mean: Float64[np.ndarray, " gene"]) -> Float64[np.ndarray, " gene"]:
    """The mean by which scores are divided: NaN to 0, rounded half up, then 0 to 1. Negative means stay negative."""
    known = np.nan_to_num(mean)
    whole = np.where(known % 1 >= 0.5, np.ceil(known), np.floor(known))
    return np.where(whole == 0, 1.0, whole)


@dataclass(frozen=True, kw_only=True)
class NicheformerTokenizer:
    """Turns cells in CSR form into tokens."""

    context: Context
    means: TechnologyMeans
    max_positions: int
    """Largest number of tokens of a cell."""
    ties: Ties = "id"
    precision: Precision = "float64"

    def max_genes(self, max_tokens: int | None) -> int:
        """Largest number of genes of a cell of at most `max_tokens` tokens (None: of `max_positions`).

        Raises:
            ConfigError: not even one gene fits.
        """
        n_context = len(self.context.present)
        max_genes = (self.max_positions if max_tokens is None else min(max_tokens, self.max_positions)) - n_context
        if max_genes < 1:
            raise ConfigError(
                f"max_tokens was {max_tokens}; allowed: {n_context + 1} or more (a gene and {n_context} tokens of the "
                "context)"
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
        obs: Mapping[str, Sequence[str]] | None = None,
    ) -> Tokens:
        """Tokens of cells in CSR form; the value of a token is the score of the gene.

        Where the genes are chosen (`GeneMatch.only`), these alone are ranked, and the total stays that of all genes.

        Raises:
            TokenizationError: the values are neither counts nor exactly log-normalised counts, the context of a cell
                is missing or unknown (`Context`), or there are no means of its technology.
            ConfigError: `max_tokens` leaves no place for a gene.
        """
        max_genes = self.max_genes(max_tokens)
        check_values(indices, data, match)
        n_cells = len(indptr) - 1
        contexts = self.context.of_cells(n_cells, obs)
        values = matched_values(indptr, indices, recover_counts(indptr, data), match)
        scores = GeneValues(values.gene_id, self._scores(values, contexts), values.cell)
        gene_id, score, cell = chosen_values(scores, match)
        kept = self._ranked(gene_id, score, cell, max_genes)
        n_of_cell = np.minimum(np.bincount(cell, minlength=n_cells), max_genes)
        return _with_context(gene_id[kept], score[kept], n_of_cell, contexts)

    def _scores(self, values: GeneValues, contexts: CellContexts) -> Float64[np.ndarray, " value"]:
        """Score of each value, rounded after each operation as upstream rounds it."""
        dtype = np.dtype(self.precision)
        total = np.bincount(values.cell, values.value, minlength=len(contexts.technology)).astype(dtype)
        factor = dtype.type(_TARGET_SUM) / np.where(total == 0, 1, total)
        scaled = values.value.astype(dtype) * factor[values.cell]
        mean = self.means.of_values(contexts, values.cell, values.gene_id - N_AUXILIARY)
        found: Float64[np.ndarray, " value"] = scaled / mean
        return found

    def _ranked(
        self, gene_id: np.ndarray, score: np.ndarray, cell: np.ndarray, max_genes: int
    ) -> Int64[np.ndarray, " kept"]:
        """Rows of the first `max_genes` values of each cell by falling score; rows are sorted by cell and gene."""
        n_of_cell = np.bincount(cell)
        start = np.cumsum(n_of_cell) - n_of_cell
        if self.ties == "id":
            order = np.lexsort((gene_id, -score, cell))
            first: Int64[np.ndarray, " kept"] = order[np.arange(len(cell)) - start[cell] < max_genes]
            return first
        stop = start + n_of_cell
        parts = [a + unstable_order(-score[a:b], max_genes) for a, b in zip(start, stop, strict=True) if a < b]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _with_context(gene_id: np.ndarray, score: np.ndarray, n_of_cell: np.ndarray, contexts: CellContexts) -> Tokens:
    """Tokens of the genes of each cell behind those of its context."""
    n_context = contexts.token_id.shape[1]
    lengths = n_of_cell + np.where(n_of_cell > 0, n_context, 0)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    is_special = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths) < n_context
    ids, values = np.zeros(offsets[-1], dtype=np.int64), np.zeros(offsets[-1], dtype=np.float32)
    ids[is_special] = contexts.token_id[n_of_cell > 0].ravel()
    ids[~is_special], values[~is_special] = gene_id, score
    return Tokens(offsets=offsets, gene_id=ids, value=values, is_special=is_special)
