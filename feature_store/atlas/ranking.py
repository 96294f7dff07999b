"""The features that go best with every gene, label or gene set of a store, ranked in one pass over their table.

A table lies by feature, so the rows of one name are spread over all of it: five columns of the rows of one gene take
.22 s of CPU at 8 million rows (finding them 23 ms, unpacking the pages that they lie in the rest), all columns .55 s.
Reading the table once and keeping the best of every name takes 4 s there, after which any name is a slice (.5 ms): the
first question to a table pays for all, and so does an export. The rows are read a range of features at a time, which
bounds the memory by the range and by what is kept (26 MB for 5,000 genes), whatever the size of the table.

The order is that of `FeatureStore.features_for`: chosen on `select` cells, figures of `test` cells.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.query.store import KIND_OF, RANKED_BY, FeatureStore

MOST = 100
"""Features that are kept of a name."""
ROWS_AT_ONCE = 1_000_000
_FIGURES = {
    "label": ("rank_biserial", "q", "p_max", "n_donors", "n_agree"),
    "gene": ("pearson_within_type", "identity_precision", "lift", "q"),
    "gene_set": ("overlap", "n_set", "odds_ratio", "q", "q_matched"),
}
"""What is told of a feature beside what it is ranked by; those that the table has."""


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The best features of every name of one kind.

    names: a row a name, in order; [n_features]: how many features have figures of a name; rows: the best of each, name
    after name; starts [n_names + 1]: where those of a name begin; key: the column of `rows` that ranks them.
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


def names_in(store: FeatureStore, asked: str) -> pl.DataFrame:
    """What can be asked for: a row a gene, a (label_kind, label) or a (collection, gene_set), sorted."""
    names = _columns(asked)
    return store.frame(RANKED_BY[asked][0]).select(names).unique().drop_nulls().sort(names).collect()


def ranking(store: FeatureStore, asked: str, names: pl.DataFrame) -> Ranking:
    """The best features of all `names` (of `names_in`); `asked` is gene, label or gene_set."""
    table, key, descending = RANKED_BY[asked]
    place_of = _place_of(names)
    known = store.frame(table).collect_schema().names()
    has_split = "split" in known
    ranked_by = f"select_{key}" if has_split else key
    figures = [column for column in (key, *_FIGURES[asked]) if column in known]
    wanted = ["feature_id", *_columns(asked), *figures, *(["split"] if has_split else [])]
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
    """What finds the place in `names` of each row of a frame, by numbers: a join on texts takes five times as long."""
    known = {column: pl.Enum(names[column].unique().sort()) for column in names.columns}

    def codes(frame: pl.DataFrame) -> tuple[npt.NDArray[np.int64], ...]:
        return tuple(frame[column].cast(of).to_physical().cast(pl.Int64).to_numpy() for column, of in known.items())

    table = np.zeros([len(of.categories) for of in known.values()], dtype=np.int64)
    table[codes(names)] = np.arange(names.height)

    def place(frame: pl.DataFrame) -> npt.NDArray[np.int64]:
        found: npt.NDArray[np.int64] = table[codes(frame)]
        return found

    return place


def _columns(asked: str) -> list[str]:
    return [*([KIND_OF[asked]] if asked in KIND_OF else []), asked]


def _ranges(frame: pl.LazyFrame, columns: list[str], names: list[str]) -> Iterator[pl.DataFrame]:
    """The rows with a name by ranges of features, about ROWS_AT_ONCE at a time; at least one range, be it empty."""
    feature = pl.col("feature_id")
    n_rows, last = frame.select(pl.len(), feature.max()).collect().row(0)
    step = max(1, ROWS_AT_ONCE * ((last or 0) + 1) // max(1, n_rows))
    for first in range(0, (last or 0) + 1, step):
        yield frame.filter((feature >= first) & (feature < first + step)).select(columns).drop_nulls(names).collect()


def _beside(found: pl.DataFrame, chosen: pl.DataFrame) -> pl.DataFrame:
    """The rows of `test` cells with the figure of `select` cells, which lie in one order as a rule."""
    pair = ["name", "feature_id"]
    if found.select(pair).equals(chosen.select(pair)):
        return found.with_columns(chosen.drop(pair))
    return found.join(chosen, on=pair, how="left")


def _first(ordered: pl.DataFrame) -> pl.DataFrame:
    """The first MOST rows of each name, of rows that lie by name."""
    name = ordered["name"].to_numpy()
    return ordered.filter(pl.Series(np.arange(len(name)) - np.searchsorted(name, name) < MOST))
