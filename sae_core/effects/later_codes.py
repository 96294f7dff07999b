"""Which features of a later autoencoder change when a feature of an earlier one is ablated.

    ablate   z' = 0 on the gene tokens of a cell where the feature fires
    effect   mean over the cell's gene tokens of the later code with the step, minus that without it

One step changes all later features at once, so that every pair of an earlier and a later feature is measured, at the
cost of the earlier features alone. A selection of pairs by gradients (attribution patching: Syed et al. 2023,
arXiv:2310.10348) would save nothing: it takes a backward pass for each later feature of a cell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from sae_core.effects.cell_at_site import CellAtSite
from sae_core.errors import ConfigError
from sae_core.scfm import Site
from sae_core.steering.forward import check_width

if TYPE_CHECKING:
    from sae_core.effects.directions import Directions
    from sae_core.sae import SparseAutoencoder
    from sae_core.scfm import FoundationModel, Tokens


class LaterCodes(CellAtSite):
    """One cell at the site of an earlier autoencoder, and the codes of a later one for any activations there.

    Usage: `cell.codes_after(cell.x[None] + steps) - cell.codes_after(cell.x[None])`.
    """

    def __init__(
        self,
        model: FoundationModel,
        tokens: Tokens,
        sae: SparseAutoencoder,
        site: Site | str,
        *,
        later_sae: SparseAutoencoder,
        later_site: Site | str,
    ) -> None:
        """Run the blocks up to the earlier site and encode the tokens.

        Raises:
            ConfigError: as `CellAtSite`, and if the later autoencoder has another width or does not lie later.
        """
        check_width(model, later_sae)
        self.later_sae, self.later_site = later_sae, Site.parse(later_site)
        check_order(model, site, later_site)
        super().__init__(model, tokens, sae, site)

    @torch.no_grad()
    def codes_after(self, x: Float[Tensor, "variant token d_model"]) -> Float[Tensor, "variant later_feature"]:
        """The mean codes over the cell's gene tokens with activations x at the earlier site, on the model's device."""
        n, length = x.shape[:2]
        cached, patches = self.entry(x)
        after = self.model.continued(
            self.tokens.take(np.zeros(n, np.int64)),
            cached,
            self.later_site,
            patches=patches,
            max_batch_tokens=n * length,
        )
        genes = self.is_visible.nonzero()[:, 0]
        codes = self.later_sae.encode(after.view(n, length, -1)[:, genes].flatten(0, 1).float())
        variant = torch.repeat_interleave(codes.crow.diff()) // max(len(genes), 1)
        total = torch.zeros(n * codes.n_features, dtype=codes.value.dtype, device=codes.value.device)
        total.index_add_(0, variant * codes.n_features + codes.col.long(), codes.value)
        return total.view(n, -1) / max(len(genes), 1)


def check_order(model: FoundationModel, earlier: Site | str, later: Site | str) -> None:
    """Raise ConfigError unless both sites are of the model and the second is computed after the first."""
    places = []
    for site in (Site.parse(earlier), Site.parse(later)):
        if site not in model.sites:
            raise ConfigError(f"{model.name} has no site {str(site)!r}; allowed: {', '.join(map(str, model.sites))}")
        places.append(model.sites.index(site))
    if places[0] >= places[1]:
        raise ConfigError(
            f"{str(later)!r} does not come after {str(earlier)!r} in {model.name}; name the SAE of the earlier site "
            "first"
        )


@dataclass(frozen=True, kw_only=True)
class LaterEffect:
    """The mean effect of an earlier feature on the later features that fire in its cells.

    Attributes:
        feature_id: the later features, ascending [n_later].
        n_cells_fired: cells in which each fires, with the step or without it [n_later].
        base: mean code of each without the step, over all cells of the earlier feature [n_later].
        effect: by direction, the feature's own first [1+2*n_nulls n_later].
        of_donor: mean effect of the feature over the cells of each donor [n_donors n_later].
        n_cells: cells of the earlier feature.
    """

    feature_id: Int64[np.ndarray, " later"]
    n_cells_fired: Int64[np.ndarray, " later"]
    base: Float64[np.ndarray, " later"]
    effect: Float64[np.ndarray, "direction later"]
    of_donor: Float64[np.ndarray, "donor later"]
    n_cells: int


class LaterSums:
    """Sums over cells of the effects of one earlier feature on all later ones."""

    def __init__(self, n_later: int, n_directions: int) -> None:
        self._effect = np.zeros((n_directions, n_later))
        self._base = np.zeros(n_later)
        self._fired = np.zeros(n_later, np.int64)
        self._of_donor: dict[int, np.ndarray] = {}
        self._cells_of_donor: dict[int, int] = {}

    def add(
        self, before: Float64[np.ndarray, " later"], after: Float64[np.ndarray, "direction later"], *, donor: int
    ) -> None:
        """Add one cell: the mean later codes without a step, and with one along each direction."""
        change = after - before
        self._effect += change
        self._base += before
        self._fired += (before > 0) | (after[0] > 0)
        self._of_donor[donor] = self._of_donor.get(donor, 0) + change[0]
        self._cells_of_donor[donor] = self._cells_of_donor.get(donor, 0) + 1

    def mean(self, *, min_cells: int) -> LaterEffect:
        """The means over cells, of the later features that fire in at least `min_cells` of them."""
        n_cells = sum(self._cells_of_donor.values())
        kept = np.flatnonzero(self._fired >= min_cells)
        effect = self._effect[:, kept] / max(n_cells, 1)
        donors = [self._of_donor[donor][kept] / n for donor, n in self._cells_of_donor.items()]
        return LaterEffect(
            feature_id=kept,
            n_cells_fired=self._fired[kept],
            base=self._base[kept] / max(n_cells, 1),
            effect=effect,
            of_donor=np.array(donors).reshape(len(donors), len(kept)),
            n_cells=n_cells,
        )


def add_later(sums: LaterSums, cell: LaterCodes, feature: int, directions: Directions, *, donor: int) -> bool:
    """Add a cell to the sums of a feature; false if the feature fires on none of its gene tokens."""
    rows = cell.rows_of(feature)
    if not len(rows):
        return False
    change = -cell.codes[rows, feature] * directions.norm
    steps = change[None, :, None] * directions.all[:, None, :]  # direction, token, d_model
    parts = torch.split(torch.cat([torch.zeros_like(steps[:1]), steps]), cell.n_at_once)
    codes = torch.cat([cell.codes_after(cell.moved(rows, part)) for part in parts]).double().cpu().numpy()
    sums.add(codes[0], codes[1:], donor=donor)
    return True
