"""`GroupMeans`: a table with one mean vector (or one difference of means) for each group of cells and gene.

The mean code of a feature differs more between the tokens of two genes than between two conditions. A move toward
another group's mean is therefore made gene by gene, so that it follows the difference between the groups and not the
difference between their genes. A table of 8 cell types x 3,000 genes x 50 features takes 5 MB, and a token finds its
row by one binary search. A token without a row is not changed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sae_core.errors import ConfigError
from sae_core.scfm.sites import TokenInfo


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupMeans:
    """Vectors by (group, gene_id), or by group alone; the rows ascend by these keys, and each key occurs once.

    Raises:
        ConfigError: there is no row, the columns differ in length, the keys are negative, unsorted or repeated, or a
            value is not finite.
    """

    group: Int64[Tensor, " row"]
    """Numbers of the groups, from 0; the caller decides what a group is."""
    gene_id: Int64[Tensor, " row"] | None = None
    """Vocabulary ids of the genes; None: a row holds for all genes of its group."""
    values: Float[Tensor, "row column"]
    """One column for each chosen feature in ascending order (`Toward`, `Shift`), or for each dimension of the
    activations (`Displace`)."""

    def __post_init__(self) -> None:
        lengths = [len(self.group), len(self.values), *([] if self.gene_id is None else [len(self.gene_id)])]
        if not lengths[0] or len(set(lengths)) > 1:
            raise ConfigError(
                f"the group means have {lengths} rows of group, values and gene_id; allowed are equal numbers >= 1."
            )
        ids = self.group if self.gene_id is None else torch.stack([self.group, self.gene_id])
        if bool((ids < 0).any()):
            raise ConfigError(
                "the group means have a negative group or gene_id: leave out the rows that belong to no group or gene."
            )
        if bool((self._key(self.group, self.gene_id).diff() <= 0).any()):
            raise ConfigError(
                "the rows of the group means must ascend by (group, gene_id), each pair once: sort them, and average "
                "those that share a pair."
            )
        if not bool(self.values.isfinite().all()):
            raise ConfigError("the group means hold values that are not finite: leave out the rows that have no mean.")

    def lookup(
        self, group_of_cell: Int64[Tensor, " cell"], info: TokenInfo
    ) -> tuple[Float[Tensor, "token column"], Bool[Tensor, " token"]]:
        """The row of each token, and whether the token has one; a token without a row gets zeros.

        Raises:
            ConfigError: `group_of_cell` has fewer entries than there are cells.
        """
        if info.cell.numel() and int(info.cell.max()) >= len(group_of_cell):
            raise ConfigError(
                f"group_of_cell has {len(group_of_cell)} entries, and there are tokens of cell {int(info.cell.max())}: "
                "give the group of every cell in the model's input."
            )
        device = info.cell.device
        group = group_of_cell.to(device)[info.cell]
        gene = None if self.gene_id is None else info.gene_id.long()
        keys, wanted = self._key(self.group, self.gene_id).to(device), self._key(group, gene)
        row = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
        has_row = keys[row] == wanted
        if gene is not None:
            has_row &= gene < self._n_genes
        return self.values.to(device)[row].where(has_row[:, None], 0.0), has_row

    @property
    def _n_genes(self) -> int:
        return 1 if self.gene_id is None else int(self.gene_id.max()) + 1

    def _key(self, group: Tensor, gene_id: Tensor | None) -> Tensor:
        return group if gene_id is None else group * self._n_genes + gene_id
