"""`MaskedPatch`: which tokens a patch changes, by gene, cell and position; the base of every patch of this room.

A token is steered if every mask selects it. Special tokens (<cls>) are not steered by default, and neither are the
tokens at which the model predicts a hidden gene: a step that depends on the gene would leak the answer to them.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sae_core.errors import ConfigError
from sae_core.sae import SparseCodes
from sae_core.scfm.sites import TokenInfo


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskedPatch(ABC):
    """A patch that changes the activations of the tokens that its masks select."""

    genes: Collection[int] | None = None
    """Vocabulary ids of the genes whose tokens are steered; None: all genes."""
    cells: Collection[int] | None = None
    """Indices of the steered cells in the model's input; None: all cells."""
    positions: Collection[int] | None = None
    """Positions of the steered tokens within their cell, special tokens counted; None: all positions."""
    include_special: bool = False
    """Whether special tokens (<cls>) are steered."""
    include_masked_genes: bool = False
    """Whether the tokens at which the model predicts a hidden gene are steered."""

    def __post_init__(self) -> None:
        for name in ("genes", "cells", "positions"):
            chosen = getattr(self, name)
            if chosen is not None and len(chosen) == 0:
                raise ConfigError(
                    f"{name} = {chosen!r} is empty: give at least one value, or leave {name} out to steer all."
                )

    @property
    @abstractmethod
    def groups(self) -> Int64[Tensor, " cell"] | None:
        """The group of each cell, or None if the patch does not depend on it."""

    @abstractmethod
    def steered(
        self, x: Float[Tensor, "token d_model"], info: TokenInfo, codes: SparseCodes | None = None
    ) -> Float[Tensor, "token d_model"]:
        """The steered activations; `codes` are the codes of all these tokens, if they have been computed before."""

    def __call__(self, x: Float[Tensor, "token d_model"], info: TokenInfo) -> Float[Tensor, "token d_model"]:
        """The steered activations; tokens that are not steered keep theirs bit for bit."""
        return self.steered(x, info)

    def selects(self, info: TokenInfo) -> Bool[Tensor, " token"]:
        """Whether the masks select each token."""
        chosen = torch.ones_like(info.is_special) if self.include_special else ~info.is_special
        chosen = chosen | info.is_masked_gene if self.include_masked_genes else chosen & ~info.is_masked_gene
        for ids, wanted in ((info.gene_id, self.genes), (info.cell, self.cells), (info.position, self.positions)):
            if wanted is not None:
                chosen = chosen & torch.isin(ids, torch.tensor(sorted(wanted), dtype=ids.dtype, device=ids.device))
        return chosen

    def check(self, info: TokenInfo) -> None:
        """Check, on all tokens before a run, that the masks select some of them.

        Raises:
            ConfigError: the masks select no token.
        """
        if not bool(self.selects(info).any()):
            raise ConfigError(
                f"the masks select none of {info.gene_id.numel()} tokens (genes = {_first_ids(self.genes)}, cells = "
                f"{_first_ids(self.cells)}, positions = {_first_ids(self.positions)}, include_special = "
                f"{self.include_special}): choose values that occur in these tokens."
            )


def _first_ids(chosen: Collection[int] | None) -> str:
    if chosen is None:
        return "all"
    first = sorted(chosen)[:5]
    return f"{first}" if len(chosen) <= len(first) else f"{first} and {len(chosen) - len(first)} more"
