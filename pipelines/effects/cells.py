"""The cells in which a feature is measured."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from feature_store.cells import read_panel_cells
from feature_store.codes import CodesRun, load_feature_codes
from pipelines.steering.context import Cells, SteeringContext

if TYPE_CHECKING:
    from sae_core.scfm import Tokens

MIN_CELLS = 5
"""Least number of cells of a mean; of fewer, it says nothing."""
SPLIT = "test"


class FeatureCells:
    """Draws cells of the panel in which a feature fires, from (seed, feature), evenly from the donors.

    Usage: `FeatureCells(codes, layout.cells_dir(dataset), n_cells=64, seed=0).of(17)`.
    """

    def __init__(self, codes: Path, cells_dir: Path, *, n_cells: int, seed: int, split: str = SPLIT) -> None:
        """Read the panel.

        Args:
            codes: the folder of the codes.
            cells_dir: the folder of the data set.
            n_cells: largest number of cells of a feature.
            seed: of the draw.
            split: the split that the cells are of.
        """
        self._codes, self._n_cells, self._seed = CodesRun.open(codes), n_cells, seed
        cells = read_panel_cells(cells_dir)
        self._panel = cells["cell_idx"].to_numpy()
        self._is_in_split = (cells["split"] == split).to_numpy()
        # without donors every cell counts as of one
        self._donor = cells["donor"].fill_null("").rank("dense").to_numpy().astype(np.int64) - 1

    def of(self, feature: int) -> Cells:
        """The ascending cell_idx of the cells of a feature."""
        codes = load_feature_codes(self._codes, self._panel, feature, feature + 1)
        fires = np.flatnonzero((np.diff(codes.indptr) > 0) & self._is_in_split)
        order = np.random.default_rng([self._seed, feature]).permutation(fires)
        donor = self._donor[order]
        turn = np.empty(len(order), np.int64)
        for one in np.unique(donor):
            turn[donor == one] = np.arange((donor == one).sum())
        return np.sort(self._panel[order[np.argsort(turn, kind="stable")][: self._n_cells]])

    def each(self, context: SteeringContext, features: Sequence[int]) -> "Iterator[tuple[Tokens, int, list[int]]]":
        """Every cell of some features once: its tokens, its cell_idx, and the places of the features that have it."""
        cells = [self.of(feature) for feature in features]
        chosen = [set(own.tolist()) for own in cells]
        for block in context.blocks(np.unique(np.concatenate(cells))):
            for i, cell_idx in enumerate(block.cells.tolist()):
                places = [j for j in range(len(features)) if cell_idx in chosen[j]]
                yield block.tokens.cells(i, i + 1), cell_idx, places

    def donor(self, cell_idx: int) -> int:
        """The number of the donor of a cell."""
        return int(self._donor[np.searchsorted(self._panel, cell_idx)])
