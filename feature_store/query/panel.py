"""How many cells of a data set have all their codes, and how figures say that they are of those cells alone."""

from dataclasses import dataclass

from feature_store.storage.plans import PanelPlan


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The panel of a data set (`feature_store.cells.panel`), of which most figures are where it is not all cells.

    Attributes:
        n_panel: cells of the panel.
        n_cells: cells of the data set.
        keep: largest codes that are kept of a cell outside the panel; None if the store has no codes.
        drawn: how the panel was drawn; None where it is all cells.
    """

    n_panel: int
    n_cells: int
    keep: int | None
    drawn: PanelPlan | None

    @property
    def of_all_cells(self) -> bool:
        """Whether the panel is all cells, so that no figure needs to name it."""
        return self.n_panel == self.n_cells

    @property
    def words(self) -> str:
        """The panel in words, for titles, such as "panel of 12 of 40 cells"."""
        return f"panel of {self.n_panel:,} of {self.n_cells:,} cells"
