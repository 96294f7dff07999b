"""The labels, types, donors and splits of cells, as arrays in one order."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.cells import canonical_text

Texts = npt.NDArray[np.object_]


@dataclass(frozen=True, kw_only=True)
class CellLabels:
    """The labels of some cells, as strings [n_cells] each; a null is "".

    Attributes:
        label: the label of the kind that is steered.
        cell_type: the type, inside which labels are compared; "" if it is the kind that is steered.
        donor, split: the donor and the split.
    """

    label: Texts
    cell_type: Texts
    donor: Texts
    split: Texts

    @classmethod
    def of(cls, cells: pl.DataFrame, kind: str) -> "CellLabels":
        """The labels in rows of the cell table, in their order."""
        columns = {"label": kind, "cell_type": "cell_type", "donor": "donor", "split": "split"}
        found = {
            name: np.array(canonical_text(cells[column]).fill_null("").to_list(), dtype=object)
            for name, column in columns.items()
        }
        if kind == "cell_type":
            found["cell_type"] = np.full(cells.height, "", dtype=object)
        return cls(**found)

    def at(self, index: npt.NDArray[np.generic]) -> "CellLabels":
        """The labels of the cells at these positions."""
        return CellLabels(
            label=self.label[index], cell_type=self.cell_type[index], donor=self.donor[index], split=self.split[index]
        )
