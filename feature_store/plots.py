"""Pictures of features, in the manner of scanpy: a function draws one plot, takes show=, save=, ax=, and returns the
axes.

matplotlib is imported at the first plot (0.5 s), never at import of the package; no display is needed. `save` writes
a file (format by its suffix, 200 dots per inch) and closes the figure; `show=True` opens a window or shows it in a
notebook; with `ax` you draw into your own figure. Tables are those of the store (`features`, `feature_gene`), arrays
are CSR cell codes with `Labels`. Colours are Okabe and Ito's, which colour-blind readers tell apart. Cost: 0.1 to 0.4
s a picture.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.associations.classes import CLASSES
from feature_store.associations.inputs import Labels, Sparse
from feature_store.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLASS_COLOURS = dict(zip(CLASSES, ("#009E73", "#0072B2", "#D55E00", "#999999", "#CCCCCC"), strict=True))
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#999999"


class _Canvas(NamedTuple):
    """Axes to draw into, and whether the figure is ours to save, show and close."""

    figure: "Figure"
    ax: "Axes"
    own: bool


def dotplot(
    codes: Sparse,
    labels: Labels,
    features: Sequence[int],
    *,
    names: Sequence[str] | None = None,
    title: str | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Features x labels: colour is the mean code, scaled from the lowest to the highest label of each feature; size is
    the share of cells in which it fires.

    codes: CSR [n_cells n_features]; features: ids, one column each; names: what to write under them (default: the id).
    """
    columns = _features(codes, features)
    indicator = labels.one_hot()
    n_label = np.maximum(np.asarray(indicator.sum(axis=0)).ravel(), 1)[:, None]
    mean = (indicator.T @ columns).toarray() / n_label
    firing = (indicator.T @ (columns > 0).astype(np.float64)).toarray() / n_label
    # codes pooled by max over hundreds of tokens are rarely near zero: the range between labels is what differs
    lowest = mean.min(axis=0, keepdims=True)
    shade = (mean - lowest) / np.maximum(mean.max(axis=0, keepdims=True) - lowest, 1e-12)
    n_rows, n_columns = mean.shape
    canvas = _canvas(ax, (2.8 + 0.42 * n_columns + 0.08 * max(map(len, labels.names)), 1.6 + 0.36 * n_rows))
    x, y = np.meshgrid(np.arange(n_columns), np.arange(n_rows))
    dots = canvas.ax.scatter(
        x.ravel(),
        y.ravel(),
        s=8 + 210 * firing.ravel(),
        c=shade.ravel(),
        cmap="Reds",
        vmin=0,
        vmax=1,
        ec="#444444",
        lw=0.5,
    )
    canvas.ax.set_xticks(np.arange(n_columns), list(names or map(str, features)), rotation=90)
    canvas.ax.set_yticks(np.arange(n_rows), labels.names)
    canvas.ax.set_xlim(-0.7, n_columns - 0.3)
    canvas.ax.set_ylim(n_rows - 0.3, -0.7)
    canvas.ax.set_xlabel("feature")
    canvas.ax.set_title(title or f"Mean code by {_words(labels.kind)}")
    # both keys sit right of the axes, in inches, so that a wide plot does not stretch them
    width = canvas.ax.get_position().width * canvas.figure.get_figwidth()
    bar = canvas.figure.colorbar(dots, cax=canvas.ax.inset_axes((1 + 0.15 / width, 0.55, 0.14 / width, 0.4)))
    bar.set_label("mean code, 0 to 1 per feature", fontsize=8)
    sizes = [canvas.ax.scatter([], [], s=8 + 210 * f, c="#CCCCCC", ec="#444444", lw=0.5) for f in (0.1, 0.5, 1.0)]
    canvas.ax.legend(
        sizes,
        ["10 %", "50 %", "100 %"],
        title="cells firing",
        title_fontsize=8,
        fontsize=8,
        loc="upper left",
        bbox_to_anchor=(1 + 0.05 / width, 0.45),
        frameon=False,
    )
    return _finish(canvas, show, save)


def gene_bars(
    feature_gene: pl.DataFrame,
    feature_id: int,
    *,
    n: int = 15,
    split: str = "test",
    alpha: float = 0.05,
    show: bool | None = None,
    save: str | Path | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """The n genes of largest |Pearson| on `select`, with their Pearson on `split`; grey where q > alpha there."""
    mine = feature_gene.filter(pl.col("feature_id") == feature_id)
    strongest = mine.filter(pl.col("split") == "select").sort(pl.col("pearson").abs(), "gene", descending=[True, False])
    rows = mine.filter(pl.col("split") == split).join(strongest.head(n).select("gene"), on="gene", how="semi")
    if rows.is_empty():
        raise InputError(
            f"feature_gene has no row of feature {feature_id} on split {split!r}; look at its `feature_id`"
        )
    rows = rows.sort("pearson", "gene")
    canvas = _canvas(ax, (4.6, 1.2 + 0.26 * rows.height))
    value, q = rows["pearson"].to_numpy(), rows["q"].to_numpy()
    colour = np.where(q > alpha, _GREY, np.where(value > 0, _BLUE, _ORANGE))
    canvas.ax.barh(np.arange(rows.height), value, color=colour.tolist(), height=0.75)
    canvas.ax.set_yticks(np.arange(rows.height), rows["gene"].to_list(), style="italic")
    canvas.ax.axvline(0, color="black", lw=0.8)
    canvas.ax.set_xlabel(f"Pearson with expression ({split} cells)")
    canvas.ax.set_title(f"Genes of feature {feature_id}")
    _key(canvas.ax, {"positive": _BLUE, "negative": _ORANGE, f"q > {alpha:g}": _GREY}, set(colour.tolist()))
    return _finish(canvas, show, save)


def density_histogram(
    features: pl.DataFrame,
    *,
    show: bool | None = None,
    save: str | Path | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """How often features fire: log10 of the share of tokens, stacked by class; dead features are counted in the
    title.
    """
    alive = features.filter(pl.col("density") > 0)
    canvas = _canvas(ax, (5.4, 3.6))
    parts = {c: np.log10(alive.filter(pl.col("class") == c)["density"].to_numpy()) for c in CLASSES[:-1]}
    parts = {name: values for name, values in parts.items() if values.size}
    if parts:
        everything = np.concatenate(list(parts.values()))
        edges = np.linspace(np.floor(everything.min() * 4) / 4, min(0.0, np.ceil(everything.max() * 4) / 4) + 1e-9, 31)
        canvas.ax.hist(
            list(parts.values()),
            bins=edges.tolist(),
            stacked=True,
            color=[CLASS_COLOURS[name] for name in parts],
            label=[f"{name} ({values.size})" for name, values in parts.items()],
        )
        canvas.ax.legend(frameon=False)
    canvas.ax.set_xlabel("log10 density (share of tokens on which the feature fires)")
    canvas.ax.set_ylabel("features")
    canvas.ax.set_title(f"{features.height} features, {features.height - alive.height} dead")
    return _finish(canvas, show, save)


def batch_quadrant(
    features: pl.DataFrame,
    *,
    cell_effect: float = 0.1,
    n_named: int = 6,
    show: bool | None = None,
    save: str | Path | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Batch against cell context: the share of rank variance each explains given the other, a dot per feature, by
    class.

    The dashed lines are the class rule's threshold (`ClassConfig.cell_effect`); the n_named strongest of each axis
    carry their id.
    """
    canvas = _canvas(ax, (5.4, 4.6))
    for name in CLASSES[::-1]:
        part = features.filter((pl.col("class") == name) & ~pl.col("dead"))
        if part.height:
            canvas.ax.scatter(
                part["context_effect"], part["batch_effect"], s=14, alpha=0.75, color=CLASS_COLOURS[name], lw=0,
                label=f"{name} ({part.height})",
            )  # fmt: skip
    for line in (canvas.ax.axhline, canvas.ax.axvline):
        line(cell_effect, color="#666666", lw=0.8, ls="--")
    canvas.ax.set_xlabel("explained by cell context (within batches)")
    canvas.ax.set_ylabel("explained by batch (within cell types)")
    limit = max(0.3, *(float(features[a].max() or 0) for a in ("context_effect", "batch_effect"))) * 1.08  # type: ignore[arg-type]
    canvas.ax.set_xlim(-0.02 * limit, limit)
    canvas.ax.set_ylim(-0.02 * limit, limit)
    canvas.ax.set_title("Batch or biology?")
    _name_strongest(canvas.ax, features, cell_effect, n_named, limit)
    canvas.ax.legend(frameon=False, loc="upper right", markerscale=1.6)
    return _finish(canvas, show, save)


def embedding(
    coordinates: npt.NDArray[np.floating],
    codes: Sparse,
    feature_id: int,
    *,
    title: str | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """A feature's cell code on a 2-D embedding [n_cells 2]; silent cells are grey, the strongest are drawn last."""
    if coordinates.shape != (codes.shape[0], 2):
        raise InputError(f"embedding: coordinates are {coordinates.shape}, expected ({codes.shape[0]}, 2)")
    value = _features(codes, [feature_id]).toarray().ravel()
    order = np.argsort(value, kind="stable")
    fires = order[value[order] > 0]
    canvas = _canvas(ax, (5.0, 4.2))
    size = float(np.clip(20_000 / max(value.size, 1), 2, 28))
    silent = order[value[order] <= 0]
    canvas.ax.scatter(coordinates[silent, 0], coordinates[silent, 1], s=size, color="#DDDDDD", lw=0)
    dots = canvas.ax.scatter(
        coordinates[fires, 0], coordinates[fires, 1], s=size, c=value[fires], cmap="viridis_r", vmin=0, lw=0
    )
    canvas.figure.colorbar(dots, ax=canvas.ax, fraction=0.05, pad=0.02, shrink=0.7).set_label("cell code")
    canvas.ax.set_xticks([])
    canvas.ax.set_yticks([])
    canvas.ax.set_aspect("equal", adjustable="datalim")
    canvas.ax.spines[:].set_visible(False)
    canvas.ax.set_title(title or f"Feature {feature_id}: fires in {fires.size} of {value.size} cells")
    return _finish(canvas, show, save)


def violin(
    codes: Sparse,
    labels: Labels,
    feature_id: int,
    *,
    title: str | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """A feature's cell code by label, highest mean first: violins of the cells in which it fires, and the share that
    fires as text.
    """
    value = _features(codes, [feature_id]).toarray().ravel()
    groups = {name: value[labels.known & (labels.codes == i)] for i, name in enumerate(labels.names)}
    groups = dict(sorted(((n, v) for n, v in groups.items() if v.size), key=lambda item: -float(item[1].mean())))
    canvas = _canvas(ax, (1.6 + 0.62 * len(groups), 3.8 + 0.05 * max(map(len, groups))))
    top = max(float(value.max()), 1e-6)
    for i, values in enumerate(groups.values()):
        fires = values[values > 0]
        if np.unique(fires).size > 2:
            body = canvas.ax.violinplot([fires], positions=[i], widths=0.8, showextrema=False, showmedians=True)
            for shape in body["bodies"]:  # type: ignore[attr-defined]
                shape.set(facecolor=_BLUE, alpha=0.55)
            body["cmedians"].set(color="black")
        else:
            canvas.ax.scatter(np.full(fires.size, i), fires, s=10, color=_BLUE)
        canvas.ax.text(i, top * 1.07, f"{fires.size / values.size:.0%}", ha="center", fontsize=8)
    canvas.ax.set_xticks(
        np.arange(len(groups)), [f"{n} ({v.size})" for n, v in groups.items()], rotation=40, ha="right"
    )
    canvas.ax.set_ylim(0, top * 1.15)
    canvas.ax.set_ylabel("cell code where it fires\n(above: share of cells firing)")
    canvas.ax.set_title(title or f"Feature {feature_id} by {_words(labels.kind)}")
    return _finish(canvas, show, save)


def steering_bars(
    results: pl.DataFrame,
    *,
    effect: str = "effect",
    title: str | None = None,
    xlabel: str | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """An intervention beside its nulls: one bar per row with its interval.

    results: columns name (text), `effect`, low, high (the interval, null for none) and is_null (bool), in the order
    to be drawn.
    """
    missing = [c for c in ("name", effect, "low", "high", "is_null") if c not in results.columns]
    if missing:
        raise InputError(f"steering bars: no column {missing}; the table has {results.columns}")
    value, null = results[effect].to_numpy(), results["is_null"].to_numpy()
    low, high = (results[c].cast(pl.Float64).fill_null(results[effect]).to_numpy() for c in ("low", "high"))
    canvas = _canvas(ax, (5.6, 1.3 + 0.42 * results.height))
    y = np.arange(results.height)
    canvas.ax.barh(y, value, color=np.where(null, _GREY, _BLUE).tolist(), height=0.65)
    spread = np.stack([np.maximum(value - low, 0), np.maximum(high - value, 0)])
    known = spread.sum(axis=0) > 0
    canvas.ax.errorbar(value[known], y[known], xerr=spread[:, known], fmt="none", ecolor="black", capsize=3, lw=1.2)
    canvas.ax.axvline(0, color="black", lw=0.8)
    canvas.ax.set_yticks(y, results["name"].to_list())
    canvas.ax.invert_yaxis()
    canvas.ax.set_xlabel(xlabel or _words(effect))
    canvas.ax.set_title(title or "Steering against its nulls")
    _key(canvas.ax, {"intervention": _BLUE, "null": _GREY}, set(np.where(null, _GREY, _BLUE).tolist()))
    return _finish(canvas, show, save)


def _name_strongest(ax: "Axes", features: pl.DataFrame, threshold: float, n: int, limit: float) -> None:
    """Write the id (and label) beside the n strongest features of each axis; a name that would cover another is left
    out.
    """
    from matplotlib.patheffects import withStroke

    placed: list[tuple[float, float, float]] = []
    strongest = [
        features.filter(pl.col(axis) >= threshold).top_k(n, by=axis).sort(axis, "feature_id", descending=[True, False])
        for axis in ("batch_effect", "context_effect")
    ]
    for row in pl.concat(strongest).unique("feature_id", keep="first", maintain_order=True).iter_rows(named=True):
        text = str(row["feature_id"]) + (f" {row['top_label']}" if row["top_label"] and row["class"] != "batch" else "")
        x, y, width = row["context_effect"], row["batch_effect"], 0.016 * limit * len(text)
        left = x > 0.6 * limit
        start = x - width if left else x
        if any(
            abs(y - other) < 0.035 * limit and start < stop and begin < start + width for other, begin, stop in placed
        ):
            continue
        placed.append((y, start, start + width))
        note = ax.annotate(text, (x, y), xytext=(-4 if left else 4, 3), textcoords="offset points", fontsize=7)
        note.set_horizontalalignment("right" if left else "left")
        note.set_path_effects([withStroke(linewidth=2, foreground="white")])


def _features(codes: Sparse, features: Sequence[int]) -> Sparse:
    """The columns of some features as float64; InputError for an id that the codes do not have."""
    unknown = [f for f in features if not 0 <= f < codes.shape[1]]
    if unknown or not features:
        raise InputError(f"no feature {unknown or features}; the codes have features 0..{codes.shape[1] - 1}")
    return codes.tocsc()[:, list(features)].astype(np.float64)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _key(ax: "Axes", colours: dict[str, str], used: set[str]) -> None:
    """A legend of the colours in use, if there are two or more."""
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=name) for name, colour in colours.items() if colour in used]
    if len(handles) > 1:
        ax.legend(handles=handles, frameon=False, fontsize=8, loc="best")


def _canvas(ax: "Axes | None", size: tuple[float, float]) -> _Canvas:
    """The given axes, or new ones of `size` inches."""
    if ax is not None:
        figure = ax.get_figure(root=True)
        assert figure is not None
        return _Canvas(figure, ax, own=False)
    import matplotlib.pyplot as plt

    figure, new = plt.subplots(figsize=size, layout="constrained")
    new.spines[["top", "right"]].set_visible(False)
    return _Canvas(figure, new, own=True)


def _finish(canvas: _Canvas, show: bool | None, save: str | Path | None) -> "Axes":
    """Save, then show or close what is ours."""
    if save is not None:
        path = Path(save)
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.figure.savefig(path, dpi=200)
    if canvas.own and (show or save is not None):
        import matplotlib.pyplot as plt

        if show:
            plt.show()
        plt.close(canvas.figure)
    return canvas.ax


__all__ = [
    "CLASS_COLOURS",
    "batch_quadrant",
    "density_histogram",
    "dotplot",
    "embedding",
    "gene_bars",
    "steering_bars",
    "violin",
]
