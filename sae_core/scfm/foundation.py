"""What all foundation models share: running tokens in batches, reading and patching sites, pooling cells.

Results come back in the order of the tokens, so batching (`sae_core.scfm.batches`) is invisible: a cell gives the same
numbers to 1e-5 whatever its neighbours are (3e-6 at full size). Only real tokens are read or patched, never padding.
Blocks after the deepest requested site are not run. A family of models adds its network, its tokenizer, its readouts
and its pretraining task (docs/how-to-add-a-model.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from sae_core.errors import ConfigError
from sae_core.scfm.batches import Batch, Padding, plan_batches
from sae_core.scfm.cell_context import OF_CELLS
from sae_core.scfm.coverage import Coverage, coverage_of
from sae_core.scfm.encoder import EncoderBlock
from sae_core.scfm.pretraining import MaskedGeneBatch, MaskedGenePrediction, MaskedGeneTask, PretrainingLoss
from sae_core.scfm.sites import Patch, Site, SiteHook
from sae_core.scfm.tokens import Tokens
from sae_core.scfm.vocabulary import GeneMatch, Vocabulary

_MAX_BATCH_TOKENS = 8192
FINAL = Site(kind="final")


class CachedActivations(NamedTuple):
    """Activations of all tokens at one site, from which a forward pass continues without the blocks before it."""

    site: Site | str
    """"embedding" or "layer.I"."""
    x: Float[Tensor, "token d_model"]
    """What `FoundationModel.activations` gave at the site for the same tokens."""


class FoundationModel(nn.Module, ABC):
    """A single-cell foundation model: a vocabulary, a tokenizer, an input embedding and a stack of encoder blocks.

    Attributes:
        family: kind of model: "scgpt", "geneformer", "scfoundation", or one of another package.
        name: name of the checkpoint folder.
        digest: sha256 of everything that determines the model's numbers.
        d_model: length of a token's vector.
        n_layers: number of encoder blocks.
        vocabulary: the genes and special tokens that the model knows.
        readouts: ways to pool the tokens of a cell into one vector; the first is the family's own ("official").
        mask_fraction: share of a cell's genes that the pretraining masks.
        max_genes: largest number of gene tokens of a cell; None where there is no limit.
        kept_of_long_cells: which genes of cells with more than `max_genes` become tokens, in words.
        is_causal: whether a token attends to itself and to those before it alone.
        predicts_in_place: whether `predict_masked` reads x where the masked genes are, and nowhere else. The last block
            is then run at these places alone.
        ignored_weights: weights of the checkpoint that neither activations nor the pretraining loss need.
        notes: what a user should know of the checkpoint: defaults that were taken, what is not read, how it was tuned.
        context: facts of a cell that go into the model beside its genes, such as its assay: a value for all cells, or
            "obs:COLUMN" where each cell has its own. They are options of the family (`Family.options`).
        autocast: dtype of the matrix products; None is the dtype of the weights.
    """

    family: ClassVar[str]
    name: str
    digest: str
    d_model: int
    n_layers: int
    vocabulary: Vocabulary
    readouts: tuple[str, ...]
    mask_fraction: float
    max_genes: int | None = None
    kept_of_long_cells: ClassVar[str] = "a random sample of their genes"
    is_causal: ClassVar[bool] = False
    predicts_in_place: ClassVar[bool] = False
    ignored_weights: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    context: Mapping[str, str] = MappingProxyType({})
    autocast: torch.dtype | None = None

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
        obs: Mapping[str, Sequence[str]] | None = None,
    ) -> Tokens:
        """Tokens of cells in CSR form: one row per cell, one column per gene of `match`.

        Random choices (ties, truncation) are drawn from (seed, the cell's content). `max_tokens`: largest number of
        tokens of a cell, special tokens included; None is the model's own limit. `obs`: by each of `obs_columns`, its
        value in every cell, "" where it is missing.

        Raises:
            TokenizationError: the values, or those of `obs`, cannot be tokenized.
            ConfigError: `max_tokens` leaves no place for a gene.
        """

    @abstractmethod
    def pool(
        self, x: Float[Tensor, "row position d_model"], is_gene: Bool[Tensor, "row position"], readout: str
    ) -> Float[Tensor, "row width"]:
        """One vector per cell by one of `readouts`; `is_gene` is false for padding and special tokens."""

    @abstractmethod
    def mask_genes(self, tokens: Tokens, *, seed: int, fraction: float) -> MaskedGeneTask:
        """The pretraining task on these cells: mask a `fraction` of each cell's genes, drawn from (seed, cell).

        Raises:
            ConfigError: the fraction does not lie between 0 and 1.
        """

    @abstractmethod
    def predict_masked(
        self, x: Float[Tensor, "row position d_model"], batch: Batch, masked: MaskedGeneBatch
    ) -> Float[Tensor, " masked_gene"]:
        """Prediction of each masked gene by the pretraining head, from the encoder's output x.

        Raises:
            ConfigError: the checkpoint has no weights of the head.
        """

    @abstractmethod
    def prediction_error(
        self, x: Float[Tensor, "row position d_model"], batch: Batch, masked: MaskedGeneBatch
    ) -> Float[Tensor, " masked_gene"]:
        """Error of each prediction, in the unit of the pretraining loss.

        Raises:
            ConfigError: the checkpoint has no weights of the head.
        """

    @abstractmethod
    def reset_weights(self, *, seed: int) -> None:
        """Draw all weights anew from `seed`, as a control for the pretrained ones."""

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm after the last block, whose output is the site "final"; None where the family has none."""
        return None

    @property
    def default_site(self) -> Site:
        """Site at which the family reads its cell embedding."""
        return self.sites[-1]

    def readout_site(self, patched: Site | str) -> Site:
        """Site at which a patch shows in the cell embedding: `default_site`, or the last site if the patch is later."""
        behind = self._depth(self._site(patched)) > self._depth(self.default_site)
        return self.sites[-1] if behind else self.default_site

    def width(self, readout: str) -> int:
        """Length of the cell embedding that a readout gives."""
        return self.d_model

    def match_genes(self, symbols: Sequence[str], ensembl_ids: Sequence[str] | None = None) -> GeneMatch:
        """Token of each gene of a data set, found by symbol or Ensembl id (`Vocabulary.match`).

        Raises:
            VocabularyError: no gene is in the vocabulary, or the two sequences differ in length.
        """
        return self.vocabulary.match(symbols, ensembl_ids)

    def coverage(self, indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, match: GeneMatch) -> Coverage:
        """Share of the genes and counts of cells in CSR form that the model knows."""
        return coverage_of(indptr, indices, data, match, n_vocabulary=self.vocabulary.n_genes)

    @property
    def obs_columns(self) -> tuple[str, ...]:
        """Columns of obs that `tokenize` needs: those that `context` names."""
        named = (value.removeprefix(OF_CELLS) for value in self.context.values() if value.startswith(OF_CELLS))
        return tuple(dict.fromkeys(named))

    def key_mask(self, batch: Batch) -> Bool[Tensor, "row position"] | Bool[Tensor, "row position key"] | None:
        """Positions that others may attend to in all blocks, or a line of its own for each position; None: all."""
        return batch.key_mask

    def key_bias(self, batch: Batch) -> Float[Tensor, "row position"] | Float[Tensor, "row position key"] | None:
        """What is added in all blocks to the scores of every key, or of every query and key; None: nothing."""
        return None

    def padding(self, readout: str) -> Padding | None:
        """Padding that a readout needs, because it takes the padded positions in; None where padding is invisible."""
        return None

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites of the model, in the order in which they are computed."""
        inner = (Site(kind=kind, index=i) for i in range(self.n_layers) for kind in ("attention", "mlp", "layer"))
        return (Site(kind="embedding"), *inner, *(() if self.final_norm is None else (FINAL,)))

    @torch.no_grad()
    def activations(
        self,
        tokens: Tokens | MaskedGeneTask,
        sites: Sequence[Site | str],
        *,
        max_batch_tokens: int = _MAX_BATCH_TOKENS,
        patches: Mapping[Site | str, Patch] | None = None,
    ) -> dict[Site, Float[Tensor, "token d_model"]]:
        """Activations of every token at each site, in the order of `tokens`, in host memory.

        Args:
            tokens: cells to run, or a `MaskedGeneTask` (from `mask_genes`), whose tokens run as in its prediction.
            sites: where to read.
            max_batch_tokens: largest number of positions of a batch, padding included.
            patches: functions that replace the activations at a site; the site is read after its patch. A patch
                receives the real tokens of a batch, on the model's device.

        Raises:
            ConfigError: a site that the model does not have, or a patch that changes the shape.
        """
        wanted = [self._site(site) for site in sites]
        patch_of = self._patches(patches)
        first, n_tokens = next(self.parameters()), _tokens_of(tokens).n_tokens
        out = {site: torch.empty(n_tokens, self.d_model, dtype=first.dtype) for site in wanted}
        depth = max((self._depth(site) for site in wanted), default=0)
        for batch in self._batches(tokens, max_batch_tokens):
            self._run(batch, depth, partial(_patch_and_record, batch=batch, out=out, patches=patch_of))
        return out

    def continued(
        self,
        tokens: Tokens | MaskedGeneTask,
        cached: CachedActivations,
        site: Site | str,
        *,
        patches: Mapping[Site | str, Patch] | None = None,
        max_batch_tokens: int = _MAX_BATCH_TOKENS,
    ) -> Float[Tensor, "token d_model"]:
        """Activations at `site` of a forward pass that continues from `cached`, on the model's device.

        Unlike `activations`, gradients flow back to `cached.x` and to what the patches return.

        Raises:
            ConfigError: as in `activations`, and if `cached` is not of these tokens or lies after `site` or a patch.
        """
        wanted, patch_of = self._site(site), self._patches(patches)
        self._check_cached(cached, _tokens_of(tokens), patch_of)
        if self._depth(wanted) < self._depth(start := self._site(cached.site)):
            raise ConfigError(f"site {str(wanted)!r} comes before {str(start)!r}, from which the pass continues")
        rows, found = [], list[Tensor]()
        for batch in self._batches(tokens, max_batch_tokens):
            patch = partial(_patch_and_record, batch=batch, out={}, patches=patch_of)

            def read(at: Site, x: Tensor, batch: Batch = batch, patch: SiteHook = patch) -> Tensor:
                x = patch(at, x)
                if at == wanted:
                    found.append(batch.real(x))
                return x

            self._run(batch, self._depth(wanted), read, cached)
            rows.append(batch.token_rows)
        if not found:
            return cached.x.new_zeros(0, self.d_model)
        return torch.cat(found)[torch.cat(rows).argsort().to(found[0].device)]

    @torch.no_grad()
    def embed(
        self,
        tokens: Tokens,
        *,
        readout: str = "mean",
        site: Site | str | None = None,
        patches: Mapping[Site | str, Patch] | None = None,
        cached: CachedActivations | None = None,
        max_batch_tokens: int = _MAX_BATCH_TOKENS,
    ) -> Float[Tensor, "cell width"]:
        """One vector per cell, in host memory; NaN for a cell without tokens.

        Args:
            tokens: cells to run.
            readout: one of `readouts`, or "official" for the family's own. "mean" is the mean over the gene tokens in
                every family.
            site: where to read; None is `default_site`.
            patches: as in `activations`.
            cached: activations of these tokens at an earlier site, from which the forward pass continues. Many
                interventions at one site then share the blocks before it. A readout that needs `padding` runs all
                blocks, because the activations of the padding are not in it.
            max_batch_tokens: as in `activations`.

        Raises:
            ConfigError: no such site or readout, a patch after the site of the readout, or cached activations that
                are not of these tokens or lie after a patch.
        """
        at = self._site(site) if site is not None else self.default_site
        pooled = self.embeddings(
            tokens, [at], readout=readout, patches=patches, cached=cached, max_batch_tokens=max_batch_tokens
        )
        return pooled[at]

    @torch.no_grad()
    def embeddings(
        self,
        tokens: Tokens,
        sites: Sequence[Site | str],
        *,
        readout: str = "mean",
        patches: Mapping[Site | str, Patch] | None = None,
        cached: CachedActivations | None = None,
        max_batch_tokens: int = _MAX_BATCH_TOKENS,
    ) -> dict[Site, Float[Tensor, "cell width"]]:
        """Cell embeddings (as `embed`) at each of several sites, in one forward pass.

        Raises:
            ConfigError: as in `embed`; a patch or `cached` must not lie after any of the sites.
        """
        readout = self._readout(readout)
        wanted = [self._site(site) for site in sites]
        for at in wanted:
            if at.kind in ("attention", "mlp"):
                raise ConfigError(f"site {str(at)!r} gives no cell embedding; allowed: 'embedding', 'layer.I', 'final'")
        patch_of = self._patches(patches)
        self._check_cached(cached, tokens, patch_of)
        starts = [*patch_of, *([] if cached is None else [self._site(cached.site)])]
        for at in wanted:
            if late := [str(start) for start in starts if self._depth(start) > self._depth(at)]:
                raise ConfigError(
                    f"{', '.join(late)} lies after {at}, at which the cells are read, so it would change nothing; "
                    f"give a later `site`, e.g. {str(self.sites[-1])!r}"
                )
        dtype = next(self.parameters()).dtype
        out = {at: torch.full((tokens.n_cells, self.width(readout)), torch.nan, dtype=dtype) for at in wanted}
        depth = max((self._depth(at) for at in wanted), default=0)
        if (padding := self.padding(readout)) is not None:
            cached = None
        for batch in self._batches(tokens, max_batch_tokens, padding):
            patch = partial(_patch_and_record, batch=batch, out={}, patches=patch_of)

            def pooling(site: Site, x: Tensor, batch: Batch = batch, patch: SiteHook = patch) -> Tensor:
                x = patch(site, x)
                if site in out:
                    out[site][batch.cells] = self.pool(x.to(dtype), batch.is_gene, readout).cpu()
                return x

            self._run(batch, depth, pooling, cached)
        return out

    @torch.no_grad()
    def pretraining_loss(
        self,
        tokens: Tokens,
        *,
        seed: int = 0,
        mask_fraction: float | None = None,
        patches: Mapping[Site | str, Patch] | None = None,
        max_batch_tokens: int = _MAX_BATCH_TOKENS,
    ) -> PretrainingLoss:
        """The model's own pretraining loss on these cells, with `patches` in place (`sae_core.scfm.pretraining`).

        Units: squared bins (scGPT, Tahoe-x1), nats (Geneformer, Nicheformer, TranscriptFormer), squared log1p CP10k
        (scFoundation, AIDO.Cell). The same seed masks the same genes whatever the patches are. No gene is masked in a
        cell with fewer than two.

        Raises:
            ConfigError: the checkpoint has no weights of the pretraining head.
        """
        fraction = self.mask_fraction if mask_fraction is None else mask_fraction
        task = self.mask_genes(tokens, seed=seed, fraction=fraction)
        total = torch.full((tokens.n_cells,), torch.nan, dtype=torch.float64)
        n_masked = torch.from_numpy(np.bincount(task.cell, minlength=tokens.n_cells))
        for x, batch, masked in self._masked_batches(task, max_batch_tokens, patches):
            error = self.prediction_error(x, batch, masked).double()
            of_row = torch.zeros(len(batch.cells), dtype=torch.float64, device=error.device)
            total[batch.cells] = of_row.index_add_(0, masked.row, error).cpu()
        return PretrainingLoss(
            per_cell=torch.where(n_masked > 0, total / n_masked.clamp(min=1), torch.nan), n_masked=n_masked
        )

    @torch.no_grad()
    def masked_gene_prediction(
        self,
        task: MaskedGeneTask,
        *,
        patches: Mapping[Site | str, Patch] | None = None,
        cached: CachedActivations | None = None,
        max_batch_tokens: int = _MAX_BATCH_TOKENS,
    ) -> MaskedGenePrediction:
        """Predictions of the masked genes of `task` (from `mask_genes`) by the model's own head.

        scGPT and Tahoe-x1 predict the bin from the gene's own token, Geneformer and Nicheformer the log probability
        (nats) of the masked gene, scFoundation and AIDO.Cell log1p CP10k, TranscriptFormer the rate of the count.

        Args:
            task: cells with masked genes.
            patches: as in `activations`.
            cached: what `activations` gave for this task at a site.
            max_batch_tokens: as in `activations`.

        Raises:
            ConfigError: the checkpoint has no weights of the head, or `cached` is not of this task (as in `embed`).
        """
        self._check_cached(cached, task.tokens, self._patches(patches))
        found = torch.full((len(task.cell),), torch.nan)
        for x, batch, masked in self._masked_batches(
            task, max_batch_tokens, patches, cached, in_place=self.predicts_in_place
        ):
            found[masked.task_rows] = self.predict_masked(x, batch, masked).to("cpu", torch.float32)
        cell, gene_id, target = (torch.from_numpy(a) for a in (task.cell, task.gene_id, task.target))
        return MaskedGenePrediction(cell=cell, gene_id=gene_id, prediction=found, target=target)

    def _masked_batches(
        self,
        task: MaskedGeneTask,
        max_batch_tokens: int,
        patches: Mapping[Site | str, Patch] | None,
        cached: CachedActivations | None = None,
        *,
        in_place: bool = False,
    ) -> Iterator[tuple[Tensor, Batch, MaskedGeneBatch]]:
        """Output of the encoder, batch by batch, and the masked genes of each batch.

        `in_place`: only what is at the places of the masked genes is wanted.
        """
        patch_of, depth = self._patches(patches), self._depth(self.sites[-1])
        # a patch receives all tokens
        in_place = in_place and all(site.n_blocks is not None and site.n_blocks < self.n_layers for site in patch_of)
        for batch in self._batches(task, max_batch_tokens):
            hook = partial(_patch_and_record, batch=batch, out={}, patches=patch_of)
            masked = MaskedGeneBatch.of(task, batch)
            places = masked.places(len(batch.cells)) if in_place else None
            yield self._run(batch, depth, hook, cached, places=places), batch, masked

    def _run(
        self,
        batch: Batch,
        depth: int,
        hook: SiteHook,
        cached: CachedActivations | None = None,
        *,
        places: Int64[Tensor, "row place"] | None = None,
    ) -> Tensor:
        """Run the blocks; of the last one at `places` alone if they are given, and with zeros elsewhere."""
        device = batch.gene_id.device.type
        with torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None):
            if cached is None:
                n_done, x = 0, hook(Site(kind="embedding"), self.input_embedding(batch.gene_id, batch.value))
            else:
                start = self._site(cached.site)
                x = batch.padded(cached.x[batch.token_rows].to(batch.gene_id.device))
                n_done, x = self._depth(start), hook(start, x)
            masks: dict[str, Any] = {"key_mask": self.key_mask(batch), "key_bias": self.key_bias(batch)}
            for i, block in enumerate(self.blocks[n_done:depth], start=n_done):
                if places is None or i < self.n_layers - 1:
                    x = block(x, index=i, hook=hook, **masks)
                else:
                    x = _put_at(places, block(x, index=i, hook=hook, places=places, **masks), x.shape[1])
            if self.final_norm is not None and n_done <= self.n_layers < depth:
                x = hook(FINAL, self.final_norm(x))
        return x

    def _check_cached(self, cached: CachedActivations | None, tokens: Tokens, patches: Mapping[Site, Patch]) -> None:
        if cached is None:
            return
        start = self._site(cached.site)
        if start.kind not in ("embedding", "layer") or cached.x.shape != (tokens.n_tokens, self.d_model):
            raise ConfigError(
                f"the cached activations are of site {str(start)!r} and shape {tuple(cached.x.shape)}; they must be "
                f"what `activations` gives for these tokens at 'embedding' or 'layer.I', of shape "
                f"{(tokens.n_tokens, self.d_model)}"
            )
        # inside a block, attention and mlp come before the layer's own output
        early = [str(p) for p in patches if p != start and self._depth(p) <= self._depth(start)]
        if early:
            raise ConfigError(
                f"patches at {', '.join(early)} come before the cached activations at {start}; leave out `cached`"
            )

    def _site(self, site: Site | str) -> Site:
        parsed = Site.parse(site)
        lacks_final = parsed.kind == "final" and self.final_norm is None
        if lacks_final or (parsed.index is not None and parsed.index >= self.n_layers):
            raise ConfigError(
                f"{self.name} has {self.n_layers} layers and no site {str(parsed)!r}; allowed: embedding, layer.0 to "
                f"layer.{self.n_layers - 1}, attention.I and mlp.I of the same layers"
                + ("" if self.final_norm is None else ", final")
            )
        return parsed

    def _lacks_head(self, weights: str) -> ConfigError:
        return ConfigError(
            f"{self.name} has no weights of {weights}, so it has no pretraining loss and no masked-gene prediction; "
            "load a checkpoint that has them"
        )

    def _depth(self, site: Site) -> int:
        return self.n_layers + 1 if site.n_blocks is None else site.n_blocks

    def _readout(self, readout: str) -> str:
        if readout != "official" and readout not in self.readouts:
            raise ConfigError(
                f"unknown readout {readout!r}; allowed for {self.name}: {', '.join(self.readouts)}, official"
            )
        return self.readouts[0] if readout == "official" else readout

    def _patches(self, patches: Mapping[Site | str, Patch] | None) -> dict[Site, Patch]:
        return {self._site(site): patch for site, patch in (patches or {}).items()}

    def _batches(
        self, tokens: Tokens | MaskedGeneTask, max_batch_tokens: int, padding: Padding | None = None
    ) -> Iterator[Batch]:
        parameter, ragged = next(self.parameters()), _tokens_of(tokens)
        marks: dict[str, Any] = {}
        if isinstance(tokens, MaskedGeneTask):
            marks = {"is_masked_gene": tokens.is_masked_gene, "is_query_only": tokens.is_query_only, "is_task": True}
        lengths = ragged.lengths
        if padding is not None:
            lengths = np.where(lengths > 0, np.maximum(lengths, padding.length), 0)
        for cells in plan_batches(lengths, max_batch_tokens):
            yield Batch.of(ragged, cells, device=parameter.device, dtype=parameter.dtype, padding=padding, **marks)


def _put_at(places: Tensor, found: Tensor, n_positions: int) -> Tensor:
    """Activations [row position d_model] with what was found at the places of each row, and zeros elsewhere."""
    x = found.new_zeros(len(found), n_positions, found.shape[-1])
    x[torch.arange(len(x), device=x.device)[:, None], places] = found
    return x


def _tokens_of(tokens: Tokens | MaskedGeneTask) -> Tokens:
    return tokens.tokens if isinstance(tokens, MaskedGeneTask) else tokens


def _patch_and_record(
    site: Site, x: Tensor, *, batch: Batch, out: dict[Site, Tensor], patches: dict[Site, Patch]
) -> Tensor:
    if site not in out and site not in patches:
        return x
    real = batch.real(x)
    if site in patches:
        with torch.autocast(x.device.type, enabled=False):
            patched = patches[site](real, batch.info)
        if patched.shape != real.shape:
            raise ConfigError(
                f"a patch at {site} turned shape {tuple(real.shape)} into {tuple(patched.shape)}; keep the shape"
            )
        real = patched.to(x.dtype)
        x = batch.padded(real, like=x)
    if site in out:
        out[site][batch.token_rows] = real.to("cpu", out[site].dtype)
    return x


def masked_mean(
    x: Float[Tensor, "row position d_model"], mask: Bool[Tensor, "row position"]
) -> Float[Tensor, "row d_model"]:
    """Mean over the positions where `mask` is true; NaN in a row without any."""
    weight = mask.to(x.dtype)[:, :, None]
    return (x * weight).sum(1) / weight.sum(1)
