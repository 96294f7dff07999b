"""Two groups of cells of the map as a recipe: a label of the same cells that `scsae run` tests, and steers with.

A label belongs to the cell table, so the recipe encodes the same cells with a table joined to them (`--obs`) that says
which group a cell is in; their splits stay what they are. It then associates the features with the label, and edits
those of group A. A store that was not made of files with a model by this machine's reckoning has no such recipe.
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl

from feature_store.atlas.data import AtlasData
from feature_store.atlas.pages.selections import REST, members
from feature_store.atlas.routes import Route, json_bytes
from feature_store.cells import source_location
from feature_store.errors import StoreError
from feature_store.query.runs import RunChain

LABEL = "atlas_selection"
"""The obs column that the recipe makes a label of."""
TABLE = "selection.csv"
RECIPE = "selection-recipe.yaml"
GROUPS = ("A", "B")


def recipe(data: AtlasData, a: str, b: str) -> bytes:
    """`recipe`, the text of RECIPE, and `table`, that of TABLE with cell_id and group; or `why_not`, a sentence."""
    if not data.has("umap"):
        return json_bytes(data.missing("umap"))
    cell_idx = data.cells["cell_idx"].to_numpy()
    in_a = members(data, a, cell_idx)
    in_b = ~in_a if b == REST else members(data, b, cell_idx) & ~in_a
    options = data.cached(_encoding)
    if isinstance(options, str):
        return json_bytes({"why_not": options})
    group = pl.Series(LABEL, np.select([in_a, in_b], GROUPS, default=""))
    names = data.store.cells_at(data.cells["cell_idx"]).select("cell_idx", "cell_id")
    table = data.cells.select("cell_idx", group).filter(group != "").join(names, on="cell_idx", how="left")
    lines = _lines(data, options, n_a=int(in_a.sum()), n_b=int(in_b.sum()), is_whole=b == REST)
    return json_bytes({"recipe": "\n".join(lines), "table": table.select("cell_id", LABEL).write_csv()})


def _encoding(data: AtlasData) -> dict[str, Any] | str:
    """The options that encode the same cells again, or why there are none."""
    store = data.store
    try:
        if store.lineage.associations is None:
            return "A recipe needs associations, which name the SAE and the cells: run scsae associate first."
        chain = RunChain.of(store.layout, store.lineage.associations)
        if chain.activations.origin != "model":
            return "The activations came from outside, so scsae cannot encode these cells with another label by itself."
        plan = chain.cells
        place = source_location(store.layout, chain.codes.dataset)
    except StoreError as error:
        return f"The store does not say where its cells are: {error}"
    options = {
        "sae": chain.codes.sae,
        "data": [str(path) for path in place.paths],
        "matrix": plan.matrix,
        "where": plan.where,
        "panel": plan.panel.wanted,
        **{name: getattr(plan, name) or "none" for name in ("donor", "batch", "cell_type")},
        "obs": [TABLE],
        "label": [*plan.labels, LABEL],
    }
    return {name: value for name, value in options.items() if value is not None} | {"_n_tables": len(plan.obs)}


def _lines(data: AtlasData, options: dict[str, Any], *, n_a: int, n_b: int, is_whole: bool) -> Iterator[str]:
    others = "all others on the map" if is_whole else "a second group"
    yield f"# {n_a} cells (A) and {n_b} cells (B, {others}), chosen on the page of cells of the atlas."
    yield "# A choice made after looking: q says how well a difference repeats on test cells."
    yield f"# In the folder of {TABLE}: scsae run {RECIPE} --store ROOT"
    if options["_n_tables"]:
        yield f"# careful: columns came from {options['_n_tables']} table(s) of --obs; join them to {TABLE} by cell_id."
    yield "encode:"
    for name, value in options.items():
        if not name.startswith("_"):
            yield f"  {name}: {_yaml(value)}"
    yield "associate: {}"
    yield "steer:"
    yield f"  - kind: {LABEL}"
    yield f"    target: {GROUPS[0]}"
    if not is_whole:
        yield f"    toward: {GROUPS[1]}"
    yield ""


def _yaml(value: Any) -> str:
    # JSON is YAML, and quotes whatever a name holds
    return json.dumps(value, ensure_ascii=False)


ROUTES = (Route(pattern="selection_recipes/{a}/{b}.json", make=recipe, names=lambda _: ()),)
