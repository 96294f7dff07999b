"""The cell table of a source, written and read back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from feature_store.cells import read_cells, write_cells

if TYPE_CHECKING:
    import polars as pl

    from feature_store.cells import Source
    from feature_store.storage.layout import Layout


def written_cells(layout: Layout, source: Source, **options: Any) -> pl.DataFrame:
    """The cells that `write_cells` writes with these options."""
    return read_cells(layout.cells_dir(write_cells(layout, source, **options)))
