"""The genes that the model predicts in steered cells, against how these genes really differ."""

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from feature_store.errors import InputError
from feature_store.plots.canvas import BLUE, GREY, PALE, beside, canvas, finish, head, name_dots, plain
from feature_store.plots.steering.rows import title_of
from feature_store.query.steering import SteeringResults, steering_results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from feature_store.plots.canvas import Save
    from feature_store.query.store import FeatureStore

MIN_CELLS = 10
"""Cells in which a gene must have been predicted."""


def steering_head(
    store: "FeatureStore",
    run: str | None = None,
    *,
    n: int = 12,
    show: bool | None = None,
    save: "Save | None" = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """The change of masked-gene predictions in steered cells, against how these genes really differ.

    Each dot is a gene that was predicted in 10 cells or more: y is the change of its mean prediction, x the difference
    of its mean value between the cells that were moved toward and the target cells. The n genes of largest change are
    named, where there is room. The title gives the correlation, and in brackets that of the first draw of each null.

    Raises InputError for a run without predictions (`scsae steer --head` makes them).
    """
    results = steering_results(store, run)
    table = gene_predictions(store, results)
    conditions = table["condition"].unique(maintain_order=True).to_list()
    chosen = results.rows.filter("chosen")["condition"].to_list() if "chosen" in results.rows.columns else []
    name = next((one for one in chosen if one in conditions), conditions[0])
    correlations = {
        condition: _correlation(frame)
        for (condition,), frame in table.filter(pl.col("draw") == 0).group_by("condition", maintain_order=True)
    }
    genes = table.filter((pl.col("condition") == name) & (pl.col("draw") == 0) & (pl.col("n_cells") >= MIN_CELLS))
    genes = genes.drop_nulls(["change", "difference"])
    drawn = canvas(ax, (5.6, 4.4), show=show, save=save)
    strongest = genes.top_k(n, by=pl.col("change").abs())
    drawn.ax.axhline(0, color=PALE, lw=0.8, zorder=0)
    drawn.ax.axvline(0, color=PALE, lw=0.8, zorder=0)
    grey = drawn.ax.scatter(genes["difference"], genes["change"], s=9, color=GREY, lw=0, alpha=0.6, rasterized=True)
    blue = drawn.ax.scatter(strongest["difference"], strongest["change"], s=18, color=BLUE, lw=0)
    drawn.ax.set_xlabel("real difference: mean of reference cells less target cells", fontsize=9)
    drawn.ax.set_ylabel("change of the model's answer", fontsize=9)
    r = correlations.pop(name)
    nulls = ", ".join(f"{plain(other)} {value:.2f}" for other, value in correlations.items() if value is not None)
    measured = "" if r is None else f"r = {r:.2f} over {genes.height} genes"
    against = f" ({nulls})" if nulls else ""
    beside(
        drawn.ax,
        [blue, grey],
        [f"largest changes ({strongest.height})", f"other genes ({genes.height - strongest.height})"],
    )
    head(drawn.ax, f"{title_of(results)}\n{measured}{against}", least=64)
    names = strongest.select("difference", "change", "gene").iter_rows()
    name_dots(drawn.ax, [(x, y, [plain(gene, 18)]) for x, y, gene in names])
    finish(drawn, store, show, save, ("steering", results.run))
    return drawn.ax


def gene_predictions(store: "FeatureStore", results: SteeringResults) -> pl.DataFrame:
    """The rows of `steering_head` of a run. Raises InputError where there are none."""
    found = pl.DataFrame()
    if "steering_head" in store.tables():
        found = store.frame("steering_head").filter(pl.col("run") == results.run).collect()
    if found.is_empty():
        raise InputError(
            f"steering run {results.run} has no masked-gene predictions; run `scsae steer` with --head to make them"
        )
    return found


def _correlation(genes: pl.DataFrame) -> float | None:
    """Pearson correlation over the genes with MIN_CELLS cells; None for fewer than 3 genes or without variance."""
    both = genes.filter(pl.col("n_cells") >= MIN_CELLS).select("change", "difference").drop_nulls().to_numpy()
    if len(both) < 3 or not both.std(axis=0).all():
        return None
    return float(np.corrcoef(both.T)[0, 1])
