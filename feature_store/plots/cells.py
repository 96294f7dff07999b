"""Plots of single cells: a feature or a label on the map of the cells, and a feature's code by label."""

from collections.abc import Sequence
from operator import index
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.cells import canonical_text
from feature_store.errors import InputError, NotFoundError
from feature_store.plots.canvas import (
    BLUE,
    GREY,
    LEGEND_ROWS,
    LIGHT_GREY,
    OKABE_ITO,
    PALE,
    SMALL,
    below,
    beside,
    canvas,
    check_file,
    finish,
    head,
    head_all,
    plain,
    words,
)
from feature_store.plots.inputs import cells_of, code_of, columns_named, name_of, read_cells, said

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from feature_store.plots.canvas import Save
    from feature_store.query.store import FeatureStore

GROUPS = ("cell_type", "batch")
_MARKERS = "o^sDvPX*"
_MOST_LABELS = len(_MARKERS) * len(OKABE_ITO)
_LEGEND = 34
"""Largest number of characters of a name in the legend."""
_FEW = 20
"""Up to this number of firing cells, each is drawn as a dot, because so few give no density."""


def umap(
    store: "FeatureStore",
    color: int | str | Sequence[int | str],
    *,
    split: str | None = "test",
    coordinates: npt.NDArray[np.floating] | None = None,
    show: bool | None = None,
    save: "Save | None" = None,
    ax: "Axes | None" = None,
) -> "list[Axes]":
    """Draw features (by id) and columns of the cell table on the map of the cells, one panel each.

    The colour of a feature is its cell code (in the unit of the codes). Cells of the split in which the feature does
    not fire, or whose label or number is missing, are grey, cells of other splits are pale, and the strongest cells are
    drawn last. `split` None draws all cells, including those that the autoencoder was trained on. The map is that of
    the store (`maps.cells`, which the first call computes and writes to the store in about 10 s) unless `coordinates`
    [n_cells 2] are given, for example `adata.obsm["X_umap"]`; cells at NaN are left out.

    Raises InputError for an unknown column and for coordinates of another shape, QueryError for an unknown feature.
    """
    given: list[Any] = [color] if np.ndim(color) == 0 else list(color)  # type: ignore[arg-type]
    wanted = [columns_named(store, by)[0] if isinstance(by, str) else index(by) for by in given]
    check_file(save)
    if not wanted:
        raise InputError("nothing to colour the cells by; give a feature, 17, or a column of the cells, 'cell_type'")
    points = _points(store, coordinates)
    shown = cells_of(store, split, *(name for name in wanted if isinstance(name, str)))
    inside = points.join(shown, on="cell_idx", maintain_order="left")
    if inside.is_empty():
        raise InputError(f"no cell of the split {split!r} is on the map; give another split")
    outside = points.join(shown, on="cell_idx", how="anti")
    values = [code_of(store, by, inside) if isinstance(by, int) else inside[by] for by in wanted]
    width = max(4.4 if isinstance(value, np.ndarray) or value.dtype.is_numeric() else _width(value) for value in values)
    drawn = canvas(ax, (width, 4.0), show=show, save=save, n_panels=len(values))
    for panel, by, value in zip(drawn.axes, wanted, values, strict=True):
        size = float(np.clip(12_000 / inside.height, 2, 26))
        others = panel.scatter(outside["x"], outside["y"], s=size / 2, color=PALE, lw=0, rasterized=True)
        keys = {f"cells of other splits ({outside.height})": others} if outside.height else {}
        xy = inside.select("x", "y").to_numpy()
        if isinstance(value, pl.Series) and not value.dtype.is_numeric():
            _draw_labels(panel, xy, value, size, keys)
            head(panel, f"{words(str(by))}\n{said(store, split)}")
        elif isinstance(value, pl.Series):
            number = value.cast(pl.Float64).fill_null(np.nan).to_numpy()
            _draw_values(panel, xy, number, size, words(str(by)), (~np.isfinite(number), "missing"), keys)
            head(panel, f"{words(str(by))}\n{said(store, split)}")
        else:
            _draw_values(panel, xy, value, size, "cell code", (value == 0, "does not fire"), keys)
            counted = (
                f"fires in {np.count_nonzero(value):,} of {value.size:,} {said(store, split).removeprefix('all ')}"
            )
            head(panel, f"{plain(name_of(store, int(by)))}\n{counted}")
        panel.set(xticks=[], yticks=[])
        panel.set_xlabel("UMAP 1", fontsize=SMALL)
        panel.set_ylabel("UMAP 2", fontsize=SMALL)
        panel.spines[:].set_visible(False)
    finish(drawn, store, show, save)
    return drawn.axes


def violin(
    store: "FeatureStore",
    feature: int,
    groupby: str | Sequence[str] | None = None,
    *,
    split: str | None = "test",
    show: bool | None = None,
    save: "Save | None" = None,
    ax: "Axes | None" = None,
) -> "list[Axes]":
    """Draw a feature's cell code by columns of the cell table, one panel each; the default is cell type and batch.

    Labels with the highest mean come first. A violin shows the cells in which the feature fires (as dots if there are
    few), and its line is their median. The text beside it gives the share of the label's cells in which the feature
    fires. Cells without a label are left out, and the title of the panel says how many.

    Raises InputError for an unknown column or one without labels, QueryError for an unknown feature.
    """
    named = [groupby] if isinstance(groupby, str) else groupby
    columns = _groups(store) if named is None else columns_named(store, *named)
    cells = cells_of(store, split, *columns)
    value = code_of(store, feature, cells)
    panels = {by: _grouped(value, cells[by], by, said(store, split)) for by in columns}
    n_rows = max(map(len, panels.values()))
    longest = max(len(plain(name)) for groups in panels.values() for name in groups)
    drawn = canvas(ax, (3.2 + 0.075 * longest, 1.4 + 0.3 * n_rows), show=show, save=save, n_panels=len(panels))
    bounds = (min(0.0, float(value.min())), max(float(value.max()), 1e-6))
    for panel, (by, groups) in zip(drawn.axes, panels.items(), strict=True):
        _draw_violins(panel, groups, bounds)
        panel.set_ylim(n_rows - 0.4, -0.6)
        n_without = cells[by].null_count()
        without = f" ({n_without} {'cells' if n_without > 1 else 'cell'} without one)" if n_without else ""
        panel.set_title(f"by {words(by)}{without}", fontsize=10, loc="left")
        panel.set_xlabel(f"cell code where it fires, {said(store, split)}", fontsize=9)
    what = "" if drawn.own else f" by {words(columns[0])}"
    head_all(drawn, f"Feature {plain(name_of(store, feature))}{what}")
    shown = [values[values != 0] for groups in panels.values() for values in groups.values()]
    _violin_key(drawn.axes[-1], any(map(_is_dense, shown)), any(v.size and not _is_dense(v) for v in shown))
    finish(drawn, store, show, save)
    return drawn.axes


def _points(store: "FeatureStore", coordinates: npt.NDArray[np.floating] | None) -> pl.DataFrame:
    """The cells that are on the map, as rows cell_idx, x, y."""
    cells = read_cells(store)
    if coordinates is not None:
        if coordinates.shape != (cells.height, 2):
            raise InputError(f"coordinates are {coordinates.shape}; a row for each cell is ({cells.height}, 2)")
        given = cells.select("cell_idx").with_columns(x=coordinates[:, 0], y=coordinates[:, 1])
        return given.filter(pl.col("x").is_finite() & pl.col("y").is_finite())
    if store.lineage.codes is None:
        raise NotFoundError(f"{store.layout.root} has no codes to map; `scsae encode {store.layout.store_option}`")
    from feature_store.maps.cells import cell_map

    return cell_map(store.layout, store.lineage.codes)


def _width(labels: pl.Series) -> float:
    """The width in inches of a panel with a legend of these labels, and of the cells that are missing or others."""
    names = canonical_text(labels.unique()).drop_nulls().to_list()
    longest = max((len(plain(name, _LEGEND)) for name in names), default=0)
    return 3.6 + (0.7 + 0.07 * max(longest, 21)) * -(-(min(len(names), _MOST_LABELS) + 2) // LEGEND_ROWS)


def _draw_values(
    ax: "Axes",
    xy: npt.NDArray[Any],
    value: npt.NDArray[np.float64],
    size: float,
    unit: str,
    grey: tuple[npt.NDArray[np.bool_], str],
    keys: dict[str, Any],
) -> None:
    """Draw dots coloured by value, the largest last and those of `grey` first, which the key names; signed colours
    centre on 0, with rims, because 0 is white.
    """
    silent, above = np.flatnonzero(grey[0]), np.flatnonzero(~grey[0])
    signed = bool((value[above] < 0).any())
    above = above[np.argsort(np.abs(value[above]), kind="stable")]
    top = float(np.abs(value[above]).max()) if above.size else 1.0
    quiet = ax.scatter(xy[silent, 0], xy[silent, 1], s=size, color=LIGHT_GREY, lw=0, rasterized=True)
    dots = ax.scatter(
        xy[above, 0],
        xy[above, 1],
        s=size,
        c=value[above],
        cmap="RdBu_r" if signed else "viridis_r",
        vmin=-top if signed else 0,
        vmax=top,
        lw=0.3 if signed else 0,
        edgecolors=GREY,
        rasterized=True,
    )
    if above.size:
        bar = ax.figure.colorbar(dots, cax=ax.inset_axes((1.02, 0.15, 0.035, 0.7)))
        bar.set_label(unit, fontsize=9)
        bar.ax.tick_params(labelsize=SMALL)
    shown = ({f"{grey[1]} ({silent.size})": quiet} if silent.size else {}) | keys
    below(ax, shown, 0.25, ncols=2)


def _draw_labels(ax: "Axes", xy: npt.NDArray[Any], labels: pl.Series, size: float, keys: dict[str, Any]) -> None:
    """Draw dots by label, with eight colours by eight markers for the most frequent labels; the other labels, and cells
    without one, are two greys.
    """
    from matplotlib.lines import Line2D

    text = canonical_text(labels).alias("label")
    counts = text.drop_nulls().value_counts().sort("count", "label", descending=[True, False])
    names = counts["label"].to_list()
    named = names[: _MOST_LABELS - 1] if len(names) > _MOST_LABELS else names
    values = text.to_numpy()
    missing = text.is_null().to_numpy()
    rest = {"missing": (missing, LIGHT_GREY), "other labels": (~np.isin(values.astype(str), named) & ~missing, GREY)}
    more: dict[str, Any] = {}
    for name, (here, colour) in rest.items():
        dots = ax.scatter(xy[here, 0], xy[here, 1], s=size, color=colour, lw=0, rasterized=True)
        more |= {f"{name} ({here.sum()})": dots} if here.any() else {}
    more |= keys
    handles: list[Any] = []
    entries = []
    for i, name in enumerate(named):
        style = {"marker": _MARKERS[i // len(OKABE_ITO)], "color": OKABE_ITO[i % len(OKABE_ITO)]}
        here = values == name
        ax.scatter(xy[here, 0], xy[here, 1], s=size, lw=0, rasterized=True, **style)  # type: ignore[arg-type]
        handles.append(Line2D([], [], ls="", ms=5, **style))  # type: ignore[arg-type]
        entries.append(f"{plain(name, _LEGEND)} ({int(here.sum())})")
    beside(ax, [*handles, *more.values()], [*entries, *more], handletextpad=0.1)


def _groups(store: "FeatureStore") -> list[str]:
    """The columns to group by if none is given: cell type and batch, as far as they have labels."""
    cells = read_cells(store, *GROUPS)
    found = [name for name in GROUPS if cells[name].null_count() < cells.height]
    if not found:
        raise InputError(
            "the cells have neither cell types nor batches; name another column to group by, or extract them with "
            "`scsae extract DATA --cell-type COLUMN`"
        )
    return found


def _grouped(
    value: npt.NDArray[np.float64], labels: pl.Series, by: str, cells: str
) -> dict[str, npt.NDArray[np.float64]]:
    """The values of each label, the label with the highest mean first; `cells` says which cells they are of."""
    frame = pl.DataFrame({"label": canonical_text(labels), "value": value}).drop_nulls("label")
    if frame.is_empty():
        raise InputError(f"no cell has a value in the column {by!r} ({cells}); name another")
    groups = {str(name): part["value"].to_numpy() for (name,), part in frame.group_by("label", maintain_order=True)}
    return dict(sorted(groups.items(), key=lambda item: (-float(item[1].mean()), item[0])))


def _draw_violins(ax: "Axes", groups: dict[str, npt.NDArray[np.float64]], bounds: tuple[float, float]) -> None:
    low, high = bounds
    for i, values in enumerate(groups.values()):
        fires = values[values != 0]
        if _is_dense(fires):
            body = ax.violinplot(
                [fires], positions=[i], widths=0.82, showextrema=False, showmedians=True, orientation="horizontal"
            )
            for shape in body["bodies"]:  # type: ignore[attr-defined]
                shape.set(facecolor=BLUE, alpha=0.55)
            body["cmedians"].set(color="black")
        else:
            ax.scatter(fires, np.full(fires.size, i), s=12, color=BLUE, alpha=0.7, lw=0)
        ax.text(
            1.02, i, f"{fires.size / values.size:.0%}", va="center", fontsize=SMALL, transform=ax.get_yaxis_transform()
        )
    ax.text(1.02, -0.75, "cells\nfiring", va="bottom", fontsize=SMALL, transform=ax.get_yaxis_transform())
    ax.set_yticks(range(len(groups)), [f"{plain(n)} ({v.size})" for n, v in groups.items()], fontsize=9)
    ax.set_xlim(low * 1.05, high * 1.05)


def _is_dense(fires: npt.NDArray[np.float64]) -> bool:
    """Whether the values of the firing cells are so many, and so different, that they have a density."""
    return bool(fires.size > _FEW and np.ptp(fires) > 1e-9 * np.abs(fires).max())


def _violin_key(ax: "Axes", any_violins: bool, any_dots: bool) -> None:
    """Draw a legend of the marks of the violins below the last panel."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    line: Any = {"ls": "", "marker": "|", "color": "black", "ms": 9}
    shown: dict[str, Any] = {}
    if any_violins:
        shown = {"density of the firing cells": Patch(color=BLUE, alpha=0.55), "their median": Line2D([], [], **line)}
    if any_dots:
        shown[f"a firing cell (of at most {_FEW})"] = Line2D([], [], ls="", marker="o", ms=4, color=BLUE)
    below(ax, shown, 0.5)
