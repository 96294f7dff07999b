"""What the genes of a cell do to a feature: by the gradient, and by leaving each gene's token out of the cell.

    S(cell, f) = sum over the gene tokens t of the cell of z_f(t)        z_f: the code of feature f at the site

When the token of gene g is left out, all other tokens keep their values, and S falls by two paths:

    own(g)   = z_f at the token of g, which goes with the token
    other(g) = sum over the other tokens of z_f with g in the cell, less the same sum without g

Both add up to the change of S. A gene whose token carries the feature has the first; one that the feature reads from
other tokens has the second. Where a model repeats a gene (UCE), all its tokens are left out together. A token that is
left out shortens the cell: in Geneformer, whose positions are ranks, the
tokens behind it move up by one, as they would in a cell without the gene.

The gradient costs one pass back for a feature and says the same to first order: that of the sum of the
pre-activations over the tokens where the feature fires, at the embedding of each token, times what the embedding has
beyond the mean of the cell's gene tokens. That baseline leaves out what all tokens share, which no gene adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.nn import functional

from sae_core.effects.candidates import InputGenes
from sae_core.effects.cell_at_site import MAX_NUMBERS, check_one
from sae_core.errors import ConfigError
from sae_core.sae import SparseAutoencoder
from sae_core.scfm import CachedActivations, FoundationModel, Site, Tokens
from sae_core.steering.forward import check_width

_EMBEDDING = Site(kind="embedding")


class CellInputs:
    """One cell, the codes of some features at a site, and what the cell's genes do to these features.

    Usage: `CellInputs(model, tokens, sae, "layer.2", [3, 17]).totals_without(rows)`.

    Attributes:
        tokens: those of the cell.
        codes: codes of the features; 0 on special tokens [n_tokens n_features], on the model's device.
        total: S of each feature [n_features], in host memory.
    """

    def __init__(
        self, model: FoundationModel, tokens: Tokens, sae: SparseAutoencoder, site: Site | str, features: Sequence[int]
    ) -> None:
        """Run the model from the embeddings of the cell up to the site, and encode its tokens.

        Args:
            model: the model.
            tokens: the tokens of one cell.
            sae: the autoencoder of the site.
            site: where the features are.
            features: ids of the features, ascending.

        Raises:
            ConfigError: there is not one cell, no such site, no gradient passes through the model, or the autoencoder
                has another width than the model.
        """
        check_one(tokens)
        check_width(model, sae)
        device, n = next(model.parameters()).device, max(tokens.n_tokens, 1)
        self.tokens, self.site = tokens, Site.parse(site)
        self._model, self._sae, self._device = model, sae, device
        self._features = torch.tensor(features, dtype=torch.int64, device=device)
        self._is_gene = torch.from_numpy(~tokens.is_special).to(device)
        found = model.activations(tokens, [_EMBEDDING], max_batch_tokens=n)
        self._embedding = found[_EMBEDDING].to(device).requires_grad_()
        with torch.enable_grad():
            cached = CachedActivations(_EMBEDDING, self._embedding)
            x = model.continued(tokens, cached, self.site, max_batch_tokens=n).to(sae.W_enc.dtype)
            if tokens.n_tokens and not x.requires_grad:
                raise ConfigError(f"{model.name} passes no gradient from its embedding to {self.site}")
            weight, bias = sae.W_enc[self._features], sae.b_enc[self._features]
            self._pre = functional.linear(sae.normalise(x), weight, bias) * sae.scale
        self.codes: Float[Tensor, "token feature"] = self._of_features(x.detach(), self._is_gene)
        self.total: Float64[Tensor, " feature"] = self.codes.sum(0, dtype=torch.float64).cpu()

    def attributions(self) -> Float[Tensor, "feature token"]:
        """Gradient times input of every token, in units of the code, in host memory.

        It is <gradient of the sum of the pre-activations over the tokens where the feature fires, embedding less the
        mean embedding of the cell's gene tokens>.
        """
        embedding, fires = self._embedding.detach(), self.codes > 0
        centred = embedding - embedding[self._is_gene].mean(0)
        found = torch.zeros(len(self._features), len(embedding))
        for j in fires.any(0).nonzero()[:, 0].tolist():
            total = (self._pre[:, j] * fires[:, j]).sum()
            (gradient,) = torch.autograd.grad(total, self._embedding, retain_graph=True)
            found[j] = (gradient * centred).sum(1)
        return found

    @torch.no_grad()
    def totals_without(self, rows: Int64[np.ndarray, " left_out"]) -> Float64[Tensor, "left_out feature"]:
        """S of each feature in the cell without the gene of one of these tokens at a time, in host memory.

        The shorter cells go through the model as batches of at most MAX_NUMBERS activations.
        """
        at_once = max(1, MAX_NUMBERS // max((self.tokens.n_tokens - 1) * self._model.d_model, 1))
        found = [torch.zeros(0, len(self._features), dtype=torch.float64)]
        for start in range(0, len(rows), at_once):
            part = without_each(self.tokens, rows[start : start + at_once])
            x = self._model.activations(part, [self.site], max_batch_tokens=max(part.n_tokens, 1))[self.site]
            codes = self._of_features(x.to(self._device), torch.from_numpy(~part.is_special).to(self._device))
            sums = torch.zeros(part.n_cells, len(self._features), dtype=torch.float64)
            found.append(sums.index_add_(0, torch.from_numpy(part.cell_of_token()), codes.double().cpu()))
        return torch.cat(found)

    def _of_features(self, x: Tensor, is_gene: Tensor) -> Tensor:
        """The codes of the features [n_tokens n_features], 0 on special tokens."""
        return self._sae.encode(x).columns(self._features) * is_gene[:, None]


def without_each(tokens: Tokens, rows: Int64[np.ndarray, " left_out"]) -> Tokens:
    """Copies of one cell, each without the gene of one of these tokens; the others keep their order and their values.

    All tokens of the gene are left out, of which most models have one.
    """
    is_left = tokens.gene_id != tokens.gene_id[rows, None]
    kept = np.nonzero(is_left)[1]
    return Tokens(
        offsets=np.concatenate([[0], np.cumsum(is_left.sum(1))]).astype(np.int64),
        gene_id=tokens.gene_id[kept],
        value=tokens.value[kept],
        is_special=tokens.is_special[kept],
    )


@dataclass(frozen=True, kw_only=True)
class FeatureInputs:
    """What genes do to a feature: means over the cells in which the feature fires and the gene has a token.

    Those of a null gene are over the cells in which the gene has one too for which it was drawn.

    Attributes:
        gene_id: ascending, in the model's vocabulary [n_genes].
        of: the gene for which a null gene was drawn; a gene that is tested is its own [n_genes].
        n_cells: the number of cells of each gene [n_genes].
        n_donors: the number of their donors [n_genes].
        total: S in these cells [n_genes].
        own, other: the fall of S by each path, in units of the code [n_genes].
        gradient: the gene's attribution, in units of the code [n_genes].
        n_cells_fired: cells in which the feature fires on a gene token.
        sum_total: the sum of S over these.
    """

    gene_id: Int64[np.ndarray, " gene"]
    of: Int64[np.ndarray, " gene"]
    n_cells: Int64[np.ndarray, " gene"]
    n_donors: Int64[np.ndarray, " gene"]
    total: Float64[np.ndarray, " gene"]
    own: Float64[np.ndarray, " gene"]
    other: Float64[np.ndarray, " gene"]
    gradient: Float64[np.ndarray, " gene"]
    n_cells_fired: int
    sum_total: float


class InputSums:
    """Sums over cells of what some genes do to one feature.

    Attributes:
        genes: the genes.
    """

    def __init__(self, genes: InputGenes) -> None:
        n = len(genes.gene_id)
        self.genes = genes
        self._n = np.zeros(n, np.int64)
        self._sums = np.zeros((4, n))
        self._of_donor: dict[int, np.ndarray] = {}
        self._n_cells, self._total = 0, 0.0

    def places(self, gene_id: Int64[np.ndarray, " gene_token"]) -> Int64[np.ndarray, " place"]:
        """The places of those genes that are left out of a cell with these gene tokens."""
        return np.flatnonzero(np.isin(self.genes.gene_id, gene_id) & np.isin(self.genes.of, gene_id))

    def add(
        self,
        place: Int64[np.ndarray, " place"],
        *,
        total: float,
        own: Float64[np.ndarray, " place"],
        other: Float64[np.ndarray, " place"],
        gradient: Float64[np.ndarray, " place"],
        donor: int,
    ) -> None:
        """Add one cell, with the genes at some places."""
        self._sums[:, place] += np.stack([np.full(len(place), total), own, other, gradient])
        self._n[place] += 1
        self._of_donor.setdefault(donor, np.zeros(len(self._n), dtype=bool))[place] = True
        self._n_cells += 1
        self._total += total

    def mean(self) -> FeatureInputs:
        """The means over cells of the genes that were left out of any."""
        seen = self._n > 0
        total, own, other, gradient = self._sums[:, seen] / self._n[seen]
        donors = sum((of.astype(np.int64) for of in self._of_donor.values()), np.zeros(len(self._n), np.int64))
        return FeatureInputs(
            gene_id=self.genes.gene_id[seen],
            of=self.genes.of[seen],
            n_cells=self._n[seen],
            n_donors=donors[seen],
            total=total,
            own=own,
            other=other,
            gradient=gradient,
            n_cells_fired=self._n_cells,
            sum_total=self._total,
        )


def add_cell_inputs(sums: Sequence[InputSums], cell: CellInputs, *, donor: int) -> None:
    """Leave genes out of a cell, one at a time, and add what that does; `sums` are those of the cell's features.

    A gene that several features want left out is left out once. A feature that fires on no gene token of the cell
    adds nothing.
    """
    rows = np.flatnonzero(~cell.tokens.is_special)
    ids, first, place_of = np.unique(cell.tokens.gene_id[rows], return_index=True, return_inverse=True)
    places = {j: own.places(ids) for j, own in enumerate(sums) if cell.total[j] > 0}
    if not places:
        return
    wanted = np.unique(np.concatenate([sums[j].genes.gene_id[place] for j, place in places.items()]))
    chosen = np.searchsorted(ids, wanted)
    without = cell.totals_without(rows[first[chosen]]).numpy()
    # over the tokens of each gene, of which most models have one
    by_gene = np.zeros((2, len(ids), len(sums)))
    np.add.at(by_gene[0], place_of, cell.codes.double().cpu().numpy()[rows])
    np.add.at(by_gene[1], place_of, cell.attributions().double().numpy()[:, rows].T)
    codes, attribution = by_gene[:, chosen]
    for j, place in places.items():
        at = np.searchsorted(wanted, sums[j].genes.gene_id[place])
        total, own = float(cell.total[j]), codes[at, j]
        other = total - without[at, j] - own
        sums[j].add(place, total=total, own=own, other=other, gradient=attribution[at, j], donor=donor)
