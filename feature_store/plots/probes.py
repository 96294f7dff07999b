"""How well few features tell labels: a score against the number of features, a line for each representation."""

from typing import TYPE_CHECKING, Literal

import polars as pl

from feature_store.errors import InputError
from feature_store.plots.canvas import BLUE, GREY, INTERVAL, OKABE_ITO, beside, canvas, finish, head, plain, words
from feature_store.query.probes import PERMUTED, SAE, probes_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from feature_store.plots.canvas import Save
    from feature_store.query.store import FeatureStore

Measure = Literal["macro_f1", "balanced_accuracy", "auroc"]
MEASURES = {"macro_f1": "macro-F1", "balanced_accuracy": "balanced accuracy", "auroc": "AUROC"}


def probe_lines(
    store: "FeatureStore",
    *,
    label_kind: str | None = None,
    label: str | None = None,
    measure: Measure | None = None,
    show: bool | None = None,
    save: "Save | None" = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """A score of probes on test cells against their number of features, with its 95 % interval over donors.

    All labels together are shown by macro-F1, a single `label` by AUROC, if no `measure` is named. Permuted labels are
    the dashed line: what chance gives.

    Raises:
        QueryError: there is no table `probe_score`.
        InputError: the kind of label or the label was not probed, or the measure is not of a single label.
    """
    kind, probes = probes_of(store, label_kind)
    measure = measure or ("macro_f1" if label is None else "auroc")
    if measure not in MEASURES or (label is not None and measure == "macro_f1"):
        allowed = ", ".join(name for name in MEASURES if label is None or name != "macro_f1")
        raise InputError(f"measure was {measure!r}; allowed here are {allowed}")
    rows = probes.scores.filter(pl.col("label").is_null() if label is None else pl.col("label") == label)
    if rows.is_empty():
        known = ", ".join(probes.scores["label"].drop_nulls().unique().sort().to_list())
        raise InputError(f"label was {label!r}, which was not probed; {kind} has {known}")
    ks = rows["k"].unique().sort().to_list()
    from matplotlib.lines import Line2D

    drawn = canvas(ax, (6.4, 3.8), show=show, save=save)
    handles, names = [], probes.representations()
    others = iter(colour for colour in OKABE_ITO if colour not in (BLUE, "#000000"))
    for i, name in enumerate(names):
        own = rows.filter(representation=name).sort("k")
        # lines beside each other, so that no interval hides another
        place = [ks.index(k) + 0.05 * (i - (len(names) - 1) / 2) for k in own["k"]]
        colour = BLUE if name == SAE else GREY if name == PERMUTED else next(others)
        style, width = ("--", 1.2) if name == PERMUTED else ("-", 2.2 if name == SAE else 1.4)
        (line,) = drawn.ax.plot(place, own[measure], style, marker="o", ms=4, color=colour, lw=width)
        span = own.with_columns(place=pl.Series(place)).drop_nulls(f"{measure}_low")
        drawn.ax.vlines(span["place"], span[f"{measure}_low"], span[f"{measure}_high"], color=colour, lw=1, alpha=0.7)
        handles.append(line)
    drawn.ax.set_xticks(range(len(ks)), [str(k) for k in ks])
    drawn.ax.set_xlabel("features of the probe", fontsize=9)
    drawn.ax.set_ylabel(f"{MEASURES[measure]}, test cells", fontsize=9)
    if rows[f"{measure}_low"].null_count() < rows.height:
        handles.append(Line2D([], [], ls="", marker="|", ms=12, color=GREY))
        names = [*names, f"{INTERVAL} over donors"]
    beside(drawn.ax, handles, [plain(name) for name in names])
    head(drawn.ax, f"{words(kind)}: {'all labels' if label is None else plain(label)}")
    finish(drawn, store, show, save, ("probes", rows["run"][0]))
    return drawn.ax
