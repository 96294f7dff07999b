"""Labels, replicate units and strata as plain arrays, which are checked once.

A label that is unknown for some cells stays unknown (`known` is False there): these cells are left out of the tests of
that label, and of no other. All statistics are sparse products of these arrays, so nothing here copies the codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy import sparse

from feature_store.cells import canonical_text
from feature_store.errors import InputError

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]
# scipy's stubs make shape and scalar type parameters of every sparse class; `as_csr` checks at run time instead
Sparse: TypeAlias = Any


@dataclass(frozen=True, kw_only=True)
class Labels:
    """One column of labels: `codes[i]` indexes `names` where `known[i]`."""

    kind: str
    codes: Ints
    names: tuple[str, ...]
    known: Bools

    def __post_init__(self) -> None:
        if self.codes.shape != self.known.shape or self.codes.ndim != 1:
            raise InputError(
                f"labels {self.kind!r}: codes {self.codes.shape}, known {self.known.shape}; expected a value per cell"
            )
        used = self.codes[self.known]
        if used.size and (used.min() < 0 or used.max() >= len(self.names)):
            raise InputError(
                f"labels {self.kind!r}: codes span {used.min()}..{used.max()}, allowed are 0..{len(self.names) - 1}"
            )

    @classmethod
    def from_values(cls, kind: str, values: pl.Series | Sequence[Any] | npt.NDArray[Any]) -> "Labels":
        """Labels from one value per cell, by their canonical text, by which names are sorted; a missing value means
        unknown.
        """
        text = canonical_text(values)
        names = text.drop_nulls().unique().sort()
        codes = text.cast(pl.Enum(names)).to_physical().fill_null(0).to_numpy().astype(np.int64)
        return cls(kind=kind, codes=codes, names=tuple(names), known=text.is_not_null().to_numpy())

    @property
    def n_cells(self) -> int:
        """Number of cells, with a known label or without."""
        return int(self.codes.shape[0])

    def take(self, cells: Bools) -> "Labels":
        """The same labels for the cells of a mask [n_cells]; the names are kept."""
        return Labels(kind=self.kind, codes=self.codes[cells], names=self.names, known=self.known[cells])

    def one_hot(self) -> Sparse:
        """CSR float64 [n_cells n_labels]; the row of an unknown cell is empty."""
        rows = np.flatnonzero(self.known)
        shape = (self.n_cells, len(self.names))
        return sparse.csr_array((np.ones(rows.size), (rows, self.codes[rows])), shape=shape)


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """A number of each cell: `values` float64 [n_cells], of which those that are not `known` mean nothing."""

    name: str
    values: Floats
    known: Bools

    def __post_init__(self) -> None:
        if self.values.shape != self.known.shape or self.values.ndim != 1:
            raise InputError(
                f"numbers {self.name!r}: values {self.values.shape}, known {self.known.shape}; expected one a cell"
            )

    @classmethod
    def from_values(cls, name: str, values: Sequence[float] | npt.NDArray[Any]) -> "Numbers":
        """Numbers from one value per cell; NaN means unknown."""
        floats = np.asarray(values, dtype=np.float64)
        known = ~np.isnan(floats)
        return cls(name=name, values=np.where(known, floats, 0.0), known=known)

    @property
    def n_cells(self) -> int:
        """Number of cells, with a known number or without."""
        return int(self.values.shape[0])


@dataclass(frozen=True, kw_only=True)
class Strata:
    """Blocks of cells inside which labels are exchangeable under the null: `codes[i]` in 0..n_strata-1 for every
    cell.
    """

    codes: Ints
    n_strata: int

    @classmethod
    def single(cls, n_cells: int) -> "Strata":
        """All cells in one block."""
        return cls(codes=np.zeros(n_cells, dtype=np.int64), n_strata=1)

    @classmethod
    def of(cls, n_cells: int, *columns: Labels | None) -> "Strata":
        """The cross of the columns given (None is left out); an unknown value is a level of its own."""
        codes = np.zeros(n_cells, dtype=np.int64)
        for column in columns:
            if column is not None:
                codes = codes * (len(column.names) + 1) + np.where(column.known, column.codes, len(column.names))
        levels, codes = np.unique(codes, return_inverse=True)
        return cls(codes=codes.astype(np.int64), n_strata=max(int(levels.size), 1))

    def sizes(self) -> Floats:
        """Cells per stratum [n_strata]."""
        return np.bincount(self.codes, minlength=self.n_strata).astype(np.float64)

    def indicator(self) -> Sparse:
        """CSR float64 [n_strata n_cells], to sum rows by stratum as a product."""
        n = self.codes.size
        return sparse.csr_array((np.ones(n), (self.codes, np.arange(n))), shape=(self.n_strata, n))


def as_csr(matrix: Sparse, name: str) -> Sparse:
    """The matrix, sparse or dense, as a CSR array without stored zeros. Raises InputError for NaN and infinity."""
    out = sparse.csr_array(matrix)
    if not np.isfinite(out.data).all():
        bad = int((~np.isfinite(out.data)).sum())
        raise InputError(f"{name}: {bad} values are NaN or infinite; all values must be finite")
    if (out.data == 0).any():
        out = out.copy()
        out.eliminate_zeros()
    return out
