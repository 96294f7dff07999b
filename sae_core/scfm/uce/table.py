"""The table of UCE's tokens: protein vectors of the genes, and random vectors of chromosomes and special tokens.

The table is frozen and large (145,469 rows of 5,120 numbers: 3 GB). It is mapped from its file and never copied: each
batch fetches its rows, and the pages of other species are never read. So it is no parameter of the model: it follows
no change of device or dtype, and random weights leave it as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

N_PROTEIN_ROWS = 143_574
"""Rows of the authors' table before those of chromosomes."""
N_CHROMOSOMES = 1_895
"""Chromosomes of the authors' table."""
_CHROMOSOME_SEED = 23


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenTable:
    """Rows of the table; `drawn` follow those of the file, where it has no chromosomes."""

    rows: Float[Tensor, "row d_token"]
    drawn: Float[Tensor, "chromosome d_token"] | None = None

    def __len__(self) -> int:
        return len(self.rows) + (0 if self.drawn is None else len(self.drawn))

    @property
    def d_token(self) -> int:
        """Length of a row."""
        return self.rows.shape[1]

    def __getitem__(self, ids: Int64[Tensor, " token"]) -> Float[Tensor, "token d_token"]:
        """Rows of some tokens, in host memory."""
        if self.drawn is None:
            return self.rows[ids]
        is_drawn, n_rows = ids >= len(self.rows), len(self.rows)
        found = self.rows[ids.clamp(max=n_rows - 1)]
        found[is_drawn] = self.drawn[ids[is_drawn] - n_rows].to(found.dtype)
        return found


def drawn_chromosomes(d_token: int) -> Float[Tensor, "chromosome d_token"]:
    """The vectors that the authors' code draws for the chromosomes of a table that has none."""
    generator = torch.Generator().manual_seed(_CHROMOSOME_SEED)
    return torch.normal(mean=0.0, std=1.0, size=(N_CHROMOSOMES, d_token), generator=generator)
