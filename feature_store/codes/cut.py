"""The cells of each shard of a codes run (`plans.CodesCut`).

`panel` is in every function the ascending cell_idx of the panel's cells.
"""

import numpy as np
import numpy.typing as npt

from feature_store.storage.plans import CodesCut

OTHER_CELLS = 25_000
"""Cells in the range of a shard outside the panel: its statistics take a few hundred bytes a cell at 8,192 features."""
Cells = npt.NDArray[np.int64]


def cells_of_shard(cut: CodesCut, shard: int, panel: Cells) -> Cells:
    """The cell_idx of a shard, ascending."""
    if shard < cut.n_panel_shards:
        return panel[shard * cut.panel_cells : (shard + 1) * cut.panel_cells]
    start, stop = span_of_shard(cut, shard, panel)
    inside = panel[slice(*np.searchsorted(panel, [start, stop]))]
    return np.delete(np.arange(start, stop, dtype=np.int64), inside - start)


def span_of_shard(cut: CodesCut, shard: int, panel: Cells) -> tuple[int, int]:
    """The range [start, stop) of cell_idx in which a shard's cells lie.

    The ranges of the panel's shards cover all cells without overlap, and so do those of the other shards.
    """
    if shard >= cut.n_panel_shards:
        start = (shard - cut.n_panel_shards) * cut.other_cells
        return start, min(start + cut.other_cells, cut.n_cells)
    first, after = shard * cut.panel_cells, (shard + 1) * cut.panel_cells
    return (int(panel[first]) if first else 0), (int(panel[after]) if after < cut.n_panel else cut.n_cells)
