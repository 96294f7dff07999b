"""Which tokens are steered: masks by gene, cell and position, shared by everything that moves activations.

A token is steered if every mask lets it through. Special tokens (<cls>) are left out unless asked for, and so are
tokens at which the model is asked for a hidden gene: a step that depends on the gene would tell them the answer.
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
    """A patch that moves the activations of the tokens that its masks let through."""

    genes: Collection[int] | None = None
    """Vocabulary ids of the genes whose tokens are steered; None: all."""
    cells: Collection[int] | None = None
    """Indices, into the tokens that the model was given, of the cells that are steered; None: all."""
    positions: Collection[int] | None = None
    """Places in their cell, special tokens counted, of the tokens that are steered; None: all."""
    include_special: bool = False
    """Whether special tokens (<cls>) are steered too."""
    include_queries: bool = False
    """Whether tokens at which the model is asked for a hidden gene are steered too, as at any other token."""

    def __post_init__(self) -> None:
        for name in ("genes", "cells", "positions"):
            chosen = getattr(self, name)
            if chosen is not None and len(chosen) == 0:
                raise ConfigError(
                    f"{name} = {chosen!r} selects nothing: name at least one, or leave it out to take all."
                )

    @property
    @abstractmethod
    def groups(self) -> Int64[Tensor, " cell"] | None:
        """Group of each cell, where what is done depends on it."""

    @abstractmethod
    def steered(
        self, x: Float[Tensor, "token d_model"], info: TokenInfo, codes: SparseCodes | None = None
    ) -> Float[Tensor, "token d_model"]:
        """Steered activations; `codes`: those of all these tokens, if they are known already."""

    def __call__(self, x: Float[Tensor, "token d_model"], info: TokenInfo) -> Float[Tensor, "token d_model"]:
        """Steered activations; tokens that nothing happens to keep theirs bit for bit."""
        return self.steered(x, info)

    def selects(self, info: TokenInfo) -> Bool[Tensor, " token"]:
        """Which tokens the masks let through."""
        chosen = torch.ones_like(info.is_special) if self.include_special else ~info.is_special
        chosen = chosen | info.is_masked_gene if self.include_queries else chosen & ~info.is_masked_gene
        for ids, wanted in ((info.gene_id, self.genes), (info.cell, self.cells), (info.position, self.positions)):
            if wanted is not None:
                chosen = chosen & torch.isin(ids, torch.tensor(sorted(wanted), dtype=ids.dtype, device=ids.device))
        return chosen

    def check(self, info: TokenInfo) -> None:
        """`ConfigError` if the masks let none of these tokens through: call it with all tokens before a run."""
        if not bool(self.selects(info).any()):
            raise ConfigError(
                f"the masks select none of {info.gene_id.numel()} tokens (genes {_some(self.genes)}, cells "
                f"{_some(self.cells)}, positions {_some(self.positions)}, special tokens "
                f"{'in' if self.include_special else 'ex'}cluded): choose what occurs in these tokens."
            )


def _some(chosen: Collection[int] | None) -> str:
    if chosen is None:
        return "all"
    first = sorted(chosen)[:5]
    return f"{first}" if len(chosen) <= len(first) else f"{first} and {len(chosen) - len(first)} more"
