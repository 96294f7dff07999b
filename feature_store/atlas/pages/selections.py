"""Cells by what one wants to see of them, and two groups of cells compared: which features and genes tell them apart.

A group is named in the path: `l3` is the label with this place in `AtlasData.labels`, `p0_0_1_0_1_1` the cells inside a
polygon on the map (x and y of its corners), and `rest` all other cells. Groups are compared as labels are
(`feature_label`, with the same tests and the same replicate units): features are ranked on `select` cells, figures are
of `test` cells. A server compares any groups; an export, which holds files alone, has no comparison.

The map is made of the codes, so a polygon drawn around what looks alike there is a choice made after looking: its
p-values say how well figures of other cells repeat what was seen, and not that the group exists.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from scipy import sparse

from feature_store.associations import Labels, associate_labels
from feature_store.associations.claims import ALPHA
from feature_store.associations.inputs import Bools, Floats, Ints, Sparse, as_csr
from feature_store.associations.multiple_testing import q_within
from feature_store.atlas.columns import encode
from feature_store.atlas.data import AtlasData, NoSuchResource, path_number
from feature_store.atlas.pages.labels import one_side, with_features
from feature_store.atlas.routes import Route, json_bytes
from feature_store.cells import canonical_column
from feature_store.query.expression import Expression, expression_of

REST = "rest"
LEAST_CELLS = 5
"""The least number of `select` cells, and of `test` cells, of a group that is compared."""
MOST_CELLS = 20_000
"""Cells of `select` and `test` that are compared; of more a seeded draw is taken."""
MOST_LISTED = 25
MOST_CORNERS = 100
_SEED = 20_260
_SPLITS = ("select", "test")
_FIGURES = "auroc rank_biserial low high p q n_donors n_agree".split()


class Compared(NamedTuple):
    """The cells that groups are compared on, ascending by cell_idx, with their splits, units and places on the map."""

    cell_idx: Ints
    split: pl.Series
    unit: Labels | None
    n_all: int


def measures(data: AtlasData) -> list[dict[str, str]]:
    """The numbers of the cells that the map can be coloured by: columns of the cell table, and the number of tokens."""
    if not data.has("cells"):
        return []
    own = [{"name": name} for name in data.number_columns]
    return [*own, {"name": "n_tokens"}] if data.has("cell_tokens") else own


def measure(data: AtlasData, text: str) -> bytes:
    """`value` of each row of cells.cols: the number with this place in `measures`, null where it is unknown."""
    name = measures(data)[path_number(text, len(measures(data)))]["name"]
    table = data.store.frame("cell_tokens" if name == "n_tokens" else "cells").select("cell_idx", value=name)
    found = data.cells.select("cell_idx").lazy().join(table, on="cell_idx", how="left", maintain_order="left")
    return encode(found.select(pl.col("value").cast(pl.Float64)).collect())


def gene(data: AtlasData, text: str) -> bytes:
    """Columns place (row of cells.cols) and value of the cells on the map that express the gene with this gene_idx."""
    expression = data.cached(_expression)
    if expression is None:
        raise NoSuchResource(text)
    found = expression.of(expression.symbols[path_number(text, len(expression.symbols))])
    cells = data.cells.select("cell_idx").with_row_index("place")
    here = cells.join(found, on="cell_idx", how="inner").sort("place")
    return encode(here.select(pl.col("place").cast(pl.Int32), "value"))


def gene_list(data: AtlasData) -> bytes:
    """The symbols of the genes whose expression there is, by gene_idx; `missing` where it was not stored."""
    expression = data.cached(_expression)
    if expression is None:
        command = f"scsae associate {data.store.layout.store_option}"
        return json_bytes({"missing": {"table": "expression", "command": command}})
    return json_bytes({"genes": expression.symbols})


def compare(data: AtlasData, a: str, b: str) -> bytes:
    """Which features and genes tell two groups apart, with the number of cells of each split, of cells in both groups
    (which belong to the first), and the replicate units.
    """
    for table in ("codes", "umap"):
        if not data.has(table):
            return json_bytes(data.missing(table))
    cells = data.cached(_compared)
    in_a = members(data, a, cells.cell_idx)
    in_b = ~in_a if b == REST else members(data, b, cells.cell_idx)
    labels = Labels(kind="group", codes=np.where(in_a, 0, 1), names=("a", "b"), known=in_a | in_b)
    masks = {split: (cells.split == split).to_numpy() for split in _SPLITS}
    of_b = in_b & ~in_a
    n = {split: {"a": int((in_a & mask).sum()), "b": int((of_b & mask).sum())} for split, mask in masks.items()}
    facts: dict[str, Any] = {
        "alpha": ALPHA,
        "n": n,
        "n_both": int((in_a & in_b).sum()),
        "n_compared": int(cells.cell_idx.size),
        "n_all": cells.n_all,
        "least": LEAST_CELLS,
        "unit": data.unit,
    }
    if min(min(one.values()) for one in n.values()) < LEAST_CELLS:
        return json_bytes({**facts, "too_few": True})
    rows = _rows(data.cached(_codes), labels, masks, cells.unit).rename({"place": "feature_id"})
    features = {
        side: with_features(data, one_side(rows, _FIGURES, above=above)) for side, above in (("a", True), ("b", False))
    }
    facts["features"] = {
        "n_tested": rows.filter(split="test").height,
        **{side: {"n": found.height, "rows": found.head(MOST_LISTED).to_dicts()} for side, found in features.items()},
    }
    facts["genes"] = _genes(data, labels, masks, cells)
    return json_bytes(facts)


def _genes(data: AtlasData, labels: Labels, masks: dict[str, Bools], cells: Compared) -> dict[str, Any] | None:
    """The genes that tell the groups apart; None where there is no expression by gene."""
    expression = data.cached(_expression)
    if expression is None:
        return None
    rows = _rows(data.cached(_expressed), labels, masks, cells.unit)
    symbols = pl.Series("gene", expression.symbols)
    sides = {}
    for side, above in (("a", True), ("b", False)):
        found = one_side(rows, _FIGURES, above=above, key="place")
        named = found.head(MOST_LISTED).with_columns(gene=symbols.gather(found.head(MOST_LISTED)["place"]))
        sides[side] = {"n": found.height, "rows": named.drop("place").to_dicts()}
    return {"n_tested": rows.filter(split="test").height, **sides}


def _rows(values: Sparse, labels: Labels, masks: dict[str, Bools], unit: Labels | None) -> pl.DataFrame:
    """Rows of the first group as in `feature_label`, with `place` (the column of `values`), and q over all columns."""
    found = associate_labels(values, labels, masks, unit).table.filter(label="a")
    return found.rename({"feature_id": "place"}).with_columns(q=q_within("p", "label_kind"))


def members(data: AtlasData, text: str, cell_idx: Ints) -> Bools:
    """Which of the cells belong to a group. Raises NoSuchResource for a name that is none."""
    if text[:1] == "l":
        kind, label = data.labels.row(path_number(text[1:], data.labels.height))
        if kind not in data.store.frame("cells").collect_schema():
            raise NoSuchResource(text)
        labels = data.store.frame("cells").filter("panel").select("cell_idx", label=canonical_column(kind))
        found = labels.filter(label=label).select("cell_idx").collect()["cell_idx"].to_numpy()
    elif text[:1] == "p":
        cells = data.cells
        inside = is_inside(cells["x"].to_numpy(), cells["y"].to_numpy(), _corners(text[1:]))
        found = cells["cell_idx"].to_numpy()[inside]
    else:
        raise NoSuchResource(text)
    return np.isin(cell_idx, found)


def _corners(text: str) -> Floats:
    """The corners [n 2] that a path names. Raises NoSuchResource for anything else."""
    try:
        numbers = np.array([float(part) for part in text.split("_")])
    except ValueError as error:
        raise NoSuchResource(text) from error
    if numbers.size % 2 or not 6 <= numbers.size <= 2 * MOST_CORNERS or not np.isfinite(numbers).all():
        raise NoSuchResource(text)
    return numbers.reshape(-1, 2)


def is_inside(x: Floats, y: Floats, polygon: Floats) -> Bools:
    """Which points lie inside a polygon [n_corners 2], by the even-odd rule that `scatter.js` draws with."""
    px, py = x.astype(np.float64), y.astype(np.float64)
    inside = np.zeros(px.size, dtype=bool)
    for (ax, ay), (bx, by) in zip(polygon, np.roll(polygon, 1, axis=0), strict=True):
        if ay != by:
            crosses = ((ay > py) != (by > py)) & (px < (bx - ax) * (py - ay) / (by - ay) + ax)
            inside ^= crosses
    return inside


def _compared(data: AtlasData) -> Compared:
    """The `select` and `test` cells of the map that have tokens, or MOST_CELLS of them."""
    used = data.store.panel_cells().filter(pl.col("split").is_in(_SPLITS)).select("cell_idx", "split", "donor", "batch")
    cells = used.join(data.cells.lazy().select("cell_idx"), on="cell_idx", how="semi").sort("cell_idx").collect()
    n_all = cells.height
    if n_all > MOST_CELLS:
        rows = np.random.default_rng(_SEED).choice(n_all, MOST_CELLS, replace=False)
        cells = cells[np.sort(rows)]
    unit = None if data.unit is None else Labels.from_values(data.unit, cells[data.unit])
    return Compared(cells["cell_idx"].to_numpy(), cells["split"], unit, n_all)


def _codes(data: AtlasData) -> Sparse:
    """The codes of the compared cells, CSR [n_cells n_features]."""
    wanted = data.cached(_compared).cell_idx
    rows = data.store.frame("codes").filter(pl.col("cell_idx").is_in(pl.Series(wanted).implode()))
    keys = ["cell_idx", "feature_id"]
    found = rows.group_by(keys).agg(pl.col("value").max()).sort(keys).collect()
    place = np.searchsorted(wanted, found["cell_idx"].to_numpy())
    entries = (found["value"].cast(pl.Float64).to_numpy(), (place, found["feature_id"].to_numpy()))
    return as_csr(sparse.csr_array(entries, shape=(wanted.size, data.features.height)), "codes")


def _expression(data: AtlasData) -> Expression | None:
    return expression_of(data.store)


def _expressed(data: AtlasData) -> Sparse:
    """The expression of the compared cells, CSR [n_cells n_genes]."""
    expression = data.cached(_expression)
    if expression is None:
        raise NoSuchResource("expression")
    rows = np.searchsorted(expression.cell_idx, data.cached(_compared).cell_idx)
    return as_csr(expression.matrix(rows).astype(np.float64), "expression")


def _measure_names(data: AtlasData) -> Iterator[tuple[str]]:
    return ((str(i),) for i in range(len(measures(data)) if data.has("umap") else 0))


def _gene_names(data: AtlasData) -> Iterator[tuple[str]]:
    expression = data.cached(_expression) if data.has("umap") else None
    return ((str(i),) for i in range(len(expression.symbols) if expression else 0))


ROUTES = (
    Route(pattern="measures/{id}.cols", make=measure, names=_measure_names),
    Route(pattern="expression.json", make=gene_list),
    Route(pattern="expression/{id}.cols", make=gene, names=_gene_names),
    Route(pattern="selections/{a}/{b}.json", make=compare, names=lambda _: ()),
)
