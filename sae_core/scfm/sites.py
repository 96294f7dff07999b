"""Named points inside a model at which activations are read or replaced.

    embedding      input of the first block                      [token d_model]
    attention.i    output of the attention of block i            (before the residual sum)
    mlp.i          output of the feed-forward part of block i    (before the residual sum)
    layer.i        output of block i, after its second norm      (Geneformer's hidden_states[i + 1])
    final          output of the norm after the last block, in models that have one (scFoundation)

Sites have names of their own because a module path such as `transformer_encoder.layers.3.norm2` differs from family to
family, and a torch hook on it would receive padding. `i` is 0-based.
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
    """One named point of a model; `Site.parse` is the inverse of `str(site)`."""

    kind: SiteKind
    index: int | None = None

    def __post_init__(self) -> None:
        """Check that attention, mlp and layer have an index, and that embedding and final have none.

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
        """Number of blocks that must run to compute this site; None for "final", which comes after all blocks."""
        return None if self.kind == "final" else 0 if self.index is None else self.index + 1


@dataclass(frozen=True, kw_only=True)
class TokenInfo:
    """Genes and cells of the tokens that a patch receives, one entry per token."""

    gene_id: Int[Tensor, " token"]
    """Id in the model's vocabulary."""
    cell: Int[Tensor, " token"]
    """Index of the cell in the tokens that the model was given."""
    position: Int[Tensor, " token"]
    """Position of the token in its cell, special tokens included, from 0."""
    is_special: Bool[Tensor, " token"]
    is_masked_gene: Bool[Tensor, " token"]
    """Tokens from which a masked gene is predicted (`sae_core.scfm.pretraining`)."""

    def take(self, rows: Int[Tensor, " chosen"]) -> TokenInfo:
        """The entries of some tokens."""
        return TokenInfo(**{name: column[rows] for name, column in vars(self).items()})


Patch = Callable[[Float[Tensor, "token d_model"], TokenInfo], Float[Tensor, "token d_model"]]
"""Takes the activations of real tokens at one site and returns those that replace them, of the same shape."""
SiteHook = Callable[[Site, Float[Tensor, "row position d_model"]], Float[Tensor, "row position d_model"]]
"""Takes a site and the padded activations at it, and returns those with which the forward pass continues."""
