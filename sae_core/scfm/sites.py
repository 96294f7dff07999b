"""Named points inside a model at which activations are read or replaced.

    embedding      input of the first block                      [token d_model]
    attention.i    what the attention of block i adds            (before the residual sum)
    mlp.i          what the feed-forward part of block i adds    (before the residual sum)
    layer.i        output of block i, after its second norm      (Geneformer's hidden_states[i + 1])
    final          output of the norm after the last block, in models that have one (scFoundation)

Names instead of module paths: a path such as `transformer_encoder.layers.3.norm2` differs from family to family and
hooks on it would see padding. `i` is 0-based.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_core.errors import ConfigError

SiteKind = Literal["embedding", "attention", "mlp", "layer", "final"]
_WITHOUT_INDEX = ("embedding", "final")


@dataclass(frozen=True, kw_only=True)
class Site:
    """One point of a model; `str(site)` and `Site.parse` are inverse."""

    kind: SiteKind
    index: int | None = None

    def __post_init__(self) -> None:
        """Check that exactly the sites inside a block carry an index.

        Raises:
            ConfigError: unknown kind, or an index that is missing, negative or out of place.
        """
        if self.kind not in get_args(SiteKind):
            raise ConfigError(f"unknown site kind {self.kind!r}; allowed: {', '.join(get_args(SiteKind))}")
        if (self.kind in _WITHOUT_INDEX) != (self.index is None) or (self.index is not None and self.index < 0):
            raise ConfigError(
                f"site {self.kind!r} with index {self.index!r}; allowed: 'embedding' and 'final' without an index, "
                "'layer.I', 'attention.I', 'mlp.I' with I >= 0"
            )

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """Site named by `text`, such as "embedding" or "layer.2"; a `Site` is returned as it is.

        Raises:
            ConfigError: the text names no site.
        """
        if isinstance(text, Site):
            return text
        kind, _, index = text.partition(".")
        if kind not in get_args(SiteKind) or (index and not index.isdecimal()) or text.endswith("."):
            raise ConfigError(
                f"{text!r} names no site; allowed: embedding, layer.I, attention.I, mlp.I (I from 0), final"
            )
        return cls(kind=kind, index=int(index) if index else None)  # type: ignore[arg-type]  # checked above

    def __str__(self) -> str:
        return self.kind if self.index is None else f"{self.kind}.{self.index}"

    @property
    def n_blocks(self) -> int | None:
        """Number of blocks that must run before this site is known; None for "final", where the model decides."""
        return None if self.kind == "final" else 0 if self.index is None else self.index + 1


@dataclass(frozen=True, kw_only=True)
class TokenInfo:
    """What a patch may know about the rows it receives."""

    gene_id: Int[Tensor, " token"]
    """Vocabulary ids."""
    cell: Int[Tensor, " token"]
    """Index of the cell in the tokens that the model was given."""
    position: Int[Tensor, " token"]
    """Place of the token in its cell, special tokens counted."""
    is_special: Bool[Tensor, " token"]
    is_masked_gene: Bool[Tensor, " token"]
    """Tokens at which a hidden gene is asked for (`sae_core.scfm.pretraining`)."""

    def take(self, rows: Int[Tensor, " chosen"]) -> TokenInfo:
        """The same of some tokens."""
        return TokenInfo(**{name: column[rows] for name, column in vars(self).items()})


Patch = Callable[[Float[Tensor, "token d_model"], TokenInfo], Float[Tensor, "token d_model"]]
SiteHook = Callable[[Site, Float[Tensor, "row position d_model"]], Float[Tensor, "row position d_model"]]
