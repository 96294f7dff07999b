"""Maps that need no compiler: UMAP compiles for ten seconds in each process that draws one."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np


class PrincipalAxes:
    """Takes the place of `umap.UMAP`: the coordinates of the points on their first two principal axes."""

    def __init__(self, *, precomputed_knn: tuple[np.ndarray, np.ndarray, None], **_options: Any) -> None:
        self._index, self._distance, _ = precomputed_knn

    def fit_transform(self, points: np.ndarray) -> np.ndarray:
        assert self._index.shape == self._distance.shape
        assert len(self._index) == len(points)
        left, lengths, _ = np.linalg.svd(points - points.mean(axis=0), full_matrices=False)
        return (left * lengths)[:, :2]


def quick_umap() -> ModuleType:
    """A module that takes the place of `umap`."""
    module = ModuleType("umap")
    module.UMAP = PrincipalAxes  # type: ignore[attr-defined]
    return module
