"""What the statistics of a range of features read: the cells, genes and gene sets that all ranges share, and the codes
and tokens of the range.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from feature_store.associations.gene_correlation import CellBlocks
from feature_store.associations.gene_sets import GeneSets
from feature_store.associations.inputs import Bools, Labels, Numbers
from feature_store.associations.sorted_columns import Codes
from feature_store.associations.token_statistics import TokenStatistics
from feature_store.errors import InputError
from feature_store.storage import schemas

REPORTED = ("select", "test")


@dataclass(frozen=True, kw_only=True)
class CellInputs:
    """What every range of features shares: the cells with their labels, the genes and the gene sets.

    split [n_cells] of train / select / test, None for a cell without tokens, which is in no statistic; labels of any
    kinds, where "batch" is tested within "cell_type"; numbers of the cells; units: the replicate unit (donor, else
    batch); genes: the names of the columns of the expression.
    """

    split: Sequence[str | None]
    genes: Sequence[str]
    labels: Sequence[Labels] = ()
    numbers: Sequence[Numbers] = ()
    units: Labels | None = None
    gene_sets: Sequence[GeneSets] = ()

    def __post_init__(self) -> None:
        splits = set(self.split) - {None}
        if splits - set(schemas.SPLITS) or "select" not in splits:
            raise InputError(
                f"the cells with tokens have the splits {sorted(map(str, splits))}; allowed are {schemas.SPLITS}, and "
                "some must be `select` cells, because thresholds and genes are chosen on them; `scsae extract` makes "
                "the splits"
            )
        for labels in (*self.labels, *([self.units] if self.units else [])):
            if labels.n_cells != self.n_cells:
                raise InputError(
                    f"labels {labels.kind!r} are given for {labels.n_cells} cells; the codes have {self.n_cells}"
                )
        for number in self.numbers:
            if number.n_cells != self.n_cells:
                raise InputError(
                    f"numbers {number.name!r} are given for {number.n_cells} cells; the codes have {self.n_cells}"
                )

    @property
    def n_cells(self) -> int:
        """Number of cells of all splits."""
        return len(self.split)

    def label(self, kind: str) -> Labels | None:
        """The labels of a kind, None where there are none."""
        return next((labels for labels in self.labels if labels.kind == kind), None)

    def masks(self) -> dict[str, Bools]:
        """The mask of the cells [n_cells] of each reported split that has any."""
        split = np.asarray(self.split, dtype=object)
        return {name: mask for name in REPORTED if (mask := split == name).any()}

    def blocks(self) -> dict[str, CellBlocks]:
        """The cells of each reported split with their blocks, for the correlations with expression."""
        return {name: CellBlocks.of(mask, self.units, self.label("cell_type")) for name, mask in self.masks().items()}


@dataclass(frozen=True, kw_only=True)
class FeatureRange:
    """The features [first, first + n): codes CSR [n_cells n], or sorted; token counts by split [n n_genes]; and
    top-activating tokens with the columns of `feature_token`.
    """

    first: int
    codes: Codes
    tokens: Mapping[str, TokenStatistics] = field(default_factory=dict)
    top_tokens: pl.DataFrame | None = None
