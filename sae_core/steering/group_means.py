"""`GroupMeans`: what is usual in a group of cells, as a table of one vector for each group and gene (or group alone).

The mean code of a feature differs between the tokens of two genes more than between two conditions, so a move toward
another group's mean has to be made gene by gene: the difference between the groups, and not between their genes. A
table by group and gene of 8 cell types x 3,000 genes x 50 features takes 5 MB; a token finds its row by one binary
search. What has no row has no reference, and is left as it is.
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
    """Values by (group, gene), or by group alone; rows ascend by them, each once.

    `ConfigError` if there is no row, the columns differ in length, rows are unsorted or double, or a value is not
    finite.
    """

    group: Int64[Tensor, " row"]
    """Groups, from 0 on; what they are is the caller's."""
    gene_id: Int64[Tensor, " row"] | None = None
    """Vocabulary ids; None: a row holds for all genes of its group."""
    values: Float[Tensor, "row column"]
    """A column for each chosen feature in ascending order (`Toward`, `Shift`), or for each dimension (`Displace`)."""

    def __post_init__(self) -> None:
        lengths = [len(self.group), len(self.values), *([] if self.gene_id is None else [len(self.gene_id)])]
        if not lengths[0] or len(set(lengths)) > 1:
            raise ConfigError(
                f"the group means have {lengths} rows of group, values and gene_id: give one or more, alike."
            )
        ids = self.group if self.gene_id is None else torch.stack([self.group, self.gene_id])
        if bool((ids < 0).any()):
            raise ConfigError(
                "the group means have a negative group or gene_id: leave out the rows that belong to none."
            )
        if bool((self._key(self.group, self.gene_id).diff() <= 0).any()):
            raise ConfigError(
                "the rows of the group means must ascend by (group, gene_id), each pair once: sort them, and average "
                "those that share a pair."
            )
        if not bool(self.values.isfinite().all()):
            raise ConfigError("the group means hold values that are not finite: leave out the rows without a mean.")

    def lookup(
        self, group_of_cell: Int64[Tensor, " cell"], info: TokenInfo
    ) -> tuple[Float[Tensor, "token column"], Bool[Tensor, " token"]]:
        """Row of each token, and whether it has one; a token without one gets zeros.

        `ConfigError` if the groups are those of fewer cells than the tokens belong to.
        """
        if info.cell.numel() and int(info.cell.max()) >= len(group_of_cell):
            raise ConfigError(
                f"group_of_cell has {len(group_of_cell)} entries and the tokens belong to cells up to "
                f"{int(info.cell.max())}: give the group of every cell that the model was given."
            )
        device = info.cell.device
        group = group_of_cell.to(device)[info.cell]
        gene = None if self.gene_id is None else info.gene_id.long()
        keys, wanted = self._key(self.group, self.gene_id).to(device), self._key(group, gene)
        row = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
        known = keys[row] == wanted
        if gene is not None:
            known &= gene < self._n_genes
        return self.values.to(device)[row].where(known[:, None], 0.0), known

    @property
    def _n_genes(self) -> int:
        return 1 if self.gene_id is None else int(self.gene_id.max()) + 1

    def _key(self, group: Tensor, gene_id: Tensor | None, n_genes: int | None = None) -> Tensor:
        return group if gene_id is None else group * (n_genes or self._n_genes) + gene_id
