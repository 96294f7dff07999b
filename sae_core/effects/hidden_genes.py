"""`HiddenGenes`: one cell with hidden genes, encoded at a site, and the head's answer for any activations there."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sae_core.effects.cell_at_site import CellAtSite, check_one
from sae_core.scfm import MaskedGeneTask, Site

if TYPE_CHECKING:
    from sae_core.sae import SparseAutoencoder
    from sae_core.scfm import FoundationModel, Tokens


class HiddenGenes(CellAtSite):
    """One cell with hidden genes at a site.

    Usage: `cell.answers(cell.x[None] + steps) - cell.answers(cell.x[None])`, with `cell = HiddenGenes(model, tokens,
    sae, "layer.2")`.

    Attributes:
        last: activations of the tokens after the last block, `last_site`, before any final norm [n_tokens d_model].
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
        check_one(tokens)
        self._task = model.mask_genes(tokens, seed=seed, fraction=model.mask_fraction if fraction is None else fraction)
        self.last_site = Site(kind="layer", index=model.n_layers - 1)
        super().__init__(model, self._task, sae, site, also=[self.last_site])
        self.last = self.kept[self.last_site]
        self.gene_id: Int64[np.ndarray, " hidden_gene"] = self._task.gene_id
        self.target = torch.from_numpy(self._task.target)

    def reached_from(self, rows: Int64[Tensor, " steered"]) -> Bool[np.ndarray, " hidden_gene"]:
        """Whether any of these tokens lies where the prediction of each hidden gene can attend to it."""
        asked = self._task.token_rows
        if not self.model.is_causal or asked is None:
            return np.ones(len(self.gene_id), dtype=bool)
        return asked >= int(rows.min())

    def answers(
        self, x: Float[Tensor, "variant token d_model"], site: Site | None = None
    ) -> Float[Tensor, "variant hidden_gene"]:
        """The head's predictions of the hidden genes with activations x at a site, in host memory.

        `site` is that of the cell, or `last_site`.
        """
        cached, patches = self.entry(x, site)
        found = self.model.masked_gene_prediction(
            _repeated(self._task, len(x)), cached=cached, patches=patches, max_batch_tokens=max(len(cached.x), 1)
        )
        return found.prediction.view(len(x), -1)


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
