"""scGPT's tokenizer: `<cls>` and the nonzero genes of a cell with binned values; with zeros where the model has them.

Cells are tokenized in whole CSR blocks; only random tie breaks and truncation loop over cells. The random numbers of a
cell come from the seed and the cell's content (gene ids and value ranks), so they depend neither on its batch nor on
whether the values are counts or log-normalised. Genes are in vocabulary order; the network has no positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64, Integer

from sae_core.errors import ConfigError, TokenizationError
from sae_core.scfm.binning import DigitRange, TieBreak, digit_ranges
from sae_core.scfm.cell_context import values_of_cells
from sae_core.scfm.tokens import Tokens
from sae_core.scfm.values import cell_generator, chosen_values, matched_values
from sae_core.scfm.vocabulary import GeneMatch

_ZEROS_AT_A_TIME = 1 << 22
"""Genes of cells, zeros included, that are in memory before a sample is drawn of them."""


@dataclass(frozen=True, kw_only=True)
class BatchLabels:
    """The batch of the tuning to which each cell belongs, by a column of obs.

    The label travels with the cell as another token in the place of `<cls>`, which has the vector of `<cls>`.
    """

    chosen: str
    """"obs:COLUMN"."""
    n_batches: int
    first_token: int
    """Token of the `<cls>` of a cell of batch 0; those of the other batches follow."""

    def cls_of_cells(self, n_cells: int, obs: Mapping[str, Sequence[str]] | None) -> Int64[np.ndarray, " cell"]:
        """Token of the `<cls>` of each cell.

        Raises:
            TokenizationError: `obs` lacks the column, or a value in it is no number of a batch.
        """
        texts = values_of_cells("batch_label", self.chosen, n_cells, obs)
        allowed = {str(i): self.first_token + i for i in range(self.n_batches)}
        if wrong := [text for text in texts if text not in allowed]:
            raise TokenizationError(
                f"a cell has the batch_label {wrong[0]!r} ({self.chosen}); allowed: a whole number from 0 to "
                f"{self.n_batches - 1}, the place of its batch in the tuning (the authors' scripts number batches by "
                "their sorted names); write such a column for every cell"
            )
        return np.array([allowed[text] for text in texts], dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class ScGPTTokenizer:
    """Turns cells in CSR form into tokens, with the settings of the checkpoint (`ScGPTConfig`)."""

    cls_id: int
    cls_value: float
    n_bins: int
    max_seq_len: int
    tie_break: TieBreak
    include_zeros: bool = False
    """Whether every gene that may be a token is one of each cell, with the value 0 where it is not expressed."""

    def __call__(
        self,
        indptr: Integer[np.ndarray, " row_plus_1"],
        indices: Integer[np.ndarray, " stored"],
        data: Float[np.ndarray, " stored"] | Integer[np.ndarray, " stored"],
        match: GeneMatch,
        *,
        seed: int,
        max_tokens: int | None = None,
        cls: Int64[np.ndarray, " cell"] | None = None,
    ) -> Tokens:
        """Tokens of cells in CSR form: `<cls>` (or the token `cls` of the cell in its place) and the matched nonzero
        genes, with values binned per cell.

        Columns of one gene are added first. Where the genes are chosen (`GeneMatch.only`), values are binned among the
        chosen genes of the cell, as in upstream's tutorials, which select variable genes before they bin. A cell with
        more genes than fit keeps a sample of them, drawn from (seed, its content) after binning, as upstream does. A
        cell without an expressed gene of the model has no token.

        Raises:
            TokenizationError: a value is negative or not finite, or `match` lacks a column of the data.
            ConfigError: `max_tokens` leaves no place for a gene.
        """
        limit = self.max_seq_len if max_tokens is None else min(max_tokens, self.max_seq_len)
        if limit < 2:
            raise ConfigError(f"max_tokens was {max_tokens}; allowed: 2 or more (<cls> and a gene)")
        n_cells = len(indptr) - 1
        gene_id, value, cell = chosen_values(matched_values(indptr, indices, data, match), match)
        digits = digit_ranges(value, cell, n_cells=n_cells, n_bins=self.n_bins)
        n_of_cell = np.bincount(cell, minlength=n_cells)
        if self.include_zeros:
            digit, _ = self._draw(gene_id, digits, n_of_cell, limit=len(gene_id) + 1, seed=seed)
            genes = np.unique(match.token_id[match.used])
            gene_id, digit, cell = _with_zeros(gene_id, digit, cell, genes, limit=limit, seed=seed)
        else:
            digit, kept = self._draw(gene_id, digits, n_of_cell, limit=limit, seed=seed)
            gene_id, digit, cell = gene_id[kept], digit[kept], cell[kept]
        return self._with_cls(gene_id, digit, cell, np.full(n_cells, self.cls_id) if cls is None else cls)

    def _draw(
        self,
        gene_id: Int64[np.ndarray, " value"],
        digits: DigitRange,
        n_of_cell: Int64[np.ndarray, " cell"],
        *,
        limit: int,
        seed: int,
    ) -> tuple[Float[np.ndarray, " value"], Int64[np.ndarray, " kept"]]:
        """Digit of each value, and the values that stay after truncation."""
        digit = (digits.low + digits.high) / 2
        keep = np.ones(len(gene_id), dtype=bool)
        stop_of_cell = np.cumsum(n_of_cell)
        random_ties = self.tie_break == "random"
        for cell in np.flatnonzero(n_of_cell > (0 if random_ties else limit - 1)):
            here = slice(stop_of_cell[cell] - n_of_cell[cell], stop_of_cell[cell])
            low, high = digits.low[here], digits.high[here]
            rng = cell_generator(seed, gene_id[here], low, high)
            if random_ties:
                digit[here] = rng.integers(low, high, endpoint=True)
            if n_of_cell[cell] > limit - 1:
                dropped = rng.permutation(n_of_cell[cell])[limit - 1 :]
                keep[here.start + dropped] = False
        return digit, np.flatnonzero(keep)

    def _with_cls(
        self,
        gene_id: Int64[np.ndarray, " value"],
        digit: Float[np.ndarray, " value"],
        cell: Int64[np.ndarray, " value"],
        cls: Int64[np.ndarray, " cell"],
    ) -> Tokens:
        n_of_cell = np.bincount(cell, minlength=len(cls))
        length = np.where(n_of_cell > 0, n_of_cell + 1, 0)
        offsets = np.concatenate([[0], np.cumsum(length)])
        is_special = np.zeros(offsets[-1], dtype=bool)
        is_special[offsets[:-1][length > 0]] = True
        ids = np.empty(offsets[-1], dtype=np.int64)
        ids[is_special] = cls[length > 0]
        values = np.full(offsets[-1], self.cls_value, dtype=np.float32)
        ids[~is_special], values[~is_special] = gene_id, digit
        return Tokens(offsets=offsets.astype(np.int64), gene_id=ids, value=values, is_special=is_special)


def _with_zeros(
    gene_id: Int64[np.ndarray, " value"],
    digit: Float[np.ndarray, " value"],
    cell: Int64[np.ndarray, " value"],
    genes: Int64[np.ndarray, " gene"],
    *,
    limit: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gene id, digit and cell of all `genes` (sorted) in every cell that has a value; the digit is 0 without one.

    Where a cell has a place for fewer tokens (`limit`), they are a sample of its genes, zeros included.
    """
    cells, row = np.unique(cell, return_inverse=True)
    step = max(1, _ZEROS_AT_A_TIME // max(len(genes), 1))
    found = [(gene_id[:0], digit[:0], cell[:0])]
    for start in range(0, len(cells), step):
        own = cells[start : start + step]
        here = (row >= start) & (row < start + step)
        dense = np.zeros((len(own), len(genes)), dtype=digit.dtype)
        dense[row[here] - start, np.searchsorted(genes, gene_id[here])] = digit[here]
        of_gene, of_digit = np.tile(genes, len(own)), dense.ravel()
        kept = _sample(of_gene, of_digit, np.full(len(own), len(genes)), limit=limit, seed=seed)
        found.append((of_gene[kept], of_digit[kept], np.repeat(own, len(genes))[kept]))
    ids, digits, owners = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return ids, digits, owners


def _sample(
    gene_id: Int64[np.ndarray, " value"],
    digit: Float[np.ndarray, " value"],
    n_of_cell: Int64[np.ndarray, " cell"],
    *,
    limit: int,
    seed: int,
) -> Int64[np.ndarray, " kept"]:
    """Values that stay where a cell has a place for `limit` tokens, drawn from (seed, its genes and digits)."""
    keep = np.ones(len(gene_id), dtype=bool)
    stop = np.cumsum(n_of_cell)
    for c in np.flatnonzero(n_of_cell > limit - 1):
        here = slice(stop[c] - n_of_cell[c], stop[c])
        rng = cell_generator(seed, gene_id[here], digit[here])
        keep[here.start + rng.permutation(n_of_cell[c])[limit - 1 :]] = False
    return np.flatnonzero(keep)
