"""The dot plot of features by labels: effect size, share of firing cells, and significance."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.associations.claims import NAMED_AT, holds_on_test
from feature_store.cells import canonical_text
from feature_store.errors import InputError
from feature_store.plots.canvas import SMALL, Canvas, canvas, finish, head, image_file, plain, words
from feature_store.plots.inputs import cells_of, check_split, code_of, name_of, said
from feature_store.query.suggestions import did_you_mean
from feature_store.storage.obs_columns import find_column, shown_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from feature_store.plots.canvas import Save
    from feature_store.query.store import FeatureStore

_SMALLEST, _RANGE = 16.0, 170.0
"""The area of a dot in square points is _SMALLEST + _RANGE * share of cells in which the feature fires."""
_PITCH = 0.34
"""Distance between neighbouring dots in inches."""
_LEAST_PITCH = 0.2
_SIGNIFICANT, _OTHER = "#000000", "#BBBBBB"


def dotplot(
    store: "FeatureStore",
    features: Sequence[int] | None = None,
    groupby: str = "cell_type",
    *,
    split: str = "test",
    alpha: float = 0.05,
    show: bool | None = None,
    save: "Save | None" = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """A dot plot of features by the labels of a kind that was tested (table `feature_label`).

    The colour is the rank-biserial correlation with the label, -1 to 1 (for batches within cell types). The size is the
    share of the label's cells in which the feature fires. A black rim means q <= alpha on the split, a grey rim that
    the association is not significant. A dot is missing if the pair was not tested, because the split has no cells of
    the label or no others. `features` None takes `best_features`.

    Raises InputError for a kind of label or a split without tests, and where no feature is given and none is
    significant for any label; QueryError for an unknown feature.
    """
    check_split(split)
    named, groupby = groupby, _kind_named(store, groupby)
    tested = store.frame("feature_label").filter(pl.col("label_kind") == groupby).collect()
    chosen = best_features(store, named)["feature_id"].to_list() if features is None else list(features)
    if features is None and not chosen:
        raise InputError(
            f"no label of kind {named!r} has a feature at {NAMED_AT} on test cells; name the features to draw with "
            "--feature"
        )
    rows = tested.filter((pl.col("split") == split) & pl.col("feature_id").is_in(chosen))
    if rows.is_empty():
        raise InputError(
            f"feature_label has no row of features {chosen} by {groupby} on split {split!r}; "
            f"see `scsae features --label LABEL --store {store.layout.root}`"
        )
    cells = cells_of(store, split, groupby)
    known = sorted(tested["label"].unique().to_list())
    labels = sorted(set(known) & set(canonical_text(cells[groupby]).drop_nulls()))
    of_label = _one_hot(cells[groupby], labels)
    firing = np.stack([of_label @ (code_of(store, f, cells) != 0) for f in chosen], axis=1).ravel()
    firing = firing / np.maximum(of_label.sum(axis=1), 1).repeat(len(chosen))
    grid = pl.DataFrame({"label": labels}).join(
        pl.DataFrame({"feature_id": pl.Series(chosen, dtype=pl.Int32)}), how="cross"
    )
    effects = grid.join(
        rows.select("label", "feature_id", "rank_biserial", "q"),
        on=["label", "feature_id"],
        how="left",
        maintain_order="left",
    )
    names = [plain(name_of(store, feature), 36) for feature in chosen]
    counts = of_label.sum(axis=1).astype(int)
    rows_named = [f"{plain(n)} ({c})" for n, c in zip(labels, counts, strict=True)]
    drawn = canvas(ax, (5.0, 5.0), show=show, save=save)
    if drawn.own:
        given = None if save is None else image_file(save).size
        _place(drawn, len(chosen), len(labels), max(map(len, names)), max(map(len, rows_named)), given)
    _draw(drawn.ax, effects.with_columns(firing=firing), (len(labels), len(chosen)), alpha)
    drawn.ax.set_xticks(range(len(chosen)), names, rotation=90, fontsize=9)
    drawn.ax.set_yticks(range(len(labels)), rows_named, fontsize=9)
    kind = words(groupby)
    best = f"Best feature of each {kind} by p on select cells, if {NAMED_AT} on test cells"
    what = best if features is None else f"Features by {kind}"
    head(drawn.ax, f"{what}\n{said(store, split)}{_absent(known, labels)}", loc="left", least=56)
    finish(drawn, store, show, save)
    return drawn.ax


def best_features(store: "FeatureStore", groupby: str = "cell_type") -> pl.DataFrame:
    """For each label the positively associated feature with the smallest p on `select` cells, as rows feature_id, label
    and p in the order of the labels, each feature once. A label whose feature is not significant on `test` cells has no
    row (`associations.claims`).
    """
    keys, kind = ["feature_id", "label"], find_column(groupby, _kinds(store))
    positive = store.frame("feature_label").filter(
        (pl.col("label_kind") == pl.lit(kind, pl.String)) & (pl.col("auroc") > 0.5)
    )
    on_select = positive.filter(pl.col("split") == "select").select(*keys, "p").collect()
    ranked = on_select.sort("p", "feature_id", nulls_last=True).unique("label", keep="first", maintain_order=True)
    named = ranked.join(positive.filter(holds_on_test()).select(keys).collect(), on=keys, how="semi")
    return named.sort("label").unique("feature_id", keep="first", maintain_order=True)


def _absent(known: list[str], shown: list[str]) -> str:
    """The labels without cells in the split, as a text for the title."""
    absent = [plain(label, 24) for label in known if label not in shown]
    listed = ", ".join(absent[:3]) + (f" and {len(absent) - 3} more" if len(absent) > 3 else "")
    return f" (none of {listed})" if absent else ""


def _kinds(store: "FeatureStore") -> list[str]:
    """The kinds of label that features were tested for."""
    kinds = store.frame("feature_label").select(pl.col("label_kind").unique().sort()).collect()["label_kind"]
    return [str(kind) for kind in kinds]


def _kind_named(store: "FeatureStore", name: str) -> str:
    """The kind of label that a name means. Raises InputError for one that was not tested."""
    kinds = _kinds(store)
    kind = find_column(name, kinds)
    if kind is None:
        known = [shown_name(one) for one in kinds]
        raise InputError(
            f"no label of kind {name!r} was tested{did_you_mean(name, known)}; kinds are {', '.join(known) or 'none'}: "
            "name them when extracting, `scsae extract DATA --cell-type COLUMN --label COLUMN`"
        )
    return kind


def _one_hot(column: pl.Series, labels: list[str]) -> npt.NDArray[np.float64]:
    """The indicator of each label [n_labels n_cells]."""
    text = canonical_text(column).fill_null("").to_numpy()
    return np.stack([text == label for label in labels]).astype(np.float64)


def _place(
    drawn: Canvas, n_columns: int, n_rows: int, below: int, beside: int, given: tuple[float, float] | None
) -> None:
    """Set the size of figure and axes from the numbers of dots, and of characters of the names below and beside.

    Raises InputError where a `given` size of the figure, in inches, has no room for the dots.
    """
    width, height = _PITCH * (n_columns + 0.4), _PITCH * (n_rows + 0.4)
    left, bottom = 0.4 + 0.075 * beside, max(0.4 + 0.075 * below, 2.6 - height)
    whole = (left + width + 1.9, bottom + height + 0.7)
    if given is not None:
        width, height = width + given[0] - whole[0], height + given[1] - whole[1]
        if min(width / (n_columns + 0.4), height / (n_rows + 0.4)) < _LEAST_PITCH:
            raise InputError(
                f"size was {given[0]:g} x {given[1]:g} inches, which has no room for {n_columns} features by {n_rows} "
                f"labels; give {whole[0]:.0f} x {whole[1]:.0f}, or none"
            )
        whole = given
    drawn.figure.set_layout_engine("none")
    drawn.figure.set_size_inches(*whole)
    drawn.ax.set_position((left / whole[0], bottom / whole[1], width / whole[0], height / whole[1]))


def _draw(ax: "Axes", dots: pl.DataFrame, shape: tuple[int, int], alpha: float) -> None:
    n_labels, n_features = shape
    y, x = (axis.ravel() for axis in np.indices(shape))
    effect, q = (dots[name].cast(pl.Float64).fill_null(np.nan).to_numpy() for name in ("rank_biserial", "q"))
    tested = np.isfinite(effect)
    firing = dots["firing"].to_numpy()[tested]
    drawn = ax.scatter(
        x[tested],
        y[tested],
        s=_SMALLEST + _RANGE * firing,
        c=effect[tested],
        cmap="RdBu_r",
        vmin=-1,
        vmax=1,
        edgecolors=np.where(q[tested] <= alpha, _SIGNIFICANT, _OTHER).tolist(),
        linewidths=np.where(q[tested] <= alpha, 1.1, 0.5).tolist(),
    )
    ax.set_xlim(-0.7, n_features - 0.3)
    ax.set_ylim(n_labels - 0.3, -0.7)
    _keys(ax, drawn, alpha)


def _keys(ax: "Axes", drawn: Any, alpha: float) -> None:
    """Draw both keys right of the axes, with sizes in inches, so that a large plot does not stretch them."""
    figure = ax.figure
    width = ax.get_position().width * figure.get_figwidth()  # type: ignore[union-attr]
    height = ax.get_position().height * figure.get_figheight()  # type: ignore[union-attr]
    bar = figure.colorbar(drawn, cax=ax.inset_axes((1 + 0.2 / width, 1 - 1.3 / height, 0.14 / width, 1.2 / height)))
    bar.set_label("rank-biserial", fontsize=SMALL)
    bar.set_ticks([-1, 0, 1])
    bar.ax.tick_params(labelsize=SMALL)
    entries = [(share, "#FFFFFF", _OTHER) for share in (0.1, 0.5, 1.0)] + [
        (0.5, "#FFFFFF", _SIGNIFICANT),
        (0.5, "#FFFFFF", _OTHER),
    ]
    handles = [
        ax.scatter(
            [],
            [],
            s=_SMALLEST + _RANGE * share,
            c=[face],
            edgecolors=rim,
            linewidths=1.1 if rim == _SIGNIFICANT else 0.5,
        )
        for share, face, rim in entries
    ]
    ax.legend(
        handles,
        ["10 % of cells fire", "50 %", "100 %", f"q ≤ {alpha:g}", f"q > {alpha:g}"],
        fontsize=SMALL,
        loc="upper left",
        bbox_to_anchor=(1 + 0.1 / width, 1 - 1.4 / height),
        frameon=False,
        labelspacing=0.7,
    )
