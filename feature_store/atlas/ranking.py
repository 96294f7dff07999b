"""The features with the strongest association with every gene, label or gene set, ranked in one pass over the table.

A table is sorted by feature, so the rows of one gene are spread over all of it: five columns of them take .22 s of CPU
at 8 million rows (23 ms to find them, the rest to unpack their pages), all columns .55 s. Reading the table once and
keeping the best features of every name takes 4 s there, and each name is then a slice (.5 ms): the first request to a
table pays for all. The rows are read a range of features at a time: the memory depends on the range and on what is kept
(26 MB for 5,000 genes), and not on the size of the table.

The order is that of `FeatureStore.features_for`: features are ranked on `select` cells, figures are of `test` cells.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.query.store import KIND_OF, RANKED_BY, FeatureStore

MOST = 100
"""Features that are kept of each name."""
ROWS_AT_ONCE = 1_000_000
_FIGURES = {
    "label": ("rank_biserial", "q", "p_max", "n_donors", "n_agree"),
    "gene": ("pearson_within_type", "identity_precision", "lift", "q"),
    "gene_set": ("overlap", "n_set", "odds_ratio", "q", "q_matched"),
}
"""Columns that are shown beside the one that ranks the features, as far as the table has them."""


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The best features of every name of one kind.

    names: a row a name, in order. n_features [n_names]: the features that were tested for each name. rows: the best
    features, name after name. starts [n_names + 1]: the first row of each name. key: the column that ranks them.
    """

    names: pl.DataFrame
    n_features: npt.NDArray[np.int64]
    rows: pl.DataFrame
    starts: npt.NDArray[np.int64]
    key: str

    def of(self, place: int) -> dict[str, Any]:
        """One name, the number of its features, and columns of the best of them."""
        rows = self.rows[int(self.starts[place]) : int(self.starts[place + 1])]
        name = self.names.row(place, named=True)
        return {**name, "n": int(self.n_features[place]), "key": self.key, "columns": rows.to_dict(as_series=False)}


def names_in(store: FeatureStore, name_type: str) -> pl.DataFrame:
    """All names of a type, sorted: a row a gene, a (label_kind, label) or a (collection, gene_set)."""
    names = _columns(name_type)
    return store.frame(RANKED_BY[name_type][0]).select(names).unique().drop_nulls().sort(names).collect()


def ranking(store: FeatureStore, name_type: str, names: pl.DataFrame) -> Ranking:
    """The best features of each of `names`, which `names_in` gives; `name_type` is gene, label or gene_set."""
    table, key, descending = RANKED_BY[name_type]
    place_of = _place_of(names)
    known = store.frame(table).collect_schema().names()
    has_split = "split" in known
    ranked_by = f"select_{key}" if has_split else key
    figures = [column for column in (key, *_FIGURES[name_type]) if column in known]
    wanted = ["feature_id", *_columns(name_type), *figures, *(["split"] if has_split else [])]
    best: list[pl.DataFrame] = []
    n_features = np.zeros(names.height, dtype=np.int64)
    for rows in _ranges(store.frame(table), wanted, names.columns):
        found = rows.with_columns(name=place_of(rows)).drop(names.columns)
        if has_split:
            chosen = found.filter(pl.col("split") == "select")
            chosen = chosen.select("name", "feature_id", pl.col(key).alias(ranked_by))
            found = _beside(found.filter(pl.col("split") == "test").drop("split"), chosen)
        n_features += np.bincount(found["name"].to_numpy(), minlength=names.height)
        order = ["name", ranked_by, "feature_id"]
        best = [_first(pl.concat([*best, found]).sort(order, descending=[False, descending, False], nulls_last=True))]
    rows = best[0]
    starts = np.searchsorted(rows["name"].to_numpy(), np.arange(names.height + 1))
    return Ranking(
        names=names,
        n_features=n_features,
        rows=rows.select("feature_id", *dict.fromkeys([ranked_by, *figures])),
        starts=starts,
        key=ranked_by,
    )


def _place_of(names: pl.DataFrame) -> Callable[[pl.DataFrame], npt.NDArray[np.int64]]:
    """A function that returns the row in `names` of each row of a frame; a join on texts takes five times as long."""
    known = {column: pl.Enum(names[column].unique().sort()) for column in names.columns}

    def codes(frame: pl.DataFrame) -> tuple[npt.NDArray[np.int64], ...]:
        return tuple(frame[column].cast(of).to_physical().cast(pl.Int64).to_numpy() for column, of in known.items())

    table = np.zeros([len(of.categories) for of in known.values()], dtype=np.int64)
    table[codes(names)] = np.arange(names.height)

    def place(frame: pl.DataFrame) -> npt.NDArray[np.int64]:
        found: npt.NDArray[np.int64] = table[codes(frame)]
        return found

    return place


def _columns(name_type: str) -> list[str]:
    return [*([KIND_OF[name_type]] if name_type in KIND_OF else []), name_type]


def _ranges(frame: pl.LazyFrame, columns: list[str], names: list[str]) -> Iterator[pl.DataFrame]:
    """The rows that have a name, in ranges of features of about ROWS_AT_ONCE rows. There is at least one range."""
    feature = pl.col("feature_id")
    n_rows, last = frame.select(pl.len(), feature.max()).collect().row(0)
    step = max(1, ROWS_AT_ONCE * ((last or 0) + 1) // max(1, n_rows))
    for first in range(0, (last or 0) + 1, step):
        yield frame.filter((feature >= first) & (feature < first + step)).select(columns).drop_nulls(names).collect()


def _beside(found: pl.DataFrame, chosen: pl.DataFrame) -> pl.DataFrame:
    """The rows of `test` cells with the figure of `select` cells beside them; as a rule both have the same order."""
    pair = ["name", "feature_id"]
    if found.select(pair).equals(chosen.select(pair)):
        return found.with_columns(chosen.drop(pair))
    return found.join(chosen, on=pair, how="left")


def _first(ordered: pl.DataFrame) -> pl.DataFrame:
    """The first MOST rows of each name, of rows that are sorted by name."""
    name = ordered["name"].to_numpy()
    return ordered.filter(pl.Series(np.arange(len(name)) - np.searchsorted(name, name) < MOST))
