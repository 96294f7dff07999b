"""What every foundation model does alike: run ragged tokens in length buckets, read sites, apply patches, pool cells.

Cells are sorted by length and batched so that a batch holds at most `max_batch_tokens` positions, padding included, and
no cell is padded by more than a quarter. Results come back in the order of the tokens, so batching is invisible: a cell
gives the same numbers to 1e-5 whatever its neighbours are. Only real tokens are ever read or patched. Blocks after the
deepest site asked for are not run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from sae_core.errors import ConfigError
from sae_core.scfm.encoder import EncoderBlock
from sae_core.scfm.sites import Patch, Site, Tap, TokenInfo
from sae_core.scfm.tokens import Tokens
from sae_core.scfm.vocabulary import GeneMatch, Vocabulary

Readout = Literal["mean", "cls"]
_MAX_BATCH_TOKENS = 16384


class Prefix(NamedTuple):
    """Activations of all tokens at one site, from `FoundationModel.activations`, to start a forward from."""

    site: Site | str
    x: Float[Tensor, "token d_model"]


class FoundationModel(nn.Module, ABC):
    """A single-cell foundation model: a vocabulary, a tokenizer, an input embedding and a stack of encoder blocks."""

    family: str
    name: str
    digest: str
    d_model: int
    n_layers: int
    vocabulary: Vocabulary

    @property
    @abstractmethod
    def blocks(self) -> Sequence[EncoderBlock]:
        """Encoder blocks, first to last."""

    @abstractmethod
    def input_embedding(
        self, gene_id: Int64[Tensor, "row position"], value: Float[Tensor, "row position"]
    ) -> Float[Tensor, "row position d_model"]:
        """Input of the first block."""

    @abstractmethod
    def tokenize(
        self,
        indptr: np.ndarray,
        indices: np.ndarray,
        data: np.ndarray,
        match: GeneMatch,
        *,
        seed: int,
        max_tokens: int | None = None,
    ) -> Tokens:
        """Tokens of the cells in CSR rows (one row a cell, one column a gene of `match`)."""

    @abstractmethod
    def pool(
        self, x: Float[Tensor, "row position d_model"], is_gene: Bool[Tensor, "row position"], readout: Readout
    ) -> Float[Tensor, "row d_model"]:
        """One vector a cell from one site's activations; `is_gene` is false for padding and special tokens."""

    def match_genes(self, symbols: Sequence[str], ensembl_ids: Sequence[str] | None = None) -> GeneMatch:
        """Find the genes of a data set in the vocabulary.

        Raises:
            VocabularyError: none is found.
        """
        return self.vocabulary.match(symbols, ensembl_ids)

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites, in the order in which they are computed."""
        inner = (Site(kind=kind, index=i) for i in range(self.n_layers) for kind in ("attention", "mlp", "layer"))
        return (Site(kind="embedding"), *inner)

    @torch.no_grad()
    def activations(
        self,
        tokens: Tokens,
        sites: Sequence[Site | str],
        *,
        max_batch_tokens: int = _MAX_BATCH_TOKENS,
        patches: Mapping[Site | str, Patch] | None = None,
    ) -> dict[Site, Float[Tensor, "token d_model"]]:
        """Activations of every token at each site, in the order of `tokens`, in host memory.

        A patched site is read after its patch. Patches receive real tokens only, in batches, on the model's device.

        Raises:
            ConfigError: a site the model does not have, or a patch that changes the shape.
        """
        wanted = [self._site(site) for site in sites]
        patch_of = self._patches(patches)
        first = next(self.parameters())
        out = {site: torch.empty(tokens.n_tokens, self.d_model, dtype=first.dtype) for site in wanted}
        depth = max((site.n_blocks for site in wanted), default=0)
        for batch in self._batches(tokens, max_batch_tokens):
            self._run(batch, depth, partial(_tap, batch=batch, out=out, patches=patch_of))
        return out

    @torch.no_grad()
    def embed(
        self,
        tokens: Tokens,
        *,
        readout: Readout = "mean",
        site: Site | str | None = None,
        patches: Mapping[Site | str, Patch] | None = None,
        prefix: Prefix | None = None,
        max_batch_tokens: int = _MAX_BATCH_TOKENS,
    ) -> Float[Tensor, "cell d_model"]:
        """One vector a cell, in host memory; NaN for a cell without tokens.

        "mean": masked mean over the gene tokens. "cls": the family's own cell token. `site`: where to read, by default
        the output of the last block; it has to be an embedding or a layer site. `prefix`: what `activations` gave for
        all these tokens at a site, to go on from there; many interventions at one site then share the blocks before it.

        Raises:
            ConfigError: no such site or readout, or a prefix that is not of these tokens or lies after a patch.
        """
        at = self._site(site) if site is not None else Site(kind="layer", index=self.n_layers - 1)
        if at.kind not in ("embedding", "layer"):
            raise ConfigError(f"a cell is read at 'embedding' or 'layer.I', not at {str(at)!r}")
        patch_of = self._patches(patches)
        self._check_prefix(prefix, tokens, patch_of)
        first = next(self.parameters())
        out = torch.full((tokens.n_cells, self.d_model), torch.nan, dtype=first.dtype)
        for batch in self._batches(tokens, max_batch_tokens):
            x = self._run(batch, at.n_blocks, partial(_tap, batch=batch, out={}, patches=patch_of), prefix)
            out[batch.cells] = self.pool(x, batch.is_gene, readout).cpu()
        return out

    def _run(self, batch: _Batch, n_blocks: int, tap: Tap, prefix: Prefix | None = None) -> Tensor:
        if prefix is None:
            n_done, x = 0, tap(Site(kind="embedding"), self.input_embedding(batch.gene_id, batch.value))
        else:
            start = self._site(prefix.site)
            x = prefix.x.new_zeros(*batch.is_real.shape, self.d_model).to(batch.is_real.device)
            x[batch.is_real] = prefix.x[batch.rows].to(x.device)
            n_done, x = start.n_blocks, tap(start, x)
        key_mask = batch.is_real if batch.padded else None
        for i, block in enumerate(self.blocks[n_done:n_blocks], start=n_done):
            x = block(x, index=i, tap=tap, key_mask=key_mask)
        return x

    def _check_prefix(self, prefix: Prefix | None, tokens: Tokens, patches: Mapping[Site, Patch]) -> None:
        if prefix is None:
            return
        start = self._site(prefix.site)
        if start.kind not in ("embedding", "layer") or prefix.x.shape != (tokens.n_tokens, self.d_model):
            raise ConfigError(
                f"the prefix is of site {str(start)!r} and shape {tuple(prefix.x.shape)}; it has to be what "
                f"`activations` gives for these tokens at 'embedding' or 'layer.I': {(tokens.n_tokens, self.d_model)}"
            )
        # inside a block, attention and mlp come before the layer's own output
        early = [str(p) for p in patches if p != start and p.n_blocks <= start.n_blocks]
        if early:
            raise ConfigError(f"patches at {', '.join(early)} come before the prefix at {start}; leave out the prefix")

    def _site(self, site: Site | str) -> Site:
        parsed = Site.parse(site)
        if parsed.n_blocks > self.n_layers:
            raise ConfigError(
                f"{self.name} has no site {str(parsed)!r}; it has {self.n_layers} layers, so allowed are embedding, "
                f"layer.0 to layer.{self.n_layers - 1} and the same of attention and mlp"
            )
        return parsed

    def _patches(self, patches: Mapping[Site | str, Patch] | None) -> dict[Site, Patch]:
        return {self._site(site): patch for site, patch in (patches or {}).items()}

    def _batches(self, tokens: Tokens, max_batch_tokens: int) -> Iterator[_Batch]:
        parameter = next(self.parameters())
        for cells in plan_batches(tokens.lengths, max_batch_tokens):
            yield _Batch.of(tokens, cells, device=parameter.device, dtype=parameter.dtype)


def plan_batches(lengths: Int64[np.ndarray, " cell"], max_batch_tokens: int) -> list[Int64[np.ndarray, " batch"]]:
    """Cells that have tokens, by rising length, cut into batches; a cell longer than the limit is alone in its batch.

    Raises:
        ConfigError: `max_batch_tokens` is not positive.
    """
    if max_batch_tokens < 1:
        raise ConfigError(f"max_batch_tokens must be at least 1, got {max_batch_tokens}")
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    batches, start = [], 0
    for stop in range(1, len(order) + 1):
        if stop < len(order):
            longest, shortest = int(lengths[order[stop]]), int(lengths[order[start]])
            if (stop + 1 - start) * longest <= max_batch_tokens and longest <= 1.25 * shortest + 4:
                continue
        batches.append(order[start:stop])
        start = stop
    return batches


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Padded tokens of a few cells; `rows` are the rows of its real tokens in the ragged tokens."""

    cells: Tensor
    rows: Tensor
    gene_id: Tensor
    value: Tensor
    is_real: Tensor
    is_gene: Tensor
    info: TokenInfo
    padded: bool

    @classmethod
    def of(
        cls, tokens: Tokens, cells: Int64[np.ndarray, " batch"], *, device: torch.device, dtype: torch.dtype
    ) -> _Batch:
        lengths = tokens.lengths[cells]
        position = np.arange(lengths.max())
        is_real = position < lengths[:, None]
        row_of = np.where(is_real, tokens.offsets[cells][:, None] + position, tokens.offsets[cells][:, None])
        rows = row_of[is_real]

        def put(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device)

        return cls(
            cells=torch.from_numpy(cells),
            rows=torch.from_numpy(rows),
            gene_id=put(tokens.gene_id[row_of]),
            value=put(tokens.value[row_of]).to(dtype),
            is_real=put(is_real),
            is_gene=put(is_real & ~tokens.is_special[row_of]),
            info=TokenInfo(
                gene_id=put(tokens.gene_id[rows]),
                cell=put(np.repeat(cells, lengths)),
                is_special=put(tokens.is_special[rows]),
            ),
            padded=not is_real.all(),
        )


def _tap(site: Site, x: Tensor, *, batch: _Batch, out: dict[Site, Tensor], patches: dict[Site, Patch]) -> Tensor:
    if site not in out and site not in patches:
        return x
    real = x[batch.is_real]
    if site in patches:
        patched = patches[site](real, batch.info)
        if patched.shape != real.shape:
            raise ConfigError(f"a patch at {site} made {tuple(patched.shape)} of {tuple(real.shape)}; keep the shape")
        x = x.clone()
        x[batch.is_real] = real = patched.to(x.dtype)
    if site in out:
        out[site][batch.rows] = real.to("cpu")
    return x


def masked_mean(
    x: Float[Tensor, "row position d_model"], mask: Bool[Tensor, "row position"]
) -> Float[Tensor, "row d_model"]:
    """Mean of the positions that `mask` marks; NaN where it marks none."""
    weight = mask.to(x.dtype)[:, :, None]
    return (x * weight).sum(1) / weight.sum(1)
