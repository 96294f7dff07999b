"""How features go together inside cells of one type and donor.

The square root of each code, which steadies its variance, less its mean over the cells of the same block (cell type and
donor), and less its regression on the depth of the cells, is what a feature does beyond type, donor and depth:

    e = s - mean of the block - slope * d,        d the log number of tokens less its mean of the block
    r_fg = sum_c e_cf e_cg / sqrt(sum_c e_cf^2 sum_c e_cg^2)

which is the partial correlation of two features given block and depth.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from feature_store.associations.inputs import Ints, Sparse

Matrix = npt.NDArray[np.float32]


def residuals(codes: Sparse, block: Ints, depth: npt.NDArray[Any]) -> Matrix:
    """What codes have beyond their block and depth, float32 [n_cells n_features].

    codes: sparse [n_cells n_features]; block: number of the block of each cell; depth: of each cell, e.g. its number of
    tokens.
    """
    values: Matrix = np.sqrt(codes.toarray(), dtype=np.float32)
    d = np.log1p(depth.astype(np.float64))
    for cells in _blocks(block):
        values[cells] -= values[cells].mean(axis=0)
        d[cells] -= d[cells].mean()
    if (total := float(d @ d)) > 0:
        slope = (d.astype(np.float32) @ values) / np.float32(total)
        values -= d.astype(np.float32)[:, None] * slope
    return values


def correlations(values: Matrix) -> Matrix:
    """The correlations [n_features n_features] of residuals [n_cells n_features], 0 where one does not vary.

    The diagonal is 0.
    """
    norm = np.sqrt(np.einsum("ij,ij->j", values, values, dtype=np.float64))
    scaled = (values / np.where(norm > 0, norm, 1)).astype(np.float32)
    found: Matrix = scaled.T @ scaled
    np.fill_diagonal(found, 0)
    return found


def shuffled_in_blocks(values: Matrix, block: Ints, rng: np.random.Generator) -> Matrix:
    """The values with those of each feature permuted among the cells of each block, independently of other features."""
    out = values.copy()
    for cells in _blocks(block):
        out[cells] = rng.permuted(values[cells], axis=0)
    return out


def _blocks(block: Ints) -> list[Ints]:
    order = np.argsort(block, kind="stable")
    edges = np.flatnonzero(np.diff(block[order])) + 1
    return np.split(order, edges)
