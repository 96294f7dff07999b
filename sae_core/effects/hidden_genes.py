"""`HiddenGenes`: one cell with hidden genes, encoded at a site, and the head's answer for any activations there.

The blocks before the site run once. All variants of the cell then go through the blocks after it as one batch of equal
rows, so that N variants at layer l of L cost 1 + N (L - l) / L forward passes, and no row is padded. The bits of an
answer depend on the number of variants that are asked for together, and on nothing else.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sae_core.errors import ConfigError
from sae_core.sae import SparseAutoencoder
from sae_core.scfm import CachedActivations, FoundationModel, MaskedGeneTask, Patch, Site, TokenInfo, Tokens
from sae_core.steering.forward import check_width, starting_site


class HiddenGenes:
    """One cell with hidden genes at a site.

    Usage: `cell.answers(cell.x[None] + steps) - cell.answers(cell.x[None])`, with `cell = HiddenGenes(model, tokens,
    sae, "layer.2")`.

    Attributes:
        x: activations of the cell's tokens at the site [n_tokens d_model], on the model's device.
        last: their activations after the last block, `last_site`, before any final norm.
        codes: their codes, dense [n_tokens n_features].
        is_visible: gene tokens that are not hidden; only these are ever steered [n_tokens].
        is_asked: tokens from which a hidden gene is predicted; none where hidden genes have no token [n_tokens].
        gene_id: the hidden genes, in the model's vocabulary [n_hidden].
        target: what a perfect model would predict, in the unit of the head [n_hidden].
    """

    def __init__(
        self,
        model: FoundationModel,
        tokens: Tokens,
        sae: SparseAutoencoder,
        site: Site | str,
        *,
        seed: int = 0,
        fraction: float | None = None,
    ) -> None:
        """Hide genes, run the blocks up to the site and encode the tokens.

        Args:
            model: a model with weights of its pretraining head.
            tokens: the tokens of one cell.
            sae: the autoencoder of the site.
            site: where the activations are changed.
            seed: hidden are the genes that (seed, cell) draws.
            fraction: the share of the genes that is hidden; None: what the model was trained with.

        Raises:
            ConfigError: there is not one cell, no such site, or the autoencoder has another width than the model.
        """
        if tokens.n_cells != 1:
            raise ConfigError(f"the tokens are of {tokens.n_cells} cells; give those of one")
        check_width(model, sae)
        self.model, self.sae, self.site = model, sae, Site.parse(site)
        self._task = model.mask_genes(tokens, seed=seed, fraction=model.mask_fraction if fraction is None else fraction)
        self._start = starting_site(self.site, model)
        n, device = self._task.tokens.n_tokens, next(model.parameters()).device
        self.last_site = Site(kind="layer", index=model.n_layers - 1)
        sites = [self.site, self._start, self.last_site]
        found = model.activations(self._task, sites, max_batch_tokens=max(n, 1))
        self.x, self._before, self.last = (found[at].to(device) for at in sites)
        self.codes: Float[Tensor, "token feature"] = sae.encode(self.x).to_dense()
        is_asked = self._task.is_masked_gene
        self.is_asked = _bools(np.zeros(n, dtype=bool) if is_asked is None else is_asked, device)
        self.is_visible: Bool[Tensor, " token"] = _bools(~self._task.tokens.is_special, device) & ~self.is_asked
        self.gene_id: Int64[np.ndarray, " hidden_gene"] = self._task.gene_id
        self.target = torch.from_numpy(self._task.target)

    def answers(
        self, x: Float[Tensor, "variant token d_model"], site: Site | str | None = None
    ) -> Float[Tensor, "variant hidden_gene"]:
        """The head's predictions of the hidden genes with activations x at a site, in host memory.

        `site` is that of the cell, or `last_site`.
        """
        n = len(x)
        at = self.site if site is None else Site.parse(site)
        flat = x.flatten(0, 1)
        cached, patches = CachedActivations(at, flat), dict[Site | str, Patch]()
        if at == self.site and self._start != self.site:
            length = x.shape[1]

            def put(_: Tensor, info: TokenInfo) -> Tensor:
                return flat[info.cell * length + info.position]

            cached, patches = CachedActivations(self._start, self._before.repeat(n, 1)), {at: put}
        found = self.model.masked_gene_prediction(
            _repeated(self._task, n), cached=cached, patches=patches, max_batch_tokens=max(len(flat), 1)
        )
        return found.prediction.view(n, -1)


def _repeated(task: MaskedGeneTask, n: int) -> MaskedGeneTask:
    """The task of one cell, `n` times."""
    same, length = np.zeros(n, np.int64), task.tokens.n_tokens
    rows = task.token_rows
    return replace(
        task,
        tokens=task.tokens.take(same),
        cell=np.repeat(np.arange(n), len(task.cell)),
        gene_id=np.tile(task.gene_id, n),
        target=np.tile(task.target, n),
        token_rows=None if rows is None else (rows + length * np.arange(n)[:, None]).ravel(),
        is_query_only=None if task.is_query_only is None else np.tile(task.is_query_only, n),
    )


def _bools(values: np.ndarray, device: torch.device) -> Bool[Tensor, " token"]:
    return torch.from_numpy(values).to(device)
