"""Steered cells one by one on a map, what the model's own head says of their genes, and every plot of a run at once."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.errors import InputError
from feature_store.plots.canvas import BLUE, GREY, OKABE_ITO, ORANGE, PALE, SMALL, beside, canvas, finish, head, plain
from feature_store.plots.inputs import read_cells
from feature_store.plots.steering import (
    UNSTEERED,
    Steered,
    bars_of,
    curve_of,
    steered_run,
    steering_bars,
    steering_curve,
    steering_distances,
    steering_pareto,
    title_of,
    trade_of,
    types_of,
)
from feature_store.storage.commit import Run
from feature_store.storage.filesystem import scan_source
from feature_store.storage.layout import MANIFEST

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from feature_store.query.store import FeatureStore

_MOST_CELLS = 3000
"""Cells drawn on a map, at most: a seeded sample of more."""
_MOST_LABELS = 8
_LEAST_CELLS = 10
"""Cells of a type that an arrow is drawn for, and in which a gene's answer was asked."""
Floats = npt.NDArray[np.float64]


def steering_map(
    store: "FeatureStore",
    run: str | None = None,
    *,
    seed: int = 0,
    show: bool | None = None,
    save: str | Path | None = None,
    ax: "Axes | None" = None,
) -> "list[Axes]":
    """The test cells' embeddings before and after steering, on the principal components of those before.

    The components are fitted once, on unsteered cells, and the steered ones are projected onto them, so that what moves
    is the cells and not the map. Colours: the labels of the question (target and toward, or batches). Arrows: mean of a
    cell type before, to its mean after; a cross marks the mean of the cells that it was moved toward. At most 3,000
    cells are drawn. InputError for a run without stored embeddings.
    """
    of = steered_run(store, run)
    before, after, cells = _embedded(store, of)
    rng = np.random.default_rng(seed)
    mean = before.mean(axis=0)
    _, spread, axes = np.linalg.svd(before - mean, full_matrices=False)
    share = spread[:2] ** 2 / max(float((spread**2).sum()), 1e-30)
    places = [(embedded - mean) @ axes[:2].T for embedded in (before, after)]
    colours, names = _colours(cells["label"], of)
    drawn = canvas(ax, (8.6, 3.9), show=show, save=save, n_panels=1 if ax is not None else 2)
    order = rng.permutation(len(before))[:_MOST_CELLS]
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
    any_moved = _draw_arrows(drawn.axes[-1], places, cells, of)
    handles: list[Any] = [drawn.axes[-1].scatter([], [], s=24, color=colour) for colour in names.values()]
    listed = [*names, *(("mean of a type, before to after",) if any_moved else ())]
    handles += [drawn.axes[-1].plot([], [], color="black", lw=1.3)[0]] if any_moved else []
    if of.plan.get("toward") in names:
        handles.append(drawn.axes[-1].scatter([], [], marker="x", s=28, color="black", lw=1.3))
        listed.append(f"mean of {of.plan['toward']}")
    beside(drawn.axes[-1], handles, [plain(name, 34) for name in listed])
    if drawn.own:
        drawn.figure.suptitle(title_of(of), fontsize=10)
    else:
        head(drawn.ax, title_of(of))
    finish(drawn, show, save)
    return drawn.axes


def steering_head(
    store: "FeatureStore",
    run: str | None = None,
    *,
    n: int = 12,
    show: bool | None = None,
    save: str | Path | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """What the model's own head now says of hidden genes of steered cells, against how these genes really differ.

    A dot a gene asked in 10 cells or more: the change of the mean answer (y) against the difference of the mean value
    between the cells that were moved toward and the target's (x). The n genes of largest change are named; the
    correlation of the nulls' first draws stands in the title. InputError for a run without answers.
    """
    of = steered_run(store, run)
    table = _answers(store, of)
    chosen = of.rows.filter(pl.col("chosen"))["condition"] if "chosen" in of.rows.columns else pl.Series(["?"])
    name = str(chosen[0]) if len(chosen) and chosen[0] in table["condition"].to_list() else str(table["condition"][0])
    said = {
        condition: _correlation(frame)
        for (condition,), frame in table.filter(pl.col("draw") == 0).group_by("condition", maintain_order=True)
    }
    genes = table.filter((pl.col("condition") == name) & (pl.col("draw") == 0) & (pl.col("n_cells") >= _LEAST_CELLS))
    genes = genes.drop_nulls(["change", "difference"])
    drawn = canvas(ax, (5.6, 4.4), show=show, save=save)
    strongest = genes.top_k(n, by=pl.col("change").abs())
    drawn.ax.axhline(0, color=PALE, lw=0.8, zorder=0)
    drawn.ax.axvline(0, color=PALE, lw=0.8, zorder=0)
    drawn.ax.scatter(genes["difference"], genes["change"], s=9, color=GREY, lw=0, alpha=0.6, rasterized=True)
    drawn.ax.scatter(strongest["difference"], strongest["change"], s=18, color=BLUE, lw=0)
    _name_genes(drawn.ax, strongest)
    drawn.ax.set_xlabel("real difference: mean of reference cells less target cells", fontsize=9)
    drawn.ax.set_ylabel("change of the model's answer", fontsize=9)
    r = said.pop(name)
    nulls = ", ".join(f"{plain(other)} {value:.2f}" for other, value in said.items() if value is not None)
    measured = "" if r is None else f"r = {r:.2f} over {genes.height} genes"
    against = f" ({nulls})" if nulls else ""
    head(drawn.ax, f"{title_of(of)}\n{measured}{against}", least=64)
    finish(drawn, show, save)
    return drawn.ax


def steering_all(
    store: "FeatureStore", run: str | None = None, *, save: str | Path, show: bool | None = None
) -> list[Path]:
    """Every plot that a run has the tables for, as PNG files in the folder `save`; returns them in order.

    Takes some 3 s for 2,000 cells. InputError for an unknown run.
    """
    folder = Path(save)
    made = []
    for name, draw in steering_drawings(store, run).items():
        draw(folder / f"{name}.png", show=show)
        made.append(folder / f"{name}.png")
    return made


def steering_drawings(store: "FeatureStore", run: str | None = None) -> dict[str, Callable[..., object]]:
    """The plots that a run has the tables for, by name: each draws into the file it is given, nothing is drawn yet."""
    of = steered_run(store, run)
    known: dict[str, tuple[Any, Callable[[], object]]] = {
        "bars": (steering_bars, lambda: bars_of(of)),
        "curve": (steering_curve, lambda: curve_of(of)),
        "pareto": (steering_pareto, lambda: trade_of(of)),
        "distances": (steering_distances, lambda: types_of(of)),
        "map": (steering_map, lambda: _embedded(store, of)),
        "head": (steering_head, lambda: _answers(store, of)),
    }
    drawings: dict[str, Callable[..., object]] = {}
    for name, (draw, select) in known.items():
        try:
            select()
        except InputError:
            # the question has no such table: a mix no cell to move, a single point no curve
            continue
        drawings[name] = partial(_draw_into, draw, store, of.run)
    return drawings


def _draw_into(draw: Any, store: "FeatureStore", run: str, save: Path, *, show: bool | None = None) -> object:
    return draw(store, run, save=save, show=show)


def _embedded(store: "FeatureStore", of: Steered) -> tuple[Floats, Floats, pl.DataFrame]:
    """Test cells before and after [cell width], and label and cell type of each; cells without label are left out."""
    folder = store.layout.steering_dir(of.run)
    if "steering_variants" not in store.tables() or not (folder / "per_cell" / MANIFEST).is_file():
        raise InputError(f"steering run {of.run} has no embeddings of its variants; run `scsae steer` anew")
    variants = store.frame("steering_variants").filter(pl.col("run") == of.run).collect()
    ids = [variants.filter(chosen)["variant"] for chosen in (pl.col("role") == UNSTEERED, pl.col("chosen"))]
    if not all(len(found) for found in ids):
        raise InputError(f"steering run {of.run} has no chosen variant; run `scsae steer` anew")
    kind = str(of.plan.get("kind", "cell_type"))
    cells = read_cells(store, "cell_type", kind).filter(pl.col("split") == "test")
    cells = cells.select("cell_idx", "cell_type", label=pl.col(kind).cast(pl.String)).drop_nulls("label")
    parts = Run.open(folder / "per_cell").parts()
    stored = pl.scan_parquet([scan_source(part) for part in parts], glob=False)
    columns = []
    for found in ids:
        rows = stored.filter(pl.col("variant") == found[0]).select("cell_idx", "embedding").collect()
        columns.append(cells.select("cell_idx").join(rows, on="cell_idx", how="left", maintain_order="left"))
    known = columns[0]["embedding"].is_not_null()
    # a cell that a variant leaves alone has no row of it
    columns[1] = columns[1].with_columns(embedding=pl.coalesce("embedding", columns[0]["embedding"]))
    arrays = [np.asarray(frame["embedding"].filter(known).to_numpy(), dtype=np.float64) for frame in columns]
    finite = (
        np.isfinite(arrays[0]).all(axis=1) & np.isfinite(arrays[1]).all(axis=1) if known.any() else np.zeros(0, bool)
    )
    if finite.sum() < 3:
        raise InputError(
            f"steering run {of.run} has embeddings of {int(finite.sum())} labelled test cells; 3 are needed"
        )
    return arrays[0][finite], arrays[1][finite], cells.filter(known).filter(pl.Series(finite))


def _colours(labels: pl.Series, of: Steered) -> tuple[list[str], dict[str, str]]:
    """A colour for each cell, and the names of the colours."""
    target, toward = of.plan.get("target"), of.plan.get("toward")
    counts = labels.value_counts(sort=True)[labels.name].to_list()
    if target in counts:
        shown = {str(target): ORANGE} | ({str(toward): BLUE} if toward in counts else {})
    else:
        palette = [colour for colour in OKABE_ITO if colour not in ("#000000", "#F0E442")]
        shown = dict(zip(sorted(counts[: min(_MOST_LABELS, len(palette))]), palette, strict=False))
    rest = set(counts) - shown.keys()
    names = shown | ({"others": "#BBBBBB"} if rest else {})
    return [shown.get(label, "#BBBBBB") for label in labels], names


def _draw_arrows(panel: "Axes", places: list[Floats], cells: pl.DataFrame, of: Steered) -> bool:
    """From a type's mean before to its mean after, for the cells that were steered; whether there was any."""
    target, toward = of.plan.get("target"), of.plan.get("toward")
    label = cells["label"]
    steered = (label == target).to_numpy() if target in label.to_list() else np.ones(len(label), dtype=bool)
    types = cells["cell_type"].fill_null("unknown")
    any_moved = False
    for name in types.unique().sort():
        own = (types == name).to_numpy()
        moved = own & steered
        if moved.sum() < _LEAST_CELLS:
            continue
        any_moved = True
        start, stop = (place[moved].mean(axis=0) for place in places)
        panel.annotate(
            "", stop, start, arrowprops={"arrowstyle": "-|>", "lw": 1.3, "color": "black", "mutation_scale": 9}
        )
        if toward is not None and (reference := own & (label == toward).to_numpy()).sum() >= _LEAST_CELLS:
            x, y = places[0][reference].mean(axis=0)
            panel.scatter(x, y, marker="x", s=28, color="black", lw=1.3, zorder=4)
    return any_moved


def _answers(store: "FeatureStore", of: Steered) -> pl.DataFrame:
    found = pl.DataFrame()
    if "steering_head" in store.tables():
        found = store.frame("steering_head").filter(pl.col("run") == of.run).collect()
    if found.is_empty():
        raise InputError(f"steering run {of.run} has no answers of the model's head; `scsae steer --head` asks it")
    return found


def _correlation(genes: pl.DataFrame) -> float | None:
    """Pearson correlation over the genes of enough cells; None for fewer than 3 or without variance."""
    both = genes.filter(pl.col("n_cells") >= _LEAST_CELLS).select("change", "difference").drop_nulls().to_numpy()
    if len(both) < 3 or not both.std(axis=0).all():
        return None
    return float(np.corrcoef(both.T)[0, 1])


def _name_genes(ax: "Axes", genes: pl.DataFrame) -> None:
    """Write names beside the dots, those that would cover another a line higher or lower."""
    from matplotlib.patheffects import withStroke

    placed: list[tuple[float, float, float]] = []
    (x0, x1), (y0, y1) = ax.get_xlim(), ax.get_ylim()
    for row in genes.iter_rows(named=True):
        name = plain(row["gene"], 18)
        x, y = (row["difference"] - x0) / (x1 - x0), (row["change"] - y0) / (y1 - y0)
        left = x > 0.6
        width = 0.02 * len(name)
        start = x - width if left else x
        for lift in (0.0, 0.045, -0.045, 0.09, -0.09):
            if not any(abs(y + lift - at) < 0.04 and start < b and a < start + width for at, a, b in placed):
                break
        placed.append((y + lift, start, start + width))
        note = ax.annotate(
            name,
            (row["difference"], row["change"]),
            xytext=(-4 if left else 4, 2 + lift * 300),
            textcoords="offset points",
            fontsize=SMALL - 0.5,
            horizontalalignment="right" if left else "left",
        )
        note.set_path_effects([withStroke(linewidth=2, foreground="white")])
