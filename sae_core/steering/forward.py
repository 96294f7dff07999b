"""`SteeredModel`: many interventions on the same cells, each at the cost of the blocks after the site.

The blocks up to the site run once, and every token is encoded once. An intervention then sets x' = x + (z' - z) W_dec
at the site and runs the remaining blocks, for those cells alone whose activations changed. N interventions at layer l
of L therefore cost at most 1 + N (L - l) / L forward passes (tests/benchmarks/bench_steering.py).

On a CPU every forward pass holds one cell. The shape of a matrix product decides the order of its sums, so a cell in a
batch differs in the last bits from the same cell alone. With one cell at a time, a cell's embedding does not depend on
the other cells bit for bit, and cells that are not steered keep their embeddings bit for bit. On a GPU cells share
batches, and results agree to 1e-5.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sae_core.errors import ConfigError
from sae_core.sae import SparseAutoencoder, SparseCodes
from sae_core.scfm import (
    CachedActivations,
    FoundationModel,
    MaskedGenePrediction,
    MaskedGeneTask,
    Patch,
    Site,
    TokenInfo,
    Tokens,
)
from sae_core.steering.apply import Steering
from sae_core.steering.masks import MaskedPatch

GPU_BATCH_TOKENS = 8192


class SteeredModel:
    """A model with its cells encoded at a site, to which any number of interventions can be applied.

    Usage: `SteeredModel(model, tokens, sae, "layer.2").embeddings(Steering(sae=sae, intervention=...), ["layer.3"])`.

    Attributes:
        x: activations of all tokens at the site, on the model's device.
        codes: codes of all tokens.
        info: gene, cell and position of all tokens.
    """

    def __init__(
        self,
        model: FoundationModel,
        tokens: Tokens,
        sae: SparseAutoencoder,
        site: Site | str,
        *,
        is_part: bool = False,
    ) -> None:
        """Run the blocks up to the site and encode every token.

        `is_part` says that the cells are a part of a larger set, so that a mask may select none of their tokens.

        Raises:
            ConfigError: the model has no such site, or the autoencoder has another width than the model.
        """
        check_width(model, sae)
        self.model, self.tokens, self.sae, self.is_part = model, tokens, sae, is_part
        self._state = _SiteState(model, tokens, sae, site)
        self.x, self.codes, self.info = self._state.x, self._state.codes, self._state.info
        self._site = site
        self._unsteered: dict[tuple[tuple[str, ...], str], dict[Site, Tensor]] = {}
        self._masked: dict[tuple[int, float], _SiteState] = {}

    def embeddings(
        self, steering: MaskedPatch | None, sites: Sequence[Site | str], *, readout: str = "mean"
    ) -> dict[Site, Float[Tensor, "cell width"]]:
        """The result of `FoundationModel.embeddings` under `steering`, or unsteered if that is None.

        A cell without tokens has NaN.

        Raises:
            ConfigError: before anything runs, if the steering has another autoencoder or number of cells, or its masks
                select no token; also the errors of `FoundationModel.embeddings`.
        """
        if steering is None:
            return {site: embedded.clone() for site, embedded in self._unsteered_embeddings(sites, readout).items()}
        self._check(steering)
        x = self._state.steered(steering)
        moved = torch.unique(self.info.cell[(x != self.x).any(dim=1)]).cpu()
        if len(moved) == self.tokens.n_cells:
            return self._state.embeddings(x, sites, readout)
        unsteered = self._unsteered_embeddings(sites, readout)
        embedded = self._state.embeddings(x, sites, readout, moved.numpy())
        return {site: unsteered[site].index_copy(0, moved, embedded[site]) for site in unsteered}

    def masked_gene_prediction(
        self, steering: MaskedPatch | None, *, seed: int = 0, fraction: float | None = None
    ) -> MaskedGenePrediction:
        """The model's prediction of masked genes under `steering`, or unsteered if that is None.

        The masked genes depend on (seed, cell) alone, so they are the same for every steering. `fraction` is the share
        of each cell's genes that is masked, by default the one that the model was trained with. The tokens at which
        the model predicts are not steered by default, and `positions` counts the tokens that are left
        (scFoundation's encoder does not get masked ones).

        Raises:
            ConfigError: as in `embeddings`, and if the checkpoint has no head for this task.
        """
        if steering is not None:
            self._check(steering)
        key = (seed, self.model.mask_fraction if fraction is None else fraction)
        if key not in self._masked:
            task = self.model.mask_genes(self.tokens, seed=seed, fraction=key[1])
            self._masked = {key: _SiteState(self.model, task, self.sae, self._site)}
        return self._masked[key].masked_gene_prediction(steering)

    def _unsteered_embeddings(self, sites: Sequence[Site | str], readout: str) -> dict[Site, Tensor]:
        key = (tuple(map(str, sites)), readout)
        if key not in self._unsteered:
            self._unsteered[key] = self._state.embeddings(None, sites, readout)
        return self._unsteered[key]

    def _check(self, steering: MaskedPatch) -> None:
        if isinstance(steering, Steering) and steering.sae is not self.sae:
            raise ConfigError("the steering has another autoencoder than this model: use the same one for both.")
        groups = steering.groups
        if groups is not None and len(groups) != self.tokens.n_cells:
            raise ConfigError(
                f"group_of_cell has {len(groups)} entries; allowed is one for each of the {self.tokens.n_cells} cells."
            )
        if not self.is_part:
            steering.check(self.info)


class _SiteState:
    """The state of cells, or of a masked-gene task on them, at the site: activations, codes, and what comes before."""

    def __init__(
        self, model: FoundationModel, inputs: Tokens | MaskedGeneTask, sae: SparseAutoencoder, site: Site | str
    ) -> None:
        self.model, self.inputs, self.sae, self.site = model, inputs, sae, Site.parse(site)
        self.tokens = inputs.tokens if isinstance(inputs, MaskedGeneTask) else inputs
        device = next(model.parameters()).device
        self.batch = 1 if device.type == "cpu" else GPU_BATCH_TOKENS
        self.start = starting_site(self.site, model)
        found = model.activations(inputs, [self.site, self.start], max_batch_tokens=self.batch)
        self.before, self.x = found[self.start], found[self.site].to(device)
        self.info = _info(self.tokens, inputs.is_masked_gene if isinstance(inputs, MaskedGeneTask) else None, device)
        parts = torch.split(self.x, self.tokens.lengths.tolist() if device.type == "cpu" else GPU_BATCH_TOKENS)
        codes = [sae.encode(part) for part in parts if len(part)] or [sae.encode(self.x)]
        self.codes = SparseCodes.concatenate(codes).with_index()

    def steered(self, steering: MaskedPatch) -> Float[Tensor, "token d_model"]:
        """The activations at the site under `steering`."""
        return steering.steered(self.x, self.info, self.codes)

    def embeddings(
        self,
        x: Float[Tensor, "token d_model"] | None,
        sites: Sequence[Site | str],
        readout: str,
        cells: Int64[np.ndarray, " chosen"] | None = None,
    ) -> dict[Site, Float[Tensor, "chosen width"]]:
        """Embeddings of `cells` (None: all) with activations x at the site (None: unsteered)."""
        tokens, before = self.tokens, self.before
        if cells is not None:
            rows = torch.from_numpy(tokens.rows(cells))
            tokens, before, x = tokens.take(cells), before[rows], None if x is None else x[rows]
        cached, patches = self._entry(x, before, tokens)
        return self.model.embeddings(
            tokens, sites, readout=readout, cached=cached, patches=patches, max_batch_tokens=self.batch
        )

    def masked_gene_prediction(self, steering: MaskedPatch | None) -> MaskedGenePrediction:
        """The prediction of the masked genes under `steering`."""
        assert isinstance(self.inputs, MaskedGeneTask)
        x = None if steering is None else self.steered(steering)
        cached, patches = self._entry(x, self.before, self.tokens)
        return self.model.masked_gene_prediction(
            self.inputs, cached=cached, patches=patches, max_batch_tokens=self.batch
        )

    def _entry(
        self, x: Tensor | None, before: Tensor, tokens: Tokens
    ) -> tuple[CachedActivations, dict[Site | str, Patch]]:
        """Where a forward pass starts: at the site itself, or before its block with a patch that sets x at the site."""
        if x is None:
            return CachedActivations(self.start, before), {}
        if self.start == self.site:
            return CachedActivations(self.site, x), {}
        offsets = torch.from_numpy(tokens.offsets).to(x.device)
        return CachedActivations(self.start, before), {self.site: lambda _, info: x[offsets[info.cell] + info.position]}


def check_width(model: FoundationModel, sae: SparseAutoencoder) -> None:
    """Raise ConfigError for an autoencoder of another width than the model."""
    if sae.config.d_model != model.d_model:
        raise ConfigError(
            f"the autoencoder has d_model = {sae.config.d_model}, and {model.name} has {model.d_model}: use the model "
            "and site that the autoencoder was trained on."
        )


def starting_site(site: Site, model: FoundationModel) -> Site:
    """The last site not after `site` at which a forward pass can start."""
    if site.kind in ("embedding", "layer"):
        return site
    index = model.n_layers if site.index is None else site.index
    return Site(kind="layer", index=index - 1) if index else Site(kind="embedding")


def _info(tokens: Tokens, is_masked_gene: np.ndarray | None, device: torch.device) -> TokenInfo:
    def put(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    cell = tokens.cell_of_token()
    return TokenInfo(
        gene_id=put(tokens.gene_id),
        cell=put(cell),
        position=put(np.arange(tokens.n_tokens) - tokens.offsets[cell]),
        is_special=put(tokens.is_special),
        is_masked_gene=put(np.zeros(tokens.n_tokens, dtype=bool) if is_masked_gene is None else is_masked_gene),
    )
