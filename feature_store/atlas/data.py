"""The tables of a store that several pages of the atlas need; each is read once and kept."""

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.associations.held_out_units import UNITS
from feature_store.query.panel import Panel
from feature_store.query.store import FeatureStore
from feature_store.storage.schemas import SPLITS

BLOCK = 256
"""Number of features whose rows are read together: a page needs one feature, an export all of them in order."""
CELLS_COUNTED = 4_000_000
"""Cells that are counted at once."""
MOST_DESCRIBED = 20_000
"""Cells whose ids and labels are kept at most, because the same cells are the strongest of many features."""
MOST_CATEGORIES = 1000
"""A text column of the cell table with more values than this is not offered as a label to colour cells by."""
PLACES: Mapping[str, tuple[str, str]] = {"feature_umap": ("x", "y"), "profile_umap": ("px", "py")}
"""For each table that holds a map of the features, the names of its x and y in `AtlasData.features`."""
_OWN = ("cell_idx", "cell_id", "dataset", "split")
T = TypeVar("T")
Shape = Callable[["AtlasData", pl.DataFrame], pl.DataFrame]
"""Rows of a table made into others that keep their feature_id, for a block of features at once."""


class Block(NamedTuple):
    """The rows of BLOCK neighbouring features, by feature, and the first row of each of them and the end."""

    rows: pl.DataFrame
    starts: npt.NDArray[np.int64]


class NoSuchResource(LookupError):
    """The store holds no resource of the name in a path."""


def path_number(text: str, n: int) -> int:
    """The number in a path, from 0 to n - 1. Raises NoSuchResource for any other text."""
    if not text.isascii() or not text.isdigit() or int(text) >= n:
        raise NoSuchResource(text)
    return int(text)


class AtlasData:
    """A store, and the tables of it that were read so far. It must not be used by several threads at once."""

    def __init__(self, store: FeatureStore) -> None:
        self.store = store
        self._block = lru_cache(maxsize=24)(self._read_block)
        self._cached: dict[Callable[[AtlasData], Any], Any] = {}
        self._described: dict[int, dict[str, Any]] = {}

    def cached(self, make: Callable[["AtlasData"], T]) -> T:
        """The result of `make(self)`, which is computed at the first call and kept."""
        if make not in self._cached:
            self._cached[make] = make(self)
        found: T = self._cached[make]
        return found

    def has(self, table: str) -> bool:
        """Whether the store has a table."""
        return table in self.store.tables()

    def missing(self, table: str) -> dict[str, Any]:
        """The content of a resource whose table is missing: the name of the table, and the command that makes it."""
        return {"missing": {"table": table, "command": self.store.made_by(table)}}

    @cached_property
    def features(self) -> pl.DataFrame:
        """The table `features`, a row a feature, with the coordinates on both maps of the features (`PLACES`), null
        where there is no map.
        """
        found = self.store.frame("features").sort("feature_id").collect()
        for table, names in PLACES.items():
            if self.has(table):
                points = self.store.frame(table).select("feature_id", **dict(zip(names, ("x", "y"), strict=True)))
                found = found.join(points.collect(), on="feature_id", how="left", maintain_order="left")
            else:
                found = found.with_columns(pl.lit(None, pl.Float32).alias(name) for name in names)
        return found

    @cached_property
    def row_of(self) -> dict[int, int]:
        """The row of each feature in `features`."""
        return {feature: row for row, feature in enumerate(self.features["feature_id"].to_list())}

    @cached_property
    def labels(self) -> pl.DataFrame:
        """label_kind and label of each label that features were tested for. The id of a label is its row."""
        if not self.has("feature_label"):
            return pl.DataFrame(schema={"label_kind": pl.String, "label": pl.String})
        kinds = self.store.frame("feature_label").select("label_kind", "label").unique()
        return kinds.sort("label_kind", "label").collect()

    @cached_property
    def cells(self) -> pl.DataFrame:
        """The cells on the map, a row a cell, by cell_idx: cell_idx, x, y, split and the label columns as categories.
        There are no rows where there is no map.
        """
        if not self.has("umap"):
            return pl.DataFrame(schema={"cell_idx": pl.Int64, "x": pl.Float32, "y": pl.Float32})
        columns = ["cell_idx", "split", *self.label_columns]
        cells = self.store.frame("cells").filter("panel").select(columns)
        points = self.store.frame("umap").select("cell_idx", "x", "y")
        found = points.join(cells, on="cell_idx", how="left").sort("cell_idx").collect()
        return found.with_columns(pl.col("split", *self.label_columns).cast(pl.String).cast(pl.Categorical))

    @cached_property
    def label_columns(self) -> list[str]:
        """Text columns of the cell table that group the panel's cells: with 1 to MOST_CATEGORIES different values."""
        table = self.store.frame("cells").filter("panel")
        columns = [name for name, dtype in table.collect_schema().items() if dtype == pl.String and name not in _OWN]
        counts = table.select(pl.col(columns).drop_nulls().n_unique()).collect() if columns else pl.DataFrame()
        first = [name for name in ("cell_type", "batch", "donor") if name in columns]
        ordered = [*first, *(name for name in columns if name not in first)]
        return [name for name in ordered if 1 <= counts[name][0] <= MOST_CATEGORIES]

    @cached_property
    def number_columns(self) -> list[str]:
        """Columns of the cell table that hold a number of the panel's cells, such as a measure of their quality."""
        table = self.store.frame("cells").filter("panel")
        columns = [n for n, dtype in table.collect_schema().items() if dtype.is_numeric() and n not in _OWN]
        known = table.select(pl.col(columns).drop_nulls().len()).collect() if columns else pl.DataFrame()
        return [name for name in columns if known[name][0]]

    @cached_property
    def unit(self) -> str | None:
        """The column with the replicate units of the cells: donor, else batch; None where neither is known."""
        cells = self.store.panel_cells().select("donor", "batch").collect()
        return next((name for name in ("donor", "batch") if cells[name].null_count() < cells.height), None)

    @property
    def units(self) -> str:
        """The word for several replicate units."""
        return UNITS[self.unit or "donor"]

    @cached_property
    def n_cells(self) -> dict[str, int]:
        """The number of cells of each split."""
        counts = self.store.frame("cells").group_by("split").len().collect(engine="streaming")
        return {split: int(n) for split in SPLITS for n in counts.filter(split=split)["len"]}

    @cached_property
    def n_with_tokens(self) -> dict[str, int]:
        """The number of cells of each split that have tokens, which are those that features can fire in."""
        counts = dict.fromkeys(SPLITS, 0)
        # a join of all cells at once would take memory for each of them
        for start in range(0, sum(self.n_cells.values()), CELLS_COUNTED):
            inside = pl.col("cell_idx").is_between(start, start + CELLS_COUNTED, closed="left")
            with_tokens = self.store.frame("cell_tokens").filter(inside).select("cell_idx")
            cells = self.store.frame("cells").filter(inside).join(with_tokens, on="cell_idx", how="semi")
            for split, n in cells.group_by("split").len().collect().iter_rows():
                counts[split] += n
        return counts

    @property
    def panel(self) -> Panel | None:
        """The panel, which pages name beside its figures; None where it is all cells."""
        return None if self.store.panel.of_all_cells else self.store.panel

    def cells_at(self, cell_idx: Iterable[int]) -> list[dict[str, Any]]:
        """cell_id, split and labels of cells, in the order given; null where the cell table has no such cell."""
        wanted = list(cell_idx)
        new = set(wanted) - self._described.keys()
        if len(self._described) + len(new) > MOST_DESCRIBED:
            self._described.clear()
            new = set(wanted)
        if new:
            columns = ["cell_id", "split", *self.label_columns]
            found = self.store.cells_at(pl.Series(sorted(new), dtype=pl.Int64)).select("cell_idx", *columns)
            self._described.update(dict.fromkeys(new, dict.fromkeys(columns)))
            self._described.update((row.pop("cell_idx"), row) for row in found.to_dicts())
        return [self._described[place] for place in wanted]

    def rows(self, table: str, feature: int, shape: Shape | None = None) -> list[dict[str, Any]]:
        """The rows of a table about one feature, in their order; no rows where the store lacks the table.

        shape: what is made of the rows first; it is called once for many features, because an operation of Polars takes
        as long for one of them as for hundreds.

        Raises NoSuchResource for a feature that the store does not have.
        """
        if feature not in self.row_of:
            raise NoSuchResource(feature)
        if not self.has(table):
            return []
        block = self._block(table, feature // BLOCK, shape)
        start, stop = block.starts[feature % BLOCK : feature % BLOCK + 2].tolist()
        rows = block.rows.slice(start, stop - start).to_dicts()
        for row in rows:
            del row["feature_id"]
        return rows

    def _read_block(self, table: str, block: int, shape: Shape | None) -> Block:
        feature, first = pl.col("feature_id"), block * BLOCK
        found = self.store.frame(table).filter((feature >= first) & (feature < first + BLOCK)).collect()
        if shape is not None:
            found = shape(self, found)
        found = found.sort("feature_id", maintain_order=True)
        starts = np.searchsorted(found["feature_id"].to_numpy(), np.arange(first, first + BLOCK + 1))
        return Block(found, starts)
