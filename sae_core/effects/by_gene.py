"""The effects of one feature, summed over cells by hidden gene.

    ablate   z' = 0      on the visible tokens where the feature fires
    boost    z' = p99    on the same tokens; p99 is the feature's own 99th percentile

The effect in a cell is the prediction with the step minus that without it, in the unit of the head. The direct path is
the same step at the end of the last block, on the tokens of the feature and on those from which genes are predicted,
with no block between: what the head reads of the feature's direction. It is given less its mean over the hidden genes
of the cell, because a head may answer to a direction with one constant for all genes.

In a causal model a token reaches the predictions behind it alone. A gene that is predicted before all tokens of the
feature is left out in that cell: its prediction says nothing of the feature.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from sae_core.effects.directions import Directions
from sae_core.effects.hidden_genes import HiddenGenes

INTERVENTIONS = ("ablate", "boost")


@dataclass(frozen=True, kw_only=True)
class FeatureEffect:
    """The mean effect of a feature on each gene that was hidden in a cell where it fires.

    Attributes:
        gene_id: ascending, in the model's vocabulary [n_genes].
        n_cells: the number of cells of each gene [n_genes].
        n_donors: the number of their donors [n_genes].
        effect: by intervention and direction, the feature's own first [2 1+2*n_nulls n_genes].
        direct: the direct path of the ablation and of the boost [2 n_genes].
        n_tokens: tokens that were changed, in all cells.
        n_cells_fired: cells in which the feature fires on a visible token.
    """

    gene_id: Int64[np.ndarray, " gene"]
    n_cells: Int64[np.ndarray, " gene"]
    n_donors: Int64[np.ndarray, " gene"]
    effect: Float64[np.ndarray, "intervention direction gene"]
    direct: Float64[np.ndarray, "intervention gene"]
    n_tokens: int
    n_cells_fired: int


class EffectSums:
    """Sums over cells of the effects of one feature; memory is that of the model's vocabulary."""

    def __init__(self, n_vocabulary: int, n_directions: int) -> None:
        self._effect = np.zeros((len(INTERVENTIONS), n_directions, n_vocabulary))
        self._direct = np.zeros((len(INTERVENTIONS), n_vocabulary))
        self._n = np.zeros(n_vocabulary, np.int64)
        self._of_donor: dict[int, np.ndarray] = {}
        self.n_tokens = self.n_cells = 0

    def add(
        self,
        gene_id: Int64[np.ndarray, " hidden_gene"],
        effect: Float64[np.ndarray, "intervention direction hidden_gene"],
        direct: Float64[np.ndarray, "intervention hidden_gene"],
        *,
        donor: int,
        n_tokens: int,
    ) -> None:
        """Add one cell; a gene occurs once in it."""
        self._effect[:, :, gene_id] += effect
        self._direct[:, gene_id] += direct
        self._n[gene_id] += 1
        seen = self._of_donor.setdefault(donor, np.zeros(len(self._n), dtype=bool))
        seen[gene_id] = True
        self.n_tokens += n_tokens
        self.n_cells += 1

    def mean(self) -> FeatureEffect:
        """The means over cells of the genes that were hidden in any."""
        gene = np.flatnonzero(self._n)
        n = self._n[gene]
        donors = sum((seen[gene].astype(np.int64) for seen in self._of_donor.values()), np.zeros(len(gene), np.int64))
        return FeatureEffect(
            gene_id=gene,
            n_cells=n,
            n_donors=donors,
            effect=self._effect[:, :, gene] / n,
            direct=self._direct[:, gene] / n,
            n_tokens=self.n_tokens,
            n_cells_fired=self.n_cells,
        )


@torch.no_grad()
def add_cell(
    sums: EffectSums, cell: HiddenGenes, feature: int, directions: Directions, *, boosted: float, donor: int
) -> bool:
    """Add a cell to the sums of a feature; false if the feature fires on no visible token that reaches a hidden gene.

    `boosted` is the value of the code under the boost.
    """
    rows = cell.rows_of(feature)
    reached = cell.reached_from(rows) if len(rows) else np.zeros(0, dtype=bool)
    if not reached.any():
        return False
    z = cell.codes[rows, feature]
    change = torch.stack([-z, boosted - z]) * directions.norm
    steps = change[:, None, :, None] * directions.all[None, :, None, :]  # intervention, direction, token, d_model
    flat = steps.flatten(0, 1)
    variants = torch.split(torch.cat([torch.zeros_like(flat[:1]), flat]), cell.n_at_once)
    answers = [cell.answers(cell.moved(rows, part)) for part in variants]
    found = torch.cat(answers).double()
    effect = (found[1:] - found[0]).view(len(INTERVENTIONS), -1, len(cell.gene_id)).numpy()
    direct = _direct(cell, rows, change, directions)
    sums.add(
        cell.gene_id[reached],
        effect[:, :, reached],
        direct.double().numpy()[:, reached],
        donor=donor,
        n_tokens=len(rows),
    )
    return True


def _direct(cell: HiddenGenes, rows: Tensor, change: Tensor, directions: Directions) -> Tensor:
    """The direct path of each intervention, less its mean over the hidden genes."""
    x = cell.last.repeat(1 + len(change), 1, 1)
    step = change[:, :, None] * directions.own
    x[1:, rows] += step.to(x.dtype)
    # the tokens that the head reads take the mean step of the feature's tokens
    asked = cell.is_asked.nonzero()[:, 0]
    x[1:, asked] += step.mean(1, keepdim=True).to(x.dtype)
    answers = cell.answers(x, cell.last_site)
    moved = answers[1:] - answers[0]
    return moved - moved.mean(1, keepdim=True)
