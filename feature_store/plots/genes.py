"""Bar plots of one feature: its genes and gene sets, the genes that make it fire, and what it does to predictions; and
of one gene: its features.
"""

from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.errors import InputError
from feature_store.plots.canvas import BLUE, GREY, ORANGE, PALE, SMALL, canvas, finish, head, key, plain, words
from feature_store.plots.inputs import check_split, name_of, said
from feature_store.query.suggestions import did_you_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from feature_store.plots.canvas import Save
    from feature_store.query.store import FeatureStore

_LEAST_Q = 1e-300


def gene_bars(
    store: "FeatureStore",
    feature: int,
    *,
    n: int = 15,
    split: str = "test",
    alpha: float = 0.05,
    show: bool | None = None,
    save: "Save | None" = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """A bar plot of the n genes with the largest |Pearson| on `select` cells, by their Pearson on `split`.

    Pearson's correlation is that of the feature's cell code with expression, log1p(CP10k). A bar is grey if q > alpha
    on the split. Raises InputError for a feature without tested genes.
    """
    mine = _of_feature(store, "feature_gene", feature, split)
    order = [pl.col("pearson").abs(), pl.col("gene")]
    strongest = mine.filter((pl.col("split") == "select") & pl.col("pearson").is_not_null())
    named = strongest.sort(order, descending=[True, False]).head(n).select("gene")
    rows = mine.filter(pl.col("split") == split).join(named, on="gene", how="semi").drop_nulls("pearson")
    rows = rows.sort("pearson", "gene", descending=[True, False])
    drawn = canvas(ax, (4.8, 1.2 + 0.25 * rows.height), show=show, save=save)
    significant = _draw_correlations(drawn.ax, rows, alpha)
    drawn.ax.set_yticks(range(rows.height), [plain(gene, 24) for gene in rows["gene"]], style="italic", fontsize=9)
    drawn.ax.set_xlabel(f"Pearson with expression, {said(store, split)}", fontsize=9)
    head(drawn.ax, f"Genes of feature {feature}{_nothing(significant, 'gene', alpha)}")
    finish(drawn, store, show, save)
    return drawn.ax


def gene_features(
    store: "FeatureStore",
    gene: str,
    *,
    n: int = 15,
    split: str = "test",
    alpha: float = 0.05,
    show: bool | None = None,
    save: "Save | None" = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """A bar plot of the features of a gene: the n with the largest |Pearson| on `select` cells, by that on `split`.

    The gene may be given by another name of it (CD20); the title gives the name in the store. A bar is grey if q >
    alpha on the split. Raises QueryError for an unknown gene, InputError for one that no feature was tested for.
    """
    check_split(split)
    (symbol,) = store.meant_by("gene", gene).names
    mine = store.frame("feature_gene").filter(pl.col("gene") == symbol).drop_nulls("pearson").collect()
    order = [pl.col("pearson").abs(), pl.col("feature_id")]
    strongest = mine.filter(pl.col("split") == "select").sort(order, descending=[True, False]).head(n)
    rows = mine.filter(pl.col("split") == split).join(strongest.select("feature_id"), on="feature_id", how="semi")
    if rows.is_empty():
        raise InputError(
            f"no feature was tested for {symbol} on select and on {split} cells; "
            f"`scsae features --gene {symbol} {store.layout.store_option}` lists its features"
        )
    rows = rows.sort("pearson", "feature_id", descending=[True, False])
    drawn = canvas(ax, (5.2, 1.2 + 0.25 * rows.height), show=show, save=save)
    significant = _draw_correlations(drawn.ax, rows, alpha)
    names = [plain(name_of(store, feature)) for feature in rows["feature_id"]]
    drawn.ax.set_yticks(range(rows.height), names, fontsize=9)
    drawn.ax.set_xlabel(f"Pearson with expression of {plain(symbol, 24)}, {said(store, split)}", fontsize=9)
    head(drawn.ax, f"Features of {plain(symbol)}{_nothing(significant, 'feature', alpha)}")
    finish(drawn, store, show, save)
    return drawn.ax


def geneset_bars(
    store: "FeatureStore",
    feature: int,
    *,
    collection: str | None = None,
    n: int = 10,
    split: str = "test",
    alpha: float = 0.05,
    show: bool | None = None,
    save: "Save | None" = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """A bar plot of the n gene sets with the smallest p on `select` cells, by -log10 q of enrichment on `split`.

    The text beside each bar gives the number of the feature's genes in the set, of the set's detected genes. The line
    is at alpha, and bars that do not reach it are grey. `collection` takes the sets of one file. Raises InputError for
    a feature without overlap.
    """
    mine = _of_feature(store, "feature_geneset", feature, split)
    if collection is not None:
        known = sorted(mine["collection"].unique().to_list())
        if collection not in known:
            raise InputError(
                f"no collection {collection!r}{did_you_mean(collection, known)}; there are {', '.join(known)}"
            )
        mine = mine.filter(pl.col("collection") == collection)
    keys = ["collection", "gene_set"]
    chosen = mine.filter((pl.col("split") == "select") & (pl.col("overlap") > 0)).sort("p", *keys).head(n)
    rows = chosen.select(keys).join(mine.filter(pl.col("split") == split), on=keys, maintain_order="left")
    if rows.is_empty():
        raise InputError(
            f"feature {feature} shares no gene with any set on select cells; see its genes with `scsae plot gene-bars`"
        )
    from matplotlib.patheffects import withStroke

    q = rows["q"].cast(pl.Float64).fill_null(1.0).to_numpy()
    height = -np.log10(np.clip(q, _LEAST_Q, 1.0))
    y = np.arange(rows.height)
    drawn = canvas(ax, (5.6, 1.3 + 0.27 * rows.height), show=show, save=save)
    colours = np.where(q <= alpha, BLUE, GREY).tolist()
    drawn.ax.barh(y, height, color=colours, height=0.7)
    top = max(float(height.max()), -np.log10(alpha)) * 1.02
    for i, (overlap, n_set) in enumerate(rows.select("overlap", "n_set").iter_rows()):
        note = drawn.ax.text(height[i] + 0.015 * top, i, f"{overlap}/{n_set}", va="center", fontsize=SMALL)
        note.set_path_effects([withStroke(linewidth=2, foreground="white")])
    several = rows["collection"].n_unique() > 1
    names = [f"{name} ({file})" if several else name for file, name in rows.select(keys).iter_rows()]
    drawn.ax.set_yticks(y, [words(name) for name in names], fontsize=9)
    drawn.ax.set_ylim(rows.height - 0.4, -0.6)
    drawn.ax.set_xlim(0, top * 1.12)
    line = drawn.ax.axvline(-np.log10(alpha), color="black", lw=0.8, ls="--")
    drawn.ax.set_xlabel(f"-log10 q, {said(store, split)} (genes shared / in the set)", fontsize=9)
    head(drawn.ax, f"Gene sets of feature {plain(name_of(store, feature))}{_nothing(q <= alpha, 'gene set', alpha)}")
    key(drawn.ax, {f"q ≤ {alpha:g}": BLUE, f"q > {alpha:g}": GREY}, set(colours), {f"q = {alpha:g}": line})
    finish(drawn, store, show, save)
    return drawn.ax


def effect_bars(
    store: "FeatureStore",
    feature: int,
    *,
    intervention: Literal["ablate", "boost"] = "ablate",
    n: int = 15,
    alpha: float = 0.05,
    show: bool | None = None,
    save: "Save | None" = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """A bar plot of what a feature does to the predictions of hidden genes: the n genes with the smallest p.

    The band behind a bar is the null, its mean and twice its standard deviation on both sides: what other directions
    of the same step length do to the gene. A bar is grey if q > alpha. Effects are of the newest run that has the
    feature. Raises InputError for a feature of which none was measured.
    """
    rows = store.frame("feature_effect").filter(
        (pl.col("feature_id") == feature) & (pl.col("intervention") == intervention)
    )
    found = rows.collect()
    if found.is_empty():
        raise InputError(
            f"no effect of feature {feature} ({intervention}) was measured: `scsae effects --feature {feature} --store "
            f"{store.layout.root}` measures it"
        )
    newest = found.filter(pl.col("run") == found["run"][0])
    shown = newest.sort("p", pl.col("z").abs(), "gene", descending=[False, True, False]).head(n)
    shown = shown.sort("effect", "gene", descending=[True, False])
    drawn = canvas(ax, (4.8, 1.4 + 0.25 * shown.height), show=show, save=save)
    effect, mean, sd, q = (shown[name].to_numpy() for name in ("effect", "null_mean", "null_sd", "q"))
    colours = np.where(~(q <= alpha), GREY, np.where(effect > 0, BLUE, ORANGE)).tolist()
    y = np.arange(shown.height)
    drawn.ax.barh(y, 4 * sd, left=mean - 2 * sd, color=PALE, height=0.9)
    drawn.ax.barh(y, effect, color=colours, height=0.5)
    drawn.ax.set_yticks(y, [plain(gene, 24) for gene in shown["gene"]], style="italic", fontsize=9)
    drawn.ax.set_ylim(shown.height - 0.4, -0.6)
    drawn.ax.axvline(0, color="black", lw=0.8)
    drawn.ax.set_xlabel(f"change of the prediction, {said(store, 'test')}", fontsize=9)
    done = {"ablate": "Ablating", "boost": "Boosting"}[intervention]
    head(drawn.ax, f"{done} feature {plain(name_of(store, feature))}{_nothing(q <= alpha, 'gene', alpha)}")
    key(
        drawn.ax,
        {"up": BLUE, "down": ORANGE, f"q > {alpha:g}": GREY, "null ± 2 sd": PALE},
        {*colours, PALE},
    )
    finish(drawn, store, show, save, ("effects", found["run"][0]))
    return drawn.ax


def input_bars(
    store: "FeatureStore",
    feature: int,
    *,
    n: int = 15,
    alpha: float = 0.05,
    show: bool | None = None,
    save: "Save | None" = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """A bar plot of the genes that make a feature fire: the n genes with the smallest p by one of the two paths.

    A bar is the share of the feature's sum over a cell that leaving the gene out takes: on the gene's own token, and on
    the other tokens, which follows at its end, or to the left of 0 where other tokens rise. The band behind the second
    is its null, the mean of null genes and twice their standard deviation on both sides. A part is grey if q > alpha.
    Shares are of the newest run that has the feature. Raises InputError for a feature of which none was measured.
    """
    found = store.frame("feature_input").filter(pl.col("feature_id") == feature).collect()
    if found.is_empty():
        raise InputError(
            f"no input of feature {feature} was measured: `scsae inputs --feature {feature} --store "
            f"{store.layout.root}` measures it"
        )
    newest = found.filter(pl.col("run") == found["run"][0])
    own, other = (newest.filter(pl.col("path") == path) for path in ("own token", "other tokens"))
    both = own.join(other, on="gene", suffix="_other").with_columns(whole=pl.col("share") + pl.col("share_other"))
    shown = both.sort(pl.min_horizontal("p", "p_other"), pl.col("whole").abs(), "gene", descending=[False, True, False])
    shown = shown.head(n).sort("whole", "gene", descending=[True, False])
    drawn = canvas(ax, (4.8, 1.4 + 0.25 * shown.height), show=show, save=save)
    share, share_other, mean, sd = (
        shown[name].cast(pl.Float64).fill_null(np.nan).to_numpy()
        for name in ("share", "share_other", "null_mean_other", "null_sd_other")
    )
    is_own, is_other = (shown[name].to_numpy() <= alpha for name in ("q", "q_other"))
    start, y = np.where(share_other > 0, share, 0.0), np.arange(shown.height)
    parts = [np.where(is_own, BLUE, GREY).tolist(), np.where(is_other, ORANGE, GREY).tolist()]
    drawn.ax.barh(y, 4 * sd, left=start + mean - 2 * sd, color=PALE, height=0.9)
    drawn.ax.barh(y, share, color=parts[0], height=0.5, edgecolor="white", linewidth=0.5)
    drawn.ax.barh(y, share_other, left=start, color=parts[1], height=0.5, edgecolor="white", linewidth=0.5)
    drawn.ax.set_yticks(y, [plain(gene, 24) for gene in shown["gene"]], style="italic", fontsize=9)
    drawn.ax.set_ylim(shown.height - 0.4, -0.6)
    drawn.ax.axvline(0, color="black", lw=0.8)
    drawn.ax.set_xlabel(f"share of the feature's sum, {said(store, 'test')}", fontsize=9)
    significant = is_own | is_other
    head(drawn.ax, f"Inputs of feature {plain(name_of(store, feature))}{_nothing(significant, 'gene', alpha)}")
    key(
        drawn.ax,
        {"own token": BLUE, "other tokens": ORANGE, f"q > {alpha:g}": GREY, "null of other tokens ± 2 sd": PALE},
        {*parts[0], *parts[1], PALE},
    )
    finish(drawn, store, show, save, ("inputs", found["run"][0]))
    return drawn.ax


def _draw_correlations(ax: "Axes", rows: pl.DataFrame, alpha: float) -> npt.NDArray[np.bool_]:
    """Draw the column `pearson` as bars, the first on top, grey where q > alpha; return which are significant."""
    value, q = (rows[name].cast(pl.Float64).fill_null(np.nan).to_numpy() for name in ("pearson", "q"))
    colours = np.where(~(q <= alpha), GREY, np.where(value > 0, BLUE, ORANGE)).tolist()
    ax.barh(np.arange(rows.height), value, color=colours, height=0.75)
    ax.set_ylim(rows.height - 0.4, -0.6)
    ax.axvline(0, color="black", lw=0.8)
    key(ax, {"positive": BLUE, "negative": ORANGE, f"q > {alpha:g}": GREY}, set(colours))
    return q <= alpha


def _nothing(significant: npt.NDArray[np.bool_], what: str, alpha: float) -> str:
    """A line for the title where nothing that is drawn is significant."""
    return "" if significant.any() else f"\nno {what} at q ≤ {alpha:g}"


def _of_feature(store: "FeatureStore", table: str, feature: int, split: str) -> pl.DataFrame:
    check_split(split)
    found = store.frame(table).filter(pl.col("feature_id") == feature).collect()
    if found.filter(pl.col("split") == split).is_empty():
        known = store.frame(table).select(pl.col("feature_id").n_unique()).collect().item()
        raise InputError(
            f"{table} has no row of feature {feature} on split {split!r}; {known} features have some: "
            f"`scsae sql 'SELECT DISTINCT feature_id FROM {table}'` lists them"
        )
    return found
