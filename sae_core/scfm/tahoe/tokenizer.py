"""Tahoe-x1's tokenizer: `<cls>`, the drug where the model is given it, and the binned expressed genes of a cell.

A value becomes 1 + the number of the 50 quantile edges of the cell's expressed genes that lie below it, so 1 ... 50,
ties always to the low end, and nothing is drawn. All genes of the cell that the model knows are binned before any is
left out. A cell with more genes than fit keeps a sample of them, drawn from (seed, its genes); the authors' sample has
no seed. Genes are in vocabulary order; the network has no positions.

What the authors' collator does besides, and what is done here:

- The 3B model is loaded without its drug by default, but `keep_first_n_tokens` stays 2. The first expressed column of
  a cell then keeps its raw value, takes no part in the quantiles and is never left out. Here every gene is binned,
  because otherwise the order of the columns would change a cell; `n_raw` 1 does as the authors do.
- With drugs, the longest cell of a batch of short cells loses one random gene. That depends on the batch, and is left
  out.
- A zero that is stored gets the digit 1. Here a zero is no expressed gene, however the matrix is stored.
- A cell without an expressed gene of the model ends their run. Here it has no token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int64, Integer

from sae_core.errors import ConfigError
from sae_core.scfm.binning import edge_counts
from sae_core.scfm.cell_context import values_of_cells
from sae_core.scfm.tokens import Tokens
from sae_core.scfm.values import GeneValues, chosen_values, matched_values, sample_per_cell
from sae_core.scfm.vocabulary import GeneMatch

NO_DRUG = "<pad>"
"""Name of row 0 of the drugs, which stands for no known drug."""


@dataclass(frozen=True, kw_only=True)
class Drugs:
    """The drug that each cell is given: one for all cells, or each cell's own by a column of obs."""

    token_id: Mapping[str, int]
    """Token of each drug by its name."""
    chosen: str
    """Name of a drug, or "obs:COLUMN"."""

    def of_cells(self, n_cells: int, obs: Mapping[str, Sequence[str]] | None) -> Int64[np.ndarray, " cell"]:
        """Token of the drug of each cell; names that the model does not know, and missing ones, are `NO_DRUG`.

        Raises:
            TokenizationError: `obs` lacks the column.
        """
        unknown = self.token_id[NO_DRUG]
        names = values_of_cells("drug", self.chosen, n_cells, obs)
        return np.array([self.token_id.get(name, unknown) for name in names], dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class TahoeTokenizer:
    """Turns cells in CSR form into tokens, with the settings of the checkpoint (`TahoeConfig`)."""

    cls_id: int
    special_value: float
    """Value of `<cls>` and of the drug's token."""
    n_bins: int
    right_binning: bool
    """Whether edges that are equal to a value count as below it; the digit is then the number of these edges."""
    max_length: int
    n_raw: int = 0
    """Number of genes of a cell, in the order of the columns, whose value is not binned (module docstring)."""

    def __call__(
        self,
        indptr: Integer[np.ndarray, " row_plus_1"],
        indices: Integer[np.ndarray, " stored"],
        data: Float[np.ndarray, " stored"] | Integer[np.ndarray, " stored"],
        match: GeneMatch,
        *,
        seed: int,
        max_tokens: int | None = None,
        drug: Int64[np.ndarray, " cell"] | None = None,
    ) -> Tokens:
        """Tokens of cells in CSR form: `<cls>`, the token `drug` of the cell if given, and its genes.

        Columns of one gene are added first. Where the genes are chosen (`GeneMatch.only`), values are binned among the
        chosen genes of the cell. A cell without an expressed gene of the model has no token.

        Raises:
            TokenizationError: a value is negative or not finite, or `match` lacks a column of the data.
            ConfigError: `max_tokens` leaves no place for a gene.
        """
        special = np.full((len(indptr) - 1, 1), self.cls_id)
        if drug is not None:
            special = np.column_stack([special, drug])
        limit = self.max_length if max_tokens is None else min(max_tokens, self.max_length)
        places = limit - special.shape[1]
        if places < max(1, self.n_raw):
            raise ConfigError(
                f"max_tokens was {max_tokens}; allowed: {special.shape[1] + max(1, self.n_raw)} or more "
                f"({'<cls>' if drug is None else '<cls>, the drug'} and a gene)"
            )
        values = chosen_values(matched_values(indptr, indices, data, match), match)
        is_raw = np.zeros(len(values.cell), dtype=bool)
        if self.n_raw:
            is_raw = _of_first_columns(values, indptr, indices, data, match, self.n_raw)
        value, keep = values.value.copy(), is_raw.copy()
        value[~is_raw], keep[~is_raw] = self._binned_and_kept(
            GeneValues(*(part[~is_raw] for part in values)), len(special), places - self.n_raw, seed
        )
        return _with_special(
            GeneValues(values.gene_id[keep], value[keep], values.cell[keep]), special, self.special_value
        )

    def _binned_and_kept(
        self, values: GeneValues, n_cells: int, places: int, seed: int
    ) -> tuple[Int64[np.ndarray, " value"], Bool[np.ndarray, " value"]]:
        """Digit of each value, and whether it has one of the `places` of its cell."""
        edges = edge_counts(values.value, values.cell, n_cells=n_cells, n_bins=self.n_bins)
        digit = edges.not_above if self.right_binning else edges.below + 1
        n_of_cell = np.bincount(values.cell, minlength=n_cells)
        return digit, sample_per_cell(values.gene_id, n_of_cell, limit=places, seed=seed)


def _of_first_columns(
    values: GeneValues, indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, match: GeneMatch, n: int
) -> Bool[np.ndarray, " value"]:
    """Whether each value is of one of the first `n` expressed columns of its cell."""
    cell = np.repeat(np.arange(len(indptr) - 1, dtype=np.int64), np.diff(indptr))
    use = match.used[indices] & (data > 0)
    cell, column = cell[use], indices[use]
    order = np.lexsort((column, cell))
    cell, column = cell[order], column[order]
    is_first = np.arange(len(cell)) - np.searchsorted(cell, cell) < n
    n_ids = int(match.token_id.max(initial=0)) + 1
    first = cell[is_first] * n_ids + match.token_id[column[is_first]]
    return np.isin(values.cell * n_ids + values.gene_id, first)


def _with_special(genes: GeneValues, special: Int64[np.ndarray, "cell special"], special_value: float) -> Tokens:
    """Tokens of cells: the special tokens of each cell that has genes, then its genes."""
    n_cells, n_special = special.shape
    n_of_cell = np.bincount(genes.cell, minlength=n_cells)
    has_any = n_of_cell > 0
    offsets = np.concatenate([[0], np.cumsum(np.where(has_any, n_of_cell + n_special, 0))]).astype(np.int64)
    is_special = np.zeros(offsets[-1], dtype=bool)
    at = offsets[:-1][has_any][:, None] + np.arange(n_special)
    is_special[at] = True
    ids = np.empty(offsets[-1], dtype=np.int64)
    value = np.full(offsets[-1], special_value, dtype=np.float32)
    ids[at] = special[has_any]
    ids[~is_special], value[~is_special] = genes.gene_id, genes.value
    return Tokens(offsets=offsets, gene_id=ids, value=value, is_special=is_special)
