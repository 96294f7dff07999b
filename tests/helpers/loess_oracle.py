"""Loess of degree 2 written out: a weighted parabola through the nearest points of each point, no curve between."""

from __future__ import annotations

import sys
import types
import warnings
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import anndata
    import pandas as pd
    import pytest


def direct(x: np.ndarray, y: np.ndarray, *, span: float, at: np.ndarray | None = None) -> np.ndarray:
    """The parabola of each point of `at` (default x) through the `span` of the points that are nearest to it."""
    n = int(len(x) * span + 1e-5)
    found = []
    for point in x if at is None else at:
        distance = np.abs(x - point)
        width = np.sort(distance)[n - 1]
        weight = np.clip(1 - (distance / width) ** 3, 0, None) ** 1.5 if width > 0 else (distance == 0).astype(float)
        fitted = np.polynomial.polynomial.polyfit(x - point, y, 2 if width > 0 else 0, w=weight)
        found.append(fitted[0])
    return np.array(found)


def give_scanpy_direct_loess(patch: pytest.MonkeyPatch) -> None:
    """Put the written out loess in the place of scikit-misc, which scanpy calls."""

    class Loess:
        def __init__(self, x: np.ndarray, y: np.ndarray, *, span: float, degree: int) -> None:
            assert degree == 2
            self.outputs = types.SimpleNamespace(fitted_values=direct(x, y, span=span))

        def fit(self) -> None:
            pass

    inner = types.ModuleType("skmisc.loess")
    inner.loess = Loess  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "skmisc", types.ModuleType("skmisc"))
    patch.setitem(sys.modules, "skmisc.loess", inner)


def seurat_v3(cells: anndata.AnnData, n: int, *, batch_key: str | None) -> pd.DataFrame:
    """What scanpy says of each gene of these cells, without its compiled loops over sparse matrices."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import scanpy as sc

        dense = cells.copy()
        dense.X = dense.X.toarray()
        return sc.pp.highly_variable_genes(dense, flavor="seurat_v3", n_top_genes=n, batch_key=batch_key, inplace=False)
