"""The mean of the stored activations of each cell: the cell's vector in the model, at the site of the SAE."""

import numpy as np
import numpy.typing as npt
from scipy import sparse

from feature_store.activations.parquet import ActivationReader


def cell_means(reader: ActivationReader, cells: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """The mean over the stored tokens of each cell (cell_idx, in any order) [n_cells d_model]; NaN without any.

    Where one vector a cell is stored, it is that vector. Parts without any of the cells are not read; of the others all
    activations are, .3 GB of f16 a CPU second, a row group at a time. Sums are of float64.
    """
    wanted, place = np.unique(cells, return_inverse=True)
    sums = np.zeros((len(wanted), reader.d_model))
    n_tokens = np.zeros(len(wanted), np.int64)
    shards = reader.run.manifest().shards
    for group in reader.row_groups:
        low, high = np.searchsorted(wanted, [shards[group.shard].start, shards[group.shard].stop])
        if low == high:
            continue
        block = reader.read(group.shard, group.group)
        row = np.searchsorted(wanted, block.cell_idx)
        is_wanted = wanted[np.minimum(row, len(wanted) - 1)] == block.cell_idx
        rows, position = np.unique(row[is_wanted], return_inverse=True)
        tokens = np.flatnonzero(is_wanted)
        shape = (len(rows), len(block.cell_idx))
        member = sparse.csr_array((np.ones(len(tokens)), (position, tokens)), shape=shape)
        sums[rows] += member @ block.act_f32().astype(np.float64)
        n_tokens[rows] += np.bincount(position, minlength=len(rows))
    with np.errstate(invalid="ignore"):
        means = (sums / n_tokens[:, None]).astype(np.float32)
    return means[place]
