"""scFoundation's tokenizer: every expressed gene with its log1p CP10k, then the target and source total counts T and S.

    value(gene) = log1p(x / sum(x) * 10,000);   value(T) = 4 (`Resolution`);   value(S) = log10 sum(x)

Sums are of the raw counts over the model's 19,264 genes, before any gene is left out. With log-normalised input, S
would be the log10 of the normalised sum, which is not the read depth; such input is turned back into counts where that
is exact, and refused otherwise. T is the read depth (log10) at which the model predicts; upstream's default is 't4'.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float64

from sae_core.errors import ConfigError
from sae_core.scfm.tokens import Tokens
from sae_core.scfm.values import (
    GeneValues,
    check_values,
    chosen_values,
    matched_values,
    recover_counts,
    sample_per_cell,
)
from sae_core.scfm.vocabulary import GeneMatch

ResolutionKind = Literal["t", "a", "f"]
_KINDS: tuple[ResolutionKind, ...] = get_args(ResolutionKind)
_TARGET_SUM = 10_000.0


@dataclass(frozen=True)
class Resolution:
    """The read depth T at which the model predicts, as upstream's option `tgthighres` says it.

    t4.5   T = 4.5
    a0.5   T = S + .5
    f2     T = log10(2 sum(x)), twice the cell's own depth
    """

    kind: ResolutionKind = "t"
    number: float = 4.0

    @classmethod
    def parse(cls, text: str) -> Resolution:
        """Resolution from its text.

        Raises:
            ConfigError: it is no such text, or T would not be a number above 0 (t) or the fold is not above 0 (f).
        """
        kind = next((kind for kind in _KINDS if text.startswith(kind)), None)
        number = math.nan
        with suppress(ValueError):
            number = float(text[1:])
        if kind is None or not math.isfinite(number) or (kind != "a" and number <= 0):
            raise ConfigError(
                f"resolution was {text!r}; allowed: t and the target depth (t4), a and an addition to the cell's depth "
                "(a0.5), both log10, or f and a factor (f1)"
            )
        return cls(kind, number)

    def __str__(self) -> str:
        return f"{self.kind}{self.number:g}"

    def of(self, total: Float64[np.ndarray, " cell"]) -> Float64[np.ndarray, " cell"]:
        """T of cells with these sums of counts."""
        if self.kind == "t":
            return np.full(len(total), self.number)
        depth: Float64[np.ndarray, " cell"] = np.log10(total)
        return depth + (self.number if self.kind == "a" else math.log10(self.number))


T4 = Resolution()
"""Upstream's default."""


@dataclass(frozen=True, kw_only=True)
class ScFoundationTokenizer:
    """Turns cells in CSR form into tokens, with the ids of T (`target_id`) and S (`source_id`)."""

    target_id: int
    source_id: int
    resolution: Resolution = T4

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

        A cell without such a gene has no token. A choice of genes (`GeneMatch.only`) and `max_tokens`, which keeps a
        sample of the genes drawn from (seed, cell), are not upstream's; values, T and S are those of the whole cell
        whatever is left out, because S is the depth of the cell.

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
        total = np.bincount(cell, value, minlength=n_cells).astype(np.float64)
        scaled = np.log1p(value / total[cell] * _TARGET_SUM)
        gene_id, scaled, cell = chosen_values(GeneValues(gene_id, scaled, cell), match)
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
        ids[last - 1], values[last - 1] = self.target_id, self.resolution.of(total[lengths > 0])
        ids[last], values[last] = self.source_id, np.log10(total[lengths > 0])
        return Tokens(offsets=offsets, gene_id=ids, value=values, is_special=is_special)
