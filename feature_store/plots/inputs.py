"""The inputs of the plots, read through the public queries of a store alone."""

import re
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.errors import InputError
from feature_store.query.suggestions import did_you_mean
from feature_store.storage.obs_columns import columns_of_cells, find_column, shown_name
from feature_store.storage.schemas import SPLITS

if TYPE_CHECKING:
    from feature_store.query.store import FeatureStore

N_GENES = 3
"""Number of genes that are shown after the id of a feature."""


def columns_named(store: "FeatureStore", *names: str) -> list[str]:
    """The columns of the cell table that names mean, which are those of obs. Raises InputError for an unknown one."""
    known = columns_of_cells(store.frame("cells"))
    found = [find_column(name, known) for name in names]
    for name, column in zip(names, found, strict=True):
        if column is None:
            shown = [shown_name(one) for one in known]
            raise InputError(
                f"the cells have no column {name!r}{did_you_mean(name, shown)}; they have {', '.join(shown)}"
            )
    return [column for column in found if column is not None]


def read_cells(store: "FeatureStore", *columns: str) -> pl.DataFrame:
    """Rows cell_idx, split and the given columns of the panel's cells with tokens, sorted by cell_idx."""
    wanted = dict.fromkeys(("cell_idx", "split", *columns))
    return store.panel_cells().select(*wanted).sort("cell_idx").collect()


def cells_of(store: "FeatureStore", split: str | None, *columns: str) -> pl.DataFrame:
    """The rows of `read_cells` of one split, or of all cells (None). Raises InputError for a split without cells."""
    check_split(split)
    cells = read_cells(store, *columns)
    chosen = cells if split is None else cells.filter(pl.col("split") == split)
    if chosen.is_empty():
        raise InputError(f"no cell of the data set is in the split {split!r}; give another split")
    return chosen


def check_split(split: str | None) -> None:
    """Raise InputError for a name that is no split."""
    if split is not None and split not in SPLITS:
        raise InputError(f"no split {split!r}{did_you_mean(split, SPLITS)}; splits are {', '.join(SPLITS)}")


def code_of(store: "FeatureStore", feature: int, cells: pl.DataFrame) -> npt.NDArray[np.float64]:
    """The code of a feature in each of `cells`, 0 where it does not fire. Raises QueryError for an unknown feature."""
    fires = store.codes_of(feature).with_columns(pl.col("value").cast(pl.Float64))
    found = cells.select("cell_idx").join(fires, on="cell_idx", how="left", maintain_order="left")
    return found["value"].fill_null(0.0).to_numpy()


def name_of(store: "FeatureStore", feature: int) -> str:
    """A feature's id with the first of its genes, "17: CD79A MS4A1 BANK1", or "17 (no gene)"; the id alone where genes
    were not tested.
    """
    if "features" not in store.tables():
        return str(feature)
    found = store.frame("features").filter(pl.col("feature_id") == feature).select("top_genes").collect()["top_genes"]
    genes = re.split(r"[,\s]+", found[0] or "") if len(found) else []
    named = " ".join(gene for gene in genes[:N_GENES] if gene)
    if not len(found):
        return str(feature)
    return f"{feature}: {named}" if named else f"{feature} (no gene)"


def said(store: "FeatureStore", split: str | None) -> str:
    """The cells of a split in words, for titles, with the panel where it is not all cells."""
    return f"{'all' if split is None else split} cells{of_panel(store)}"


def of_panel(store: "FeatureStore") -> str:
    """The panel for the end of a title, ", panel of 12 of 40 cells"; nothing where the panel is all cells."""
    return "" if store.panel.of_all_cells else f", {store.panel.words}"
