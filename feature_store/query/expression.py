"""Expression of genes in the panel's cells, as associations have stored it by gene: log1p of counts per 10,000."""

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.cells import ExpressionReader, read_panel
from feature_store.storage.commit import Run, is_intact

if TYPE_CHECKING:
    from feature_store.query.store import FeatureStore


class Expression:
    """The expression of every gene of a data set in the cells of its panel.

    Attributes:
        symbols: the name of each gene, by gene_idx.
        cell_idx: the cells of the panel, ascending [n_panel].
    """

    def __init__(self, store: "FeatureStore", dataset: str) -> None:
        layout = store.layout
        self.cell_idx: npt.NDArray[np.int64] = read_panel(layout.cells_dir(dataset))
        self._reader = ExpressionReader(Run.open(layout.expression_dir(dataset)), self.cell_idx)
        # a range of genes is stored together, and an export asks for one gene after the other
        self._range = lru_cache(maxsize=2)(self._read_range)
        self.symbols = store.frame("genes").sort("gene_idx").select("symbol").collect()["symbol"].to_list()

    def of(self, symbol: str) -> pl.DataFrame:
        """cell_idx and value of the cells of the panel in which a gene is expressed, by cell. KeyError if unknown.

        Of genes of the same name the first is read.
        """
        if symbol not in self.symbols:
            raise KeyError(symbol)
        place = self.symbols.index(symbol)
        start = max(bound for bound in self._reader.bounds if bound <= place)
        column = self._range(start)[:, [place - start]]
        column.sort_indices()
        return pl.DataFrame([pl.Series("cell_idx", self.cell_idx[column.indices]), pl.Series("value", column.data)])

    def matrix(self, rows: npt.NDArray[np.int64]) -> Any:
        """CSR float32 [n n_genes] of the cells at these places of the panel."""
        return self._reader.rows(rows)

    def _read_range(self, start: int) -> Any:
        """CSC of the range of genes that begins at `start`."""
        bounds = self._reader.bounds
        return self._reader.read(start, bounds[bounds.index(start) + 1])


def expression_of(store: "FeatureStore") -> Expression | None:
    """The expression of the data set of a store; None where it was not made, which `scsae associate` does."""
    dataset = store.lineage.dataset
    if dataset is None or "genes" not in store.tables() or not is_intact(store.layout.expression_dir(dataset)):
        return None
    return Expression(store, dataset)
