"""The helpers that all plots share: axes, panels side by side, escaped text, and files with reproducible bytes.

A figure is made without pyplot unless it is shown (in a notebook, or with show=True), so that nothing has to be closed
and no display is needed. Names go through `plain`, which escapes `$`, so that it starts no formula, and shortens long
names in the middle, where related names differ least. A picture is saved with the artists outside its axes and without
a time stamp, so that the same store gives the same bytes.
"""

import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from feature_store.associations.classes import CLASSES
from feature_store.errors import InputError
from feature_store.storage.obs_columns import shown_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY, PALE = "#0072B2", "#D55E00", "#999999", "#E4E4E4"
CLASS_COLOURS: Mapping[str, str] = dict(zip(CLASSES, ("#009E73", BLUE, ORANGE, "#E69F00", "#BBBBBB"), strict=True))
"""The colours of the feature classes, from Okabe and Ito's eight."""
OKABE_ITO = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
LEGEND_ROWS = 20
SMALL = 8.0
"""Size of the smaller text in points; no text is below 7."""

_SUFFIXES: Mapping[str, Mapping[str, Any]] = {
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None},
    ".svg": {"Date": None},
}
_DOTS_PER_INCH = 200
_LONGEST = 42


class Canvas(NamedTuple):
    """The axes to draw into; `own` is true if this module made the figure, and then shows and closes it."""

    figure: "Figure"
    axes: "list[Axes]"
    own: bool

    @property
    def ax(self) -> "Axes":
        """The first axes, which are the only ones of a plot with one panel."""
        return self.axes[0]


def canvas(
    ax: "Axes | None",
    size: tuple[float, float],
    *,
    show: bool | None,
    save: str | Path | None,
    n_panels: int = 1,
) -> Canvas:
    """The given axes, or a new figure of `size` inches with panels of equal width side by side.

    Raises InputError before anything is drawn, for `ax` where several panels are needed or a file of unknown format.
    """
    check_file(save)
    if ax is not None:
        if n_panels > 1:
            raise InputError(f"{n_panels} panels do not fit into one axes; ask for one at a time, or leave ax= out")
        figure = ax.get_figure(root=True)
        assert figure is not None
        return Canvas(figure, [ax], own=False)
    from matplotlib.figure import Figure

    if show or (show is None and save is None and _is_watched()):
        import matplotlib.pyplot as plt

        new = plt.figure(figsize=size, layout="constrained")
    else:
        new = Figure(figsize=size, layout="constrained")
    axes = [new.add_subplot(1, n_panels, i + 1) for i in range(n_panels)]
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    return Canvas(new, axes, own=True)


def finish(drawn: Canvas, show: bool | None, save: str | Path | None) -> None:
    """Save the figure, and show and close it if it was made here."""
    if save is not None:
        import matplotlib as mpl

        path = Path(save)
        path.parent.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context({"svg.hashsalt": "scsae"}):
            drawn.figure.savefig(
                path, dpi=_DOTS_PER_INCH, bbox_inches="tight", metadata=dict(_SUFFIXES[path.suffix.lower()])
            )
    if drawn.own and show:
        import matplotlib.pyplot as plt

        plt.show()
        plt.close(drawn.figure)


def check_file(save: str | Path | None) -> None:
    """Raise InputError for a file whose suffix names no format."""
    if save is not None and Path(save).suffix.lower() not in _SUFFIXES:
        raise InputError(f"{save} names no kind of picture; end it with {', '.join(_SUFFIXES)}")


def plain(text: object, longest: int = _LONGEST) -> str:
    """A text on one line, cut in the middle to `longest` characters, with `$` escaped so that it starts no formula."""
    line = re.sub(r"\s+", " ", str(text)).strip()
    if len(line) > longest:
        kept = longest - 1
        line = f"{line[: kept - kept // 2]}…{line[len(line) - kept // 2 :]}"
    return line.replace("$", r"\$")


def words(name: str) -> str:
    """A column's name in words."""
    return plain(shown_name(name).replace("_", " "))


def head(ax: "Axes", title: str, *, loc: Literal["left", "center"] = "center", least: int = 34) -> None:
    """Set the title of a panel, each line wrapped to the width of the panel, but to at least `least` characters."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    inches = ax.get_position().width * figure.get_figwidth()
    lines = [part for line in title.split("\n") for part in textwrap.wrap(line, max(least, int(inches * 12.5)))]
    ax.set_title("\n".join(lines), fontsize=10, loc=loc)


def key(ax: "Axes", colours: Mapping[str, str], used: set[str]) -> None:
    """Draw a legend of the colours in use right of the panel, if there are two or more."""
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=name) for name, colour in colours.items() if colour in used]
    if len(handles) > 1:
        beside(ax, handles, [str(handle.get_label()) for handle in handles])


def beside(ax: "Axes", handles: Sequence[Any], names: Sequence[str], **options: Any) -> None:
    """Draw a legend right of the panel, in columns of LEGEND_ROWS; the names are drawn unchanged."""
    legend = ax.legend(
        handles,
        [str(i) for i in range(len(names))],
        frameon=False,
        fontsize=SMALL,
        loc="upper left",
        bbox_to_anchor=(1.02, 1.0),
        borderaxespad=0,
        ncols=max(1, -(-len(names) // LEGEND_ROWS)),
        **options,
    )
    # careful: matplotlib leaves out a name that begins with "_" if it is given as a label
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)


def _is_watched() -> bool:
    """Whether pyplot shows its figures by itself: in a notebook, or in interactive mode."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    return "ipykernel" in sys.modules or (pyplot is not None and bool(pyplot.isinteractive()))
