"""Plots of all features: their densities, and the shares of variance that batch and cell context explain."""

from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from feature_store.errors import InputError
from feature_store.plots.canvas import CLASS_COLOURS, GREY, beside, canvas, finish, head, name_dots, plain
from feature_store.plots.inputs import of_panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from feature_store.plots.canvas import Save
    from feature_store.query.store import FeatureStore

_EFFECTS = ("context_effect", "batch_effect")


def density_histogram(
    store: "FeatureStore",
    *,
    show: bool | None = None,
    save: "Save | None" = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """A histogram of feature density, log10 of the share of tokens, stacked by class; the title gives the number of
    dead features.
    """
    features = store.frame("features").select("feature_id", "density", "class").collect()
    alive = features.filter(pl.col("density") > 0)
    drawn = canvas(ax, (5.8, 3.5), show=show, save=save)
    parts = {name: np.log10(alive.filter(pl.col("class") == name)["density"].to_numpy()) for name in _classes(alive)}
    if parts:
        everything = np.concatenate(list(parts.values()))
        edges = np.linspace(np.floor(everything.min() * 4) / 4, min(0.0, np.ceil(everything.max() * 4) / 4) + 1e-9, 31)
        bars = drawn.ax.hist(
            list(parts.values()),
            bins=edges.tolist(),
            stacked=True,
            color=[CLASS_COLOURS.get(name, GREY) for name in parts],
        )[2]
        handles: list[Any] = [bars] if len(parts) == 1 else list(bars)  # type: ignore[arg-type]
        beside(drawn.ax, handles, [f"{plain(name)} ({values.size})" for name, values in parts.items()])
    else:
        drawn.ax.text(0.5, 0.5, "no feature fires", ha="center", transform=drawn.ax.transAxes)
    drawn.ax.set_xlabel("log10 density (share of tokens on which the feature fires)", fontsize=9)
    drawn.ax.set_ylabel("features", fontsize=9)
    head(drawn.ax, f"{features.height} features, {features.height - alive.height} dead{of_panel(store)}")
    finish(drawn, store, show, save)
    return drawn.ax


def batch_quadrant(
    store: "FeatureStore",
    *,
    cell_effect: float = 0.1,
    n_named: int = 6,
    show: bool | None = None,
    save: "Save | None" = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """A scatter plot of batch effect against context effect, the share of rank variance that each explains given the
    other, with one dot per feature, coloured by class.

    The dashed lines are the class rule's threshold (`ClassConfig.cell_effect`). The n_named strongest features of each
    axis are marked with their id, and with their label where there is room. Both effects are measured on the cells that
    are not `test` cells, as the classes are. Raises InputError for a data set without batches.
    """
    known = store.frame("features").collect_schema().names()
    if missing := [name for name in _EFFECTS if name not in known]:
        raise InputError(
            f"the features have no column {', '.join(missing)}; run `scsae associate {store.layout.store_option}`"
        )
    features = store.frame("features").filter(~pl.col("dead")).collect().drop_nulls(_EFFECTS)
    _refuse_without_groups(store)
    limit = max(0.3, *(float(features[name].max() or 0) for name in _EFFECTS)) * 1.08  # type: ignore[arg-type]
    drawn = canvas(ax, (6.6, 4.6), show=show, save=save)
    handles: list[Any] = []
    names = []
    for name in _classes(features)[::-1]:
        part = features.filter(pl.col("class") == name)
        handles.append(
            drawn.ax.scatter(
                part["context_effect"],
                part["batch_effect"],
                s=14,
                alpha=0.75,
                color=CLASS_COLOURS.get(name, GREY),
                lw=0,
            )
        )
        names.append(f"{plain(name)} ({part.height})")
    thresholds = [line(cell_effect, color="#666666", lw=0.8, ls="--") for line in (drawn.ax.axhline, drawn.ax.axvline)]
    drawn.ax.set_xlabel("explained by cell context (within batches)", fontsize=9)
    drawn.ax.set_ylabel("explained by batch (within cell types)", fontsize=9)
    drawn.ax.set_xlim(-0.02 * limit, limit)
    drawn.ax.set_ylim(-0.02 * limit, limit)
    head(drawn.ax, f"Batch or biology?\nshare of rank variance explained, train and select cells{of_panel(store)}")
    handles, names = [*handles[::-1], thresholds[0]], [*names[::-1], f"threshold of the classes ({cell_effect:g})"]
    beside(drawn.ax, handles, names, markerscale=1.6)
    _name_strongest(drawn.ax, features, cell_effect, n_named)
    finish(drawn, store, show, save)
    return drawn.ax


def _classes(features: pl.DataFrame) -> list[str]:
    """The classes that occur, in the order of `CLASS_COLOURS`."""
    order = {name: i for i, name in enumerate(CLASS_COLOURS)}
    found = features["class"].drop_nulls().unique().to_list()
    return sorted(found, key=lambda name: (order.get(name, len(order)), name))


def _refuse_without_groups(store: "FeatureStore") -> None:
    """Raise InputError if the store has no batches or no cell labels, so that one of the two axes is not defined."""
    cells = store.frame("cells").select(pl.col("batch", "cell_type").n_unique(), n=pl.len()).collect()
    if cells["batch"][0] < 2:
        raise InputError(
            "the cells are of one batch, or their batch is unknown: there is nothing to hold against cell context; "
            "name the column with `scsae extract DATA --batch COLUMN`"
        )


def _name_strongest(ax: "Axes", features: pl.DataFrame, threshold: float, n: int) -> None:
    """Write the id, and the label where there is room, beside the n strongest features of each axis."""
    strongest = [
        features.filter(pl.col(axis) >= threshold).top_k(n, by=axis).sort(axis, "feature_id", descending=[True, False])
        for axis in ("batch_effect", "context_effect")
    ]
    names = []
    for row in pl.concat(strongest).unique("feature_id", keep="first", maintain_order=True).iter_rows(named=True):
        label = f" {plain(row['top_label'], 24)}" if row["top_label"] and row["class"] != "batch" else ""
        texts = [f"{row['feature_id']}{label}", str(row["feature_id"])]
        names.append((row["context_effect"], row["batch_effect"], texts))
    name_dots(ax, names)
