"""What all rows of a split share: its number of cells and donors, and in how many cells each gene is expressed."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from feature_store.associations.inputs import Bools, Floats
from feature_store.associations.ranges import MeasuredRun


class SplitFacts(NamedTuple):
    """n: number of cells; n_donors: number of replicate units, None where there are none; n_cells: the number of cells
    that express each gene [n_genes].
    """

    n: int
    n_donors: int | None
    n_cells: Floats

    @classmethod
    def of(cls, row: Mapping[str, object]) -> "SplitFacts":
        """From a row of the table `splits` of a range."""
        return cls(row["n"], row["n_donors"], np.array(row["n_cells"], dtype=np.float64))  # type: ignore[arg-type]

    @property
    def detected(self) -> Bools:
        """Genes that any cell expresses [n_genes]."""
        answer: Bools = self.n_cells > 0
        return answer


def read_split_facts(measured: MeasuredRun) -> dict[str, SplitFacts]:
    """The facts of each split, which are the same in all ranges."""
    return {row["split"]: SplitFacts.of(row) for row in measured.read("splits", 0).iter_rows(named=True)}


def split_columns(splits: Mapping[str, SplitFacts]) -> list[pl.Expr]:
    """Expressions for the columns n and n_donors, from the column split."""
    return [
        pl.col("split")
        .replace_strict(list(splits), [getattr(s, name) for s in splits.values()], return_dtype=pl.Int64)
        .alias(name)
        for name in ("n", "n_donors")
    ]


def with_split(split: str, **columns: Any) -> pl.DataFrame:
    """A table of these columns behind the column split, which has one value."""
    frame = pl.DataFrame(columns)
    return frame.insert_column(0, pl.repeat(split, frame.height, eager=True).alias("split"))
