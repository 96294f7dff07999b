"""Cells by their ids, and the features that fire in each cell.

The sorted ids are cut into chunks with an index of the first id of each, so that a browser finds a prefix among a
million ids with two small requests. Features by cell come in chunks of neighbouring cells, the order of the codes.

Features differ in how large their codes are, so the largest codes of a cell are those of the same few features in most
cells. A code is therefore ranked by its percentile among the codes of the same feature in other cells.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import polars as pl

from feature_store.atlas.data import AtlasData, NoSuchResource, path_number
from feature_store.atlas.routes import Route, json_bytes

IDS = 4096
"""Ids of a chunk."""
CELLS = 1000
"""Neighbouring cells whose features are in one chunk."""
MOST = 20
"""Features that are listed of each cell."""
MOST_OTHERS = 20_000
"""Cells of the panel that a code is compared with; of more a seeded draw is taken."""
_SEED = 20_261


class Percentiles:
    """The codes of other cells, by feature: MOST_OTHERS cells of the panel at most, all of which have tokens."""

    def __init__(self, data: AtlasData) -> None:
        cells = data.store.panel_cells().select("cell_idx").sort("cell_idx").collect()["cell_idx"].to_numpy()
        if cells.size > MOST_OTHERS:
            rows = np.random.default_rng(_SEED).choice(cells.size, MOST_OTHERS, replace=False)
            cells = cells[np.sort(rows)]
        self._cells = cells
        wanted = pl.col("cell_idx").is_in(pl.Series(cells).implode())
        found = _pooled(data.store.frame("codes").filter(wanted).select("cell_idx", "feature_id", "value").collect())
        found = found.sort("feature_id", "value")
        self._features, self._values = found["feature_id"].to_numpy(), found["value"].to_numpy()

    def of(self, codes: pl.DataFrame) -> pl.Series:
        """The share of other cells whose code of the same feature is smaller, equal ones by half.

        codes: cell_idx, feature_id and value, none of them 0; float64 [n]. A cell is not compared with itself.
        """
        cell, feature, value = (codes[name].to_numpy() for name in ("cell_idx", "feature_id", "value"))
        is_own = np.isin(cell, self._cells)
        share = np.empty(len(cell))
        order = np.argsort(feature, kind="stable")
        for rows in np.split(order, np.flatnonzero(np.diff(feature[order])) + 1) if len(order) else ():
            start, stop = np.searchsorted(self._features, [feature[rows[0]], feature[rows[0]] + 1])
            others = self._values[start:stop]
            below, up_to = (np.searchsorted(others, value[rows], side=side) for side in ("left", "right"))
            n_zero = len(self._cells) - others.size
            n_other = len(self._cells) - is_own[rows]
            share[rows] = (n_zero + below + (up_to - below - is_own[rows]) / 2) / np.maximum(n_other, 1)
        return pl.Series("percentile", share)


def _by_id(data: AtlasData) -> pl.DataFrame:
    """cell_id and cell_idx of all cells, sorted by the id in lower case, because a search ignores the case.

    It is kept, at 24 bytes a cell, and the length of its id where that is more than 12.
    """
    ids = data.store.frame("cells").select("cell_id", "cell_idx").collect()
    return ids.sort(pl.col("cell_id").str.to_lowercase(), "cell_id", "cell_idx")


def id_index(data: AtlasData) -> bytes:
    """n, and `first`: the first id of each chunk of `size`."""
    if not data.has("cells"):
        return json_bytes(data.missing("cells"))
    ids = data.cached(_by_id)
    return json_bytes({"n": ids.height, "size": IDS, "first": ids["cell_id"].gather_every(IDS).to_list()})


def ids(data: AtlasData, chunk: str) -> bytes:
    """cell_id and cell_idx of a chunk of the sorted ids."""
    if not data.has("cells"):
        raise NoSuchResource(chunk)
    every = data.cached(_by_id)
    found = every[path_number(chunk, -(-every.height // IDS)) * IDS :][:IDS]
    return json_bytes(found.to_dict(as_series=False))


def _id_chunks(data: AtlasData) -> Iterator[tuple[str]]:
    n = data.cached(_by_id).height if data.has("cells") else 0
    return ((str(i),) for i in range(-(-n // IDS)))


def cell_features(data: AtlasData, chunk: str) -> bytes:
    """Cells first to first + n - 1: cell_id, split, labels by column, and of each cell how many features fire
    (n_active) and the codes that stand out most (feature_id, value, percentile among other cells).

    A value is the shortest decimal of its float32. Where there are no codes, `missing` says so. Where the panel is not
    all cells, `panel` says which cells are in it, and `keep` how many codes are kept of each other cell at most, so
    that n_active is at most this.
    """
    if not data.has("cells"):
        raise NoSuchResource(chunk)
    n_cells = sum(data.n_cells.values())
    first = path_number(chunk, -(-n_cells // CELLS)) * CELLS
    inside = (pl.col("cell_idx") >= first) & (pl.col("cell_idx") < first + CELLS)
    columns = ["cell_idx", "cell_id", "split", "panel", *data.label_columns]
    cells = data.store.frame("cells").filter(inside).select(columns).sort("cell_idx").collect()
    facts: dict[str, Any] = {
        "first": first,
        **cells.select("cell_id", "split").to_dict(as_series=False),
        "labels": cells.select(data.label_columns).to_dict(as_series=False),
    }
    if not data.has("codes"):
        return json_bytes({**facts, **data.missing("codes")})
    if (panel := data.panel) is not None:
        facts |= {"panel": cells["panel"].to_list(), "keep": panel.keep}
    tables = [data.store.frame(name).filter(inside) for name in ("codes", "compact_codes") if data.has(name)]
    codes = _pooled(pl.concat(table.select("cell_idx", "feature_id", "value").collect() for table in tables))
    codes = codes.with_columns(data.cached(Percentiles).of(codes))
    order = ["cell_idx", "percentile", "value", "feature_id"]
    codes = codes.sort(order, descending=[False, True, True, False])
    value = pl.col("value").cast(pl.String).cast(pl.Float64)
    top = codes.group_by("cell_idx", maintain_order=True).agg(
        pl.col("feature_id", "percentile").head(MOST), value.head(MOST), pl.len().alias("n_active")
    )
    found = cells.select("cell_idx").join(top, on="cell_idx", how="left", maintain_order="left")
    found = found.with_columns(
        pl.col("n_active").fill_null(0), pl.col("feature_id", "value", "percentile").fill_null([])
    )
    return json_bytes({**facts, **found.drop("cell_idx").to_dict(as_series=False)})


def _pooled(codes: pl.DataFrame) -> pl.DataFrame:
    """One code of each cell and feature: the largest of its tokens, where the codes are of tokens."""
    return codes.group_by("cell_idx", "feature_id").agg(pl.col("value").max())


def _cell_chunks(data: AtlasData) -> Iterator[tuple[str]]:
    n = sum(data.n_cells.values()) if data.has("cells") else 0
    return ((str(i),) for i in range(-(-n // CELLS)))


ROUTES: Sequence[Route] = (
    Route(pattern="cell_ids/index.json", make=id_index),
    Route(pattern="cell_ids/{id}.json", make=ids, names=_id_chunks),
    Route(pattern="cell_features/{id}.json", make=cell_features, names=_cell_chunks),
)
