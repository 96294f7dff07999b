"""AIDO.Cell's tokenizer: all genes of the model in every cell, zeros too, and twice the depth of the cell.

    value = min(log1p(x / total * 10000), 20) at each of the 19,264 genes, then max(log10(total), 5) at two more places

The total is the sum over the model's genes. A gene that the data do not measure has the value 0, as in the authors'
code: it is in the input and is no gene of the cell (`Tokens.is_special`), so nothing of it is stored. The depth is 5
in every cell of fewer than 100,000 counts.

Two things differ from the authors' code. Columns of one gene are added, and the authors take the first. A cell without
a count has no tokens; there, it becomes NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sae_core.errors import ConfigError
from sae_core.scfm.tokens import Tokens
from sae_core.scfm.values import check_values, matched_values, recover_counts, sample_per_cell
from sae_core.scfm.vocabulary import GeneMatch

N_DEPTH = 2
"""Places behind the genes that hold the depth of the cell."""
_TARGET_SUM, _LARGEST, _LEAST_DEPTH = 10_000.0, 20.0, 5.0


@dataclass(frozen=True, kw_only=True)
class AIDOCellTokenizer:
    """Turns cells in CSR form into tokens of `n_genes` genes and two depth places."""

    n_genes: int

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
        """Tokens of cells in CSR form: genes in the model's order, then the depth twice.

        A choice of genes (`GeneMatch.only`) and `max_tokens`, which keeps a sample of the genes drawn from (seed, genes
        of the cell), leave places out and are not the authors'; values and depth are those of the whole cell. A cell
        that expresses none of the chosen genes has no tokens.

        Raises:
            TokenizationError: the values are neither counts nor exactly log-normalised counts.
            ConfigError: `max_tokens` leaves no place for a gene.
        """
        if max_tokens is not None and max_tokens < N_DEPTH + 1:
            raise ConfigError(
                f"max_tokens was {max_tokens}; allowed: {N_DEPTH + 1} or more (a gene, and the depth twice)"
            )
        check_values(indices, data, match)
        counts = recover_counts(indptr, data, need_total=True)
        n_cells = len(indptr) - 1
        gene_id, value, cell = matched_values(indptr, indices, counts, match)
        total = np.bincount(cell, value, minlength=n_cells).astype(np.float64)
        measured = np.unique(match.token_id[match.used])
        places = np.arange(self.n_genes) if match.chosen is None else measured
        has_any = np.bincount(cell[np.isin(gene_id, measured)], minlength=n_cells) > 0
        row_of = np.cumsum(has_any) - 1
        keep = has_any[cell]
        full = np.zeros((int(has_any.sum()), self.n_genes), dtype=np.float32)
        scaled = np.log1p(value[keep] / total[cell[keep]] * _TARGET_SUM)
        full[row_of[cell[keep]], gene_id[keep]] = np.minimum(scaled, _LARGEST)
        depth = np.maximum(np.log10(total[has_any]), _LEAST_DEPTH).astype(np.float32)
        return _tokens(
            full[:, places], depth, places, ~np.isin(places, measured), has_any, self.n_genes, max_tokens, seed
        )


def _tokens(
    values: np.ndarray,
    depth: np.ndarray,
    places: np.ndarray,
    is_absent: np.ndarray,
    has_any: np.ndarray,
    n_genes: int,
    max_tokens: int | None,
    seed: int,
) -> Tokens:
    """Tokens of the values [cell place], of which cells without any are left out, and of the depths [cell]."""
    n_rows, n_places = values.shape
    kept = np.ones((n_rows, n_places), dtype=bool)
    if max_tokens is not None and max_tokens < n_places + N_DEPTH:
        kept[:, is_absent] = False
        of_row = np.full(n_rows, int((~is_absent).sum()), dtype=np.int64)
        ids = np.tile(places[~is_absent], n_rows)
        kept[:, ~is_absent] = sample_per_cell(ids, of_row, limit=max_tokens - N_DEPTH, seed=seed).reshape(n_rows, -1)
    of_depth = np.ones((n_rows, N_DEPTH), dtype=bool)
    mask = np.concatenate([kept, of_depth], axis=1)
    ids = np.concatenate([places, np.arange(n_genes, n_genes + N_DEPTH)])
    special = np.concatenate([is_absent, np.ones(N_DEPTH, dtype=bool)])
    whole = np.concatenate([values, np.repeat(depth[:, None], N_DEPTH, axis=1)], axis=1)
    lengths = np.zeros(len(has_any), dtype=np.int64)
    lengths[has_any] = mask.sum(1)
    return Tokens(
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        gene_id=np.broadcast_to(ids, mask.shape)[mask].astype(np.int64),
        value=whole[mask].astype(np.float32),
        is_special=np.broadcast_to(special, mask.shape)[mask],
    )
