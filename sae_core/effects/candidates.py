"""The genes that are left out of the cells of a feature: candidates by their gradient, and null genes like them.

Candidates are the genes of largest mean |attribution| on `select` cells. The null of a candidate is other genes that
have a token in the same cells with a like value, each left out of just these cells: the cells of a gene differ from
others in their length and their type, and with them every gene's share of a feature. A null gene is one gene in all
cells. One that is drawn anew in each cell would be an easy null: its mean over cells would lose what makes ordinary
genes differ from each other, and every gene with some lasting effect, however small, would lie outside it. No gene is
drawn twice for a feature, so that what counts as many null genes is many.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle

import numpy as np
from jaxtyping import Float64, Int64

from sae_core.scfm import Tokens

NEAREST = 8
"""The number of like genes from which a null gene is drawn."""
MIN_NULL_GENES = 3
"""Null genes without which nothing is measured of a feature."""


class GeneMeans:
    """Means over cells by gene; memory is that of the model's vocabulary.

    Attributes:
        n: the number of cells of each gene [n_vocabulary].
    """

    def __init__(self, n_vocabulary: int) -> None:
        self.n = np.zeros(n_vocabulary, np.int64)
        self._sum = np.zeros(n_vocabulary)

    def add(self, gene_id: Int64[np.ndarray, " gene"], value: Float64[np.ndarray, " gene"]) -> None:
        """Add cells, in each of which a gene occurs once at most."""
        self.n += np.bincount(gene_id, minlength=len(self.n))
        self._sum += np.bincount(gene_id, value, minlength=len(self.n))

    @property
    def mean(self) -> Float64[np.ndarray, " vocabulary"]:
        """The mean of each gene; 0 where it had no cell."""
        found: Float64[np.ndarray, " vocabulary"] = self._sum / np.maximum(self.n, 1)
        return found


def sums_by_gene(
    gene_id: Int64[np.ndarray, " gene_token"], value: Float64[np.ndarray, " gene_token"]
) -> tuple[Int64[np.ndarray, " gene"], Float64[np.ndarray, " gene"]]:
    """The genes of one cell, ascending, and the sum of a value over the tokens of each (UCE repeats genes)."""
    genes, place = np.unique(gene_id, return_inverse=True)
    return genes, np.bincount(place, value, minlength=len(genes))


class CellGenes:
    """The genes of some cells, and their levels; memory is 16 bytes a token."""

    def __init__(self, n_vocabulary: int) -> None:
        self._n_vocabulary = n_vocabulary
        self._cells: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, tokens: Tokens) -> None:
        """Add one cell; a gene that is repeated counts once, with the level of its tokens."""
        genes, first = np.unique(tokens.gene_id[~tokens.is_special], return_index=True)
        self._cells.append((genes, levels(tokens)[first]))

    def beside(self, gene: int | None) -> GeneMeans:
        """The number of cells of each gene, and its mean level, among the cells that have `gene`; None: all cells."""
        means = GeneMeans(self._n_vocabulary)
        chosen = [cell for cell in self._cells if gene is None or (cell[0] == gene).any()]
        if chosen:
            gene_id, level = (np.concatenate(column) for column in zip(*chosen, strict=True))
            means.add(gene_id, level)
        return means


def levels(tokens: Tokens) -> Float64[np.ndarray, " gene_token"]:
    """The rank of each gene token's value within one cell, from 0 to 1; equal values share their mean rank.

    Ranks are comparable in every family, whatever the unit of its values is.
    """
    value = tokens.value[~tokens.is_special]
    _, place, count = np.unique(value, return_inverse=True, return_counts=True)
    found: Float64[np.ndarray, " gene_token"] = (np.cumsum(count) - count / 2)[place] / max(len(value), 1)
    return found


@dataclass(frozen=True, kw_only=True)
class InputGenes:
    """The genes that are left out of the cells of a feature, in the model's vocabulary.

    Attributes:
        gene_id: candidates and null genes, all of them different, ascending [n_genes].
        of: the candidate for which a null gene was drawn; a candidate itself is its own [n_genes].
    """

    gene_id: Int64[np.ndarray, " gene"]
    of: Int64[np.ndarray, " gene"]

    @property
    def n_candidates(self) -> int:
        """The number of genes that are tested."""
        return int((self.of == self.gene_id).sum())


def choose_genes(
    attribution: GeneMeans, cells: CellGenes, *, n_genes: int, n_nulls: int, min_cells: int, seed: tuple[int, int]
) -> InputGenes:
    """The candidates of a feature and their null genes; none where there are fewer than MIN_NULL_GENES of these.

    Args:
        attribution: of the genes of `select` cells in which the feature fires.
        cells: the cells in which genes are left out.
        n_genes: largest number of candidates; at most half of the genes are candidates.
        n_nulls: null genes for each of `n_genes`, as far as there are enough genes.
        min_cells: cells that a gene needs on either side, and a null gene needs beside its candidate.
        seed: of the draws; with the feature, so that those of two features differ.
    """
    known = np.flatnonzero((attribution.n >= min_cells) & (cells.beside(None).n >= min_cells))
    score = np.abs(attribution.mean[known])
    order = known[np.argsort(-score, kind="stable")]
    candidate = order[: min(n_genes, len(known) // 2, int((score > 0).sum()))]
    free = np.sort(order[len(candidate) :])
    null, of = _draw(candidate, free, cells, n_drawn=n_genes * n_nulls, min_cells=min_cells, seed=seed)
    if len(null) < MIN_NULL_GENES:
        return InputGenes(gene_id=np.zeros(0, np.int64), of=np.zeros(0, np.int64))
    gene_id, beside = np.concatenate([candidate, null]), np.concatenate([candidate, of])
    ascending = np.argsort(gene_id)
    return InputGenes(gene_id=gene_id[ascending], of=beside[ascending])


def _draw(
    candidate: Int64[np.ndarray, " candidate"],
    free: Int64[np.ndarray, " free"],
    cells: CellGenes,
    *,
    n_drawn: int,
    min_cells: int,
    seed: tuple[int, int],
) -> tuple[Int64[np.ndarray, " null"], Int64[np.ndarray, " null"]]:
    """Null genes and their candidates, drawn for one candidate after the other until there are enough, or no more."""
    rng = np.random.default_rng(seed)
    distance = np.full((len(candidate), len(free)), np.inf)
    for i, gene in enumerate(candidate.tolist()):
        means = cells.beside(gene)
        share, level = means.n[free] / means.n[gene], means.mean
        distance[i] = np.abs(level[free] - level[gene]) + 1 - share
        distance[i, means.n[free] < min_cells] = np.inf
    null, of, waiting = [], [], set(range(len(candidate)))
    for i in cycle(range(len(candidate))):
        like = np.argsort(distance[i], kind="stable")[:NEAREST]
        like = like[np.isfinite(distance[i, like])]
        if len(like):
            drawn = int(rng.choice(like))
            null.append(free[drawn])
            of.append(candidate[i])
            distance[:, drawn] = np.inf
        else:
            waiting.discard(i)
        if len(null) == n_drawn or not waiting:
            break
    return np.array(null, np.int64), np.array(of, np.int64)
