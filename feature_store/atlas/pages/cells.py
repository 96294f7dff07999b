"""Cells by their ids, and the features that fire in each cell.

The sorted ids are cut into chunks with an index of the first id of each, so that a browser finds a prefix among a
million ids with two small requests. Features by cell come in chunks of neighbouring cells, the order of the codes.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import polars as pl

from feature_store.atlas.data import AtlasData, NoSuchResource, path_number
from feature_store.atlas.routes import Route, json_bytes

IDS = 4096
"""Ids of a chunk."""
CELLS = 1000
"""Neighbouring cells whose features are in one chunk."""
MOST = 20
"""Features that are listed of each cell."""


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
    """Cells first to first + n - 1: cell_id, split, labels by column, and of each cell the largest codes (feature_id,
    value) and how many features fire (n_active).

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
    codes = pl.concat(table.select("cell_idx", "feature_id", "value").collect() for table in tables)
    if "token_pos" in data.store.frame("codes").collect_schema():
        codes = codes.group_by("cell_idx", "feature_id").agg(pl.col("value").max())
    codes = codes.sort("cell_idx", "value", "feature_id", descending=[False, True, False])
    value = pl.col("value").cast(pl.String).cast(pl.Float64)
    top = codes.group_by("cell_idx", maintain_order=True).agg(
        pl.col("feature_id").head(MOST), value.head(MOST), pl.len().alias("n_active")
    )
    found = cells.select("cell_idx").join(top, on="cell_idx", how="left", maintain_order="left")
    found = found.with_columns(pl.col("n_active").fill_null(0), pl.col("feature_id", "value").fill_null([]))
    return json_bytes({**facts, **found.drop("cell_idx").to_dict(as_series=False)})


def _cell_chunks(data: AtlasData) -> Iterator[tuple[str]]:
    n = sum(data.n_cells.values()) if data.has("cells") else 0
    return ((str(i),) for i in range(-(-n // CELLS)))


ROUTES: Sequence[Route] = (
    Route(pattern="cell_ids/index.json", make=id_index),
    Route(pattern="cell_ids/{id}.json", make=ids, names=_id_chunks),
    Route(pattern="cell_features/{id}.json", make=cell_features, names=_cell_chunks),
)
