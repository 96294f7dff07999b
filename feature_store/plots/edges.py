"""The features before and after one feature, as a small graph."""

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from feature_store.errors import InputError
from feature_store.plots.canvas import BLUE, GREY, ORANGE, SMALL, canvas, finish, head, key, plain
from feature_store.plots.inputs import name_of
from feature_store.query.edges import SIDES, edges_beside, site_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from feature_store.plots.canvas import Save
    from feature_store.query.store import FeatureStore

_ROOM = 0.55
"""Length of a line, in units of the width between the feature and the names of the others."""


def edge_graph(
    store: "FeatureStore",
    feature: int,
    *,
    n: int = 8,
    alpha: float = 0.05,
    show: bool | None = None,
    save: "Save | None" = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """A graph of the features of earlier layers that change a feature (left), and those that it changes (right).

    They are the n edges of smallest p on each side; a side of which none was measured is left out. A line is as wide as
    |z| is large, blue where the earlier feature excites the later one, orange where it inhibits it, and grey and dashed
    where q > alpha. Raises InputError for a feature without an edge.
    """
    sides = {side: edges_beside(store, side, n=n, feature=feature) for side in SIDES}
    most = max(rows.height for rows in sides.values())
    if not most:
        raise InputError(
            f"no edge of feature {feature} was measured: `scsae circuit --store "
            f"{store.layout.root}` measures those between two SAEs of one model"
        )
    drawn = canvas(ax, (7.6, 1.2 + 0.32 * most), show=show, save=save)
    largest = max(
        float(np.nanmax(np.abs(rows["z"].cast(float).fill_null(0)))) for rows in sides.values() if rows.height
    )
    colours = set()
    for side, rows in sides.items():
        sign, align = (-1, "right") if side == "upstream" else (1, "left")
        for i, row in enumerate(rows.iter_rows(named=True)):
            y = (rows.height - 1) / 2 - i
            is_clear = row["q"] <= alpha
            colour = GREY if not is_clear else BLUE if row["relation"] == "excites" else ORANGE
            colours.add(colour)
            x = np.linspace(0, _ROOM, 40)
            bend = (1 - np.cos(np.pi * np.clip((x - 0.15) / (_ROOM - 0.15), 0, 1))) / 2
            width = 0.8 + 3.2 * abs(row["z"] or 0) / max(largest, 1e-12)
            drawn.ax.plot(sign * x, y * bend, color=colour, lw=width, ls="-" if is_clear else "--", alpha=0.8)
            name = row["top_label"] or " ".join((row["top_genes"] or "").split(" ")[:2])
            text = plain(f"{row['other_feature_id']} {name}".strip(), 26)
            drawn.ax.text(
                sign * (_ROOM + 0.03), y, text, ha=align, va="center", fontsize=9, color="black" if is_clear else GREY
            )
        if rows.height:
            saes = rows["other_sae"].unique().sort().to_list()
            sites = [" ".join(filter(None, (sae, site_of(store, sae)))) for sae in saes]
            drawn.ax.text(
                sign * (_ROOM + 0.03),
                (rows.height - 1) / 2 + 0.8,
                ", ".join(sites),
                ha=align,
                fontsize=SMALL,
                color=GREY,
            )
    box = {"boxstyle": "round", "facecolor": "white", "edgecolor": BLUE}
    drawn.ax.text(0, 0, plain(name_of(store, feature), 18), ha="center", va="center", fontsize=9, bbox=box)
    # a side without an edge needs no room
    drawn.ax.set_xlim(
        *(sign * (1.05 if sides[side].height else 0.3) for sign, side in zip((-1, 1), SIDES, strict=True))
    )
    drawn.ax.set_ylim(-(most - 1) / 2 - 0.8, (most - 1) / 2 + 1.2)
    drawn.ax.axis("off")
    head(drawn.ax, f"Before and after feature {plain(name_of(store, feature))}, test cells")
    key(drawn.ax, {"excites": BLUE, "inhibits": ORANGE, f"q > {alpha:g}": GREY}, colours)
    of = store.frame("feature_edge").filter(
        (pl.col("from_feature_id") == feature) | (pl.col("to_feature_id") == feature)
    )
    finish(drawn, store, show, save, ("circuits", of.select("run").head(1).collect().item()))
    return drawn.ax
