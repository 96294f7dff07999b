"""UCE's tokenizer: genes drawn with replacement, written as a sentence of chromosomes.

    <cls> [chromosome, genes by start, <end>] [chromosome, genes by start, <end>] ...

`n_draws` genes are drawn, each with a probability in proportion to log1p of its count. A gene that is drawn twice is
there twice, and of the expressed genes of a cell some are never drawn. The chromosomes of the drawn genes stand in
shuffled order, and within each its genes by the start of the gene. Draws and order come from the seed and the cell's
genes and counts, so a cell has one sentence wherever it stands; upstream draws anew in each run.

What differs from upstream, which leaves it open: genes that start at one place stand by their row in the table
(upstream's sort is unstable), probabilities are taken in float64 (upstream: float32), and columns of one gene are added
before the draws (upstream keeps them apart, so that such a gene is drawn more often). Counts are what upstream takes:
it cuts the fraction off values that are not counts, while here log-normalised values are turned back into counts
where that is exact, and refused otherwise. A cell takes about 1 ms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from sae_core.errors import ConfigError
from sae_core.scfm.tokens import Tokens
from sae_core.scfm.values import cell_generator, check_values, chosen_values, matched_values, recover_counts
from sae_core.scfm.vocabulary import GeneMatch

PAD_ID, OPEN_ID, END_ID, CLS_ID = range(4)
"""Rows of the table for padding, the bracket that nothing uses, the end of a chromosome, and the cell token."""
N_SPECIAL = 4


@dataclass(frozen=True, kw_only=True)
class UCETokenizer:
    """Turns cells in CSR form into sentences; ids are rows of the table of tokens."""

    chromosome: Int64[np.ndarray, " row"]
    """Row of the chromosome of the gene in each row of the table; -1 in rows of other tokens."""
    start: Float64[np.ndarray, " row"]
    """Place on its chromosome where the gene in each row begins, in bases."""
    n_draws: int
    """Genes drawn of a cell."""
    max_positions: int
    """Largest number of tokens of a cell."""

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
        """Tokens of cells in CSR form; the value of a gene is log1p of its count, which the network does not take.

        Where the genes are chosen (`GeneMatch.only`), these alone are drawn. A cell without such genes has no token. Of
        a sentence that is too long (upstream fails), the first draws are kept, as many as fit with the tokens of their
        chromosomes.

        Raises:
            TokenizationError: the values are neither counts nor exactly log-normalised counts.
            ConfigError: `max_tokens` leaves no place for a gene.
        """
        limit = self.max_positions if max_tokens is None else min(max_tokens, self.max_positions)
        if limit < N_SPECIAL:
            raise ConfigError(
                f"max_tokens was {max_tokens}; allowed: {N_SPECIAL} or more (<cls>, a chromosome, a gene and <end>)"
            )
        check_values(indices, data, match)
        counts = recover_counts(indptr, data)
        gene_id, value, cell = chosen_values(matched_values(indptr, indices, counts, match), match)
        bounds = np.searchsorted(cell, np.arange(len(indptr)))
        ids, weights = [np.zeros(0, dtype=np.int64)], [np.zeros(0)]
        lengths = np.zeros(len(indptr) - 1, dtype=np.int64)
        for i in np.flatnonzero(np.diff(bounds)):
            here = slice(bounds[i], bounds[i + 1])
            sentence, weight = self._sentence(gene_id[here], value[here], limit=limit, seed=seed)
            ids.append(sentence)
            weights.append(weight)
            lengths[i] = len(sentence)
        token_id = np.concatenate(ids)
        return Tokens(
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            gene_id=token_id,
            value=np.concatenate(weights).astype(np.float32),
            is_special=self.chromosome[token_id] < 0,
        )

    def _sentence(
        self, gene_id: Int64[np.ndarray, " gene"], count: Float64[np.ndarray, " gene"], *, limit: int, seed: int
    ) -> tuple[Int64[np.ndarray, " token"], Float64[np.ndarray, " token"]]:
        """Ids and values of the tokens of one cell, whose genes ascend by id."""
        rng, weight = cell_generator(seed, gene_id, count), np.log1p(count)
        drawn = rng.choice(len(gene_id), size=self.n_draws, replace=True, p=weight / weight.sum())
        of_draw = self.chromosome[gene_id[drawn]]
        is_new = np.zeros(len(drawn), dtype=np.int64)
        is_new[np.unique(of_draw, return_index=True)[1]] = 1
        needed = 1 + np.arange(1, len(drawn) + 1) + 2 * np.cumsum(is_new)
        n_kept = int(np.searchsorted(needed, limit, side="right"))
        drawn, of_draw = drawn[:n_kept], of_draw[:n_kept]
        chromosomes, of_draw = np.unique(of_draw, return_inverse=True)
        shuffled = chromosomes.copy()
        rng.shuffle(shuffled)
        place = np.searchsorted(chromosomes, shuffled).argsort()
        rank, genes = place[of_draw], gene_id[drawn]
        order = np.lexsort((genes, self.start[genes], rank))
        rank = rank[order]
        ids = np.full(needed[n_kept - 1], END_ID, dtype=np.int64)
        values = np.zeros(len(ids))
        # before gene j of chromosome r stand <cls>, j genes, r + 1 chromosomes and r ends
        at = np.arange(n_kept) + 2 + 2 * rank
        ids[at], values[at] = genes[order], weight[drawn[order]]
        ids[at[np.searchsorted(rank, np.arange(len(shuffled)))] - 1] = shuffled
        ids[0] = CLS_ID
        return ids, values
