"""The embeddings of steered cells before and after, on the principal components of those before."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.cells import canonical_column
from feature_store.errors import InputError
from feature_store.plots.canvas import (
    BLUE,
    OKABE_ITO,
    ORANGE,
    SMALL,
    beside,
    canvas,
    finish,
    head_all,
    name_dots,
    plain,
)
from feature_store.plots.inputs import read_cells
from feature_store.plots.steering.rows import title_of
from feature_store.query.steering import Role, SteeringResults, steering_results
from feature_store.storage.commit import Run
from feature_store.storage.filesystem import scan_source
from feature_store.storage.layout import MANIFEST

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from feature_store.plots.canvas import Save
    from feature_store.query.store import FeatureStore

MAX_CELLS = 3000
"""Cells that a map draws at most; of more cells it draws a seeded sample."""
MIN_CELLS = 10
"""Cells that a type must have for an arrow."""
MAX_LABELS = 8
OTHERS = "#BBBBBB"
Floats = npt.NDArray[np.float64]


class MovedType(NamedTuple):
    """A cell type on the map: the means of its steered cells before and after, and that of the cells of the type that
    they were moved toward, which is None where these are fewer than MIN_CELLS.
    """

    name: str
    start: Floats
    stop: Floats
    aim: Floats | None
    n_aim: int


def steering_map(
    store: "FeatureStore",
    run: str | None = None,
    *,
    seed: int = 0,
    show: bool | None = None,
    save: "Save | None" = None,
    ax: "Axes | None" = None,
) -> "list[Axes]":
    """The test cells' embeddings before and after steering, on the principal components of those before.

    The components are fitted once, on unsteered cells, and the steered cells are projected onto them, so that the cells
    move and the map does not. Colours are the labels of the run (target and toward, or batches). An arrow runs from the
    mean of a cell type before to its mean after, and a cross marks the mean of the cells of the same type that it was
    moved toward; both bear the number of the type in the key. Means are of MIN_CELLS cells or more, and the key says
    which types have too few for a cross. At most 3,000 cells are drawn. Raises InputError for a run without stored
    embeddings.
    """
    results = steering_results(store, run)
    before, after, cells = embedded_cells(store, results)
    rng = np.random.default_rng(seed)
    mean = before.mean(axis=0)
    _, spread, axes = np.linalg.svd(before - mean, full_matrices=False)
    share = spread[:2] ** 2 / max(float((spread**2).sum()), 1e-30)
    places = [(embedded - mean) @ axes[:2].T for embedded in (before, after)]
    colours, names = _colours(cells["label"], results)
    drawn = canvas(ax, (4.3, 3.9), show=show, save=save, n_panels=1 if ax is not None else 2)
    order = rng.permutation(len(before))[:MAX_CELLS]
    size = float(np.clip(9_000 / max(len(order), 1), 2, 24))
    for panel, place, said in zip(
        drawn.axes, places if ax is None else places[1:], ("before", "after") if ax is None else ("after",), strict=True
    ):
        panel.scatter(
            place[order, 0],
            place[order, 1],
            s=size,
            color=[colours[i] for i in order],
            lw=0,
            alpha=0.7,
            rasterized=True,
        )
        panel.set(xticks=[], yticks=[])
        panel.set_xlabel(f"PC 1 ({share[0]:.0%} of the variance before)", fontsize=SMALL)
        panel.set_ylabel(f"PC 2 ({share[1]:.0%})", fontsize=SMALL)
        panel.set_title(said, fontsize=9)
    bounds = np.concatenate([place[order] for place in places])
    low, high = np.quantile(bounds, (0.002, 0.998), axis=0)
    margin = 0.06 * (high - low)
    for panel in drawn.axes:
        panel.set_xlim(low[0] - margin[0], high[0] + margin[0])
        panel.set_ylim(low[1] - margin[1], high[1] + margin[1])
    panel, toward = drawn.axes[-1], results.plan.toward
    moved = moved_types(places, cells, results)
    handles: list[Any] = [panel.scatter([], [], s=24, color=colour) for colour in names.values()]
    listed = [plain(name, 34) for name in names]
    if moved:
        handles += panel.plot([], [], color="black", lw=1.3, marker=">", ms=5)
        listed.append("mean of a type, before to after")
    if any(one.aim is not None for one in moved):
        handles.append(panel.scatter([], [], marker="x", s=28, color="black", lw=1.3))
        listed.append(f"mean of its {plain(toward, 24)} cells")
    for number, one in enumerate(moved, start=1):
        _draw_moved(panel, one)
        handles += panel.plot([], [], ls="none", marker=f"${number}$", ms=6 if number < 10 else 9, color="black", mew=0)
        few = f" (no cross: {one.n_aim} {plain(toward, 12)})" if toward is not None and one.aim is None else ""
        listed.append(plain(one.name, 34) + few)
    beside(panel, handles, listed)
    head_all(drawn, title_of(results))
    marks = [(place, str(i)) for i, one in enumerate(moved, 1) for place in (one.start, one.aim) if place is not None]
    name_dots(panel, [(x, y, [number]) for (x, y), number in marks], fontsize=SMALL, fontweight="bold")
    finish(drawn, store, show, save, ("steering", results.run))
    return drawn.axes


def embedded_cells(store: "FeatureStore", results: SteeringResults) -> tuple[Floats, Floats, pl.DataFrame]:
    """Embeddings of test cells before and after [cell width], and label and cell type of each cell that has a label.

    Raises InputError for a run without embeddings of its variants.
    """
    folder = store.layout.steering_dir(results.run)
    if "steering_variants" not in store.tables() or not (folder / "per_cell" / MANIFEST).is_file():
        raise InputError(f"steering run {results.run} has no embeddings of its variants; run `scsae steer` again")
    variants = store.frame("steering_variants").filter(pl.col("run") == results.run).collect()
    ids = [variants.filter(chosen)["variant"] for chosen in (pl.col("role") == Role.UNSTEERED, pl.col("chosen"))]
    if not all(len(found) for found in ids):
        raise InputError(f"steering run {results.run} has no chosen variant; run `scsae steer` again")
    kind = results.plan.kind
    cells = read_cells(store, "cell_type", kind).filter(pl.col("split") == "test")
    cells = cells.select("cell_idx", "cell_type", label=canonical_column(kind)).drop_nulls("label")
    parts = Run.open(folder / "per_cell").checked_parts()
    stored = pl.scan_parquet([scan_source(part) for part in parts], glob=False)
    columns = []
    for found in ids:
        rows = stored.filter(pl.col("variant") == found[0]).select("cell_idx", "embedding").collect()
        columns.append(cells.select("cell_idx").join(rows, on="cell_idx", how="left", maintain_order="left"))
    known = columns[0]["embedding"].is_not_null()
    # careful: a cell that a variant leaves alone has no row of it
    columns[1] = columns[1].with_columns(embedding=pl.coalesce("embedding", columns[0]["embedding"]))
    arrays = [np.asarray(frame["embedding"].filter(known).to_numpy(), dtype=np.float64) for frame in columns]
    finite = (
        np.isfinite(arrays[0]).all(axis=1) & np.isfinite(arrays[1]).all(axis=1) if known.any() else np.zeros(0, bool)
    )
    if finite.sum() < 3:
        raise InputError(
            f"steering run {results.run} has embeddings of {int(finite.sum())} labelled test cells; 3 are needed"
        )
    return arrays[0][finite], arrays[1][finite], cells.filter(known).filter(pl.Series(finite))


def _colours(labels: pl.Series, results: SteeringResults) -> tuple[list[str], dict[str, str]]:
    """The colour of each cell, and of each label in the legend."""
    target, toward = results.plan.target, results.plan.toward
    counts = labels.value_counts(sort=True)[labels.name].to_list()
    if target in counts:
        shown = {str(target): ORANGE} | ({str(toward): BLUE} if toward in counts else {})
    else:
        palette = [colour for colour in OKABE_ITO if colour not in ("#000000", "#F0E442")]
        shown = dict(zip(sorted(counts[: min(MAX_LABELS, len(palette))]), palette, strict=False))
    rest = set(counts) - shown.keys()
    names = shown | ({"others": OTHERS} if rest else {})
    return [shown.get(label, OTHERS) for label in labels], names


def moved_types(places: list[Floats], cells: pl.DataFrame, results: SteeringResults) -> list[MovedType]:
    """The means of the types that have MIN_CELLS steered cells, sorted by name.

    places: of the cells before and after, [cell 2] each.
    """
    target, toward = results.plan.target, results.plan.toward
    label = cells["label"]
    steered = (label == target).to_numpy() if target in label.to_list() else np.ones(len(label), dtype=bool)
    types = cells["cell_type"].fill_null("unknown")
    found = []
    for name in types.unique().sort():
        own = (types == name).to_numpy()
        moved = own & steered
        if moved.sum() < MIN_CELLS:
            continue
        start, stop = (place[moved].mean(axis=0) for place in places)
        aim = own & (label == toward).to_numpy() if toward is not None else np.zeros(len(own), dtype=bool)
        n_aim = int(aim.sum())
        found.append(MovedType(name, start, stop, places[0][aim].mean(axis=0) if n_aim >= MIN_CELLS else None, n_aim))
    return found


def _draw_moved(panel: "Axes", one: MovedType) -> None:
    (x0, y0), (x1, y1) = one.start, one.stop
    arrow = {"arrowstyle": "-|>", "lw": 1.3, "color": "black", "mutation_scale": 9}
    panel.annotate("", (x1, y1), (x0, y0), arrowprops=arrow)
    if one.aim is not None:
        x, y = one.aim
        panel.scatter(x, y, marker="x", s=28, color="black", lw=1.3, zorder=4)
