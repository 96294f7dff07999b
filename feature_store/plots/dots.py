"""The dot plot of features by labels: effect size, share of firing cells, and significance."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.associations.claims import ALPHA, NAMED_AT, holds_on_test
from feature_store.associations.feature_table import MIN_LABEL_CELLS
from feature_store.cells import canonical_text
from feature_store.errors import InputError
from feature_store.plots.canvas import GREY, SMALL, Canvas, canvas, finish, head, image_file, plain, words
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
_PALE = 0.2
"""Opacity of the dots of a label with fewer than MIN_LABEL_CELLS cells, whose effect is that of single cells."""
_PALE_FACE = "#F5DDDD"
_MOST_NAMED = 4
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
    the label or no others. Dots of a label with fewer than MIN_LABEL_CELLS cells of the split are pale. `features` None
    takes `best_features`, and the title names the labels for which there is none.

    Raises InputError for a kind of label or a split without tests, and where no feature is given and none is
    significant for any label; QueryError for an unknown feature.
    """
    check_split(split)
    named, groupby = groupby, _kind_named(store, groupby)
    tested = store.frame("feature_label").filter(pl.col("label_kind") == groupby).collect()
    confirmed = _confirmed(store, named) if features is None else None
    chosen = _each_once(confirmed)["feature_id"].to_list() if confirmed is not None else list(features or ())
    if features is None and not chosen:
        raise InputError(
            f"no label of kind {named!r} has a feature at {NAMED_AT} on test cells; name the features to draw with "
            "--feature"
        )
    rows = tested.filter((pl.col("split") == split) & pl.col("feature_id").is_in(chosen))
    if rows.is_empty():
        raise InputError(
            f"feature_label has no row of features {chosen} by {groupby} on split {split!r}; "
            f"see `scsae features --label LABEL {store.layout.store_option}`"
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
    is_rare = counts < MIN_LABEL_CELLS
    dots = effects.with_columns(firing=firing, is_rare=is_rare.repeat(len(chosen)))
    _draw(drawn.ax, dots, (len(labels), len(chosen)), alpha)
    drawn.ax.set_xticks(range(len(chosen)), names, rotation=90, fontsize=9)
    drawn.ax.set_yticks(range(len(labels)), rows_named, fontsize=9)
    for tick, is_pale in zip(drawn.ax.get_yticklabels(), is_rare, strict=True):
        tick.set_color(GREY if is_pale else "black")
    kind, cells_drawn = words(groupby), f"drawn on {said(store, split)}"
    title = f"Features by {kind}, {cells_drawn}"
    if confirmed is not None:
        title = f"The feature with the smallest p for each {kind} on select cells, {cells_drawn}"
        where = "" if split == "test" else " on test cells"
        # a label without cells is named below
        if none := [label for label in labels if label not in set(confirmed["label"])]:
            title += f"\nNone for {_listed(none)}: not confirmed at q ≤ {ALPHA:g}{where}"
    if absent := [label for label in known if label not in labels]:
        title += f"\nNo {split} cells of {_listed(absent)}"
    head(drawn.ax, title, loc="left", least=56)
    finish(drawn, store, show, save)
    return drawn.ax


def best_features(store: "FeatureStore", groupby: str = "cell_type") -> pl.DataFrame:
    """For each label the positively associated feature with the smallest p on `select` cells, as rows feature_id, label
    and p in the order of the labels, each feature once. A label whose feature is not significant on `test` cells has no
    row (`associations.claims`).
    """
    return _each_once(_confirmed(store, groupby))


def _each_once(confirmed: pl.DataFrame) -> pl.DataFrame:
    return confirmed.unique("feature_id", keep="first", maintain_order=True)


def _confirmed(store: "FeatureStore", groupby: str) -> pl.DataFrame:
    """The rows of `best_features`, but with a feature of several labels once for each of them."""
    keys, kind = ["feature_id", "label"], find_column(groupby, _kinds(store))
    positive = store.frame("feature_label").filter(
        (pl.col("label_kind") == pl.lit(kind, pl.String)) & (pl.col("auroc") > 0.5)
    )
    on_select = positive.filter(pl.col("split") == "select").select(*keys, "p").collect()
    ranked = on_select.sort("p", "feature_id", nulls_last=True).unique("label", keep="first", maintain_order=True)
    named = ranked.join(positive.filter(holds_on_test()).select(keys).collect(), on=keys, how="semi")
    return named.sort("label")


def _listed(labels: list[str]) -> str:
    """Labels for a title: the first of them, and how many more there are."""
    shown = ", ".join(plain(label, 32) for label in labels[:_MOST_NAMED])
    return shown + (f" and {len(labels) - _MOST_NAMED} more" if len(labels) > _MOST_NAMED else "")


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
    is_rare = dots["is_rare"].to_numpy()[tested]
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
        alpha=np.where(is_rare, _PALE, 1.0),  # type: ignore[arg-type]
    )
    ax.set_xlim(-0.7, n_features - 0.3)
    ax.set_ylim(n_labels - 0.3, -0.7)
    _keys(ax, drawn, alpha, any_rare=bool(is_rare.any()))


def _keys(ax: "Axes", drawn: Any, alpha: float, *, any_rare: bool) -> None:
    """Draw both keys right of the axes, with sizes in inches, so that a large plot does not stretch them."""
    figure = ax.figure
    width = ax.get_position().width * figure.get_figwidth()  # type: ignore[union-attr]
    height = ax.get_position().height * figure.get_figheight()  # type: ignore[union-attr]
    bar = figure.colorbar(drawn, cax=ax.inset_axes((1 + 0.2 / width, 1 - 1.3 / height, 0.14 / width, 1.2 / height)))
    bar.set_label("rank-biserial", fontsize=SMALL)
    bar.set_ticks([-1, 0, 1])
    bar.ax.tick_params(labelsize=SMALL)
    # a colour bar of dots with an opacity each would take that of the first
    bar.set_alpha(1)
    bar.solids.set(alpha=1)  # type: ignore[union-attr]
    entries = [(share, "#FFFFFF", _OTHER) for share in (0.1, 0.5, 1.0)] + [
        (0.5, "#FFFFFF", _SIGNIFICANT),
        (0.5, "#FFFFFF", _OTHER),
    ]
    names = ["10 % of cells fire", "50 %", "100 %", f"q ≤ {alpha:g}", f"q > {alpha:g}"]
    if any_rare:
        entries.append((0.5, _PALE_FACE, _OTHER))
        names.append(f"pale: below {MIN_LABEL_CELLS} cells")
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
        names,
        fontsize=SMALL,
        loc="upper left",
        bbox_to_anchor=(1 + 0.1 / width, 1 - 1.4 / height),
        frameon=False,
        labelspacing=0.7,
    )
