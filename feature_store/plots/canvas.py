"""The helpers that all plots share: axes, panels in rows, escaped text, keys, and files with reproducible bytes.

A figure is made without pyplot unless it is shown (in a notebook, or with show=True), so that nothing has to be closed
and no display is needed. Names go through `plain`, which escapes `$`, so that it starts no formula, and shortens long
names in the middle, where related names differ least. A picture is saved with the artists outside its axes, and says
of which store and run it is. Its date is that of the run, so that the same store gives the same bytes; the text of an
SVG stays text.
"""

import re
import sys
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from feature_store.associations.classes import CLASSES
from feature_store.errors import InputError
from feature_store.query.runs import created_of
from feature_store.storage.obs_columns import shown_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

    from feature_store.query.store import FeatureStore

BLUE, ORANGE, DARK_GREY = "#0072B2", "#D55E00", "#555555"
GREY, LIGHT_GREY, PALE = "#999999", "#BDBDBD", "#E4E4E4"
CLASS_COLOURS: Mapping[str, str] = dict(zip(CLASSES, ("#009E73", BLUE, ORANGE, "#E69F00", "#BBBBBB"), strict=True))
"""The colours of the feature classes, from Okabe and Ito's eight."""
OKABE_ITO = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
LEGEND_ROWS = 20
SMALL = 8.0
"""Size of the smaller text in points; no text is below 7."""

INTERVAL = "95 % interval"

_SUFFIXES = (".png", ".pdf", ".svg")
_DOTS_PER_INCH = 200
_MOST_PIXELS = 2**16
_LONGEST = 42
_WIDEST = 16.0
"""Width in inches from which panels go on in another row."""


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    """A file that a plot is saved to, with more than its path: `save=ImageFile(path="map.svg", size=(6, 4))`.

    Without a size the figure is as large as what it shows, and the margins are cut off.
    """

    path: str | Path
    dpi: int = _DOTS_PER_INCH
    """Pixels per inch of a .png, and of the dots of maps in every format."""
    size: tuple[float, float] | None = None
    """Width and height in inches."""
    command: str | None = None
    """What was typed, for the metadata."""


Save = str | Path | ImageFile


class Canvas(NamedTuple):
    """The axes to draw into; `own` is true if this module made the figure, and then shows and closes it."""

    figure: "Figure"
    axes: "list[Axes]"
    own: bool

    @property
    def ax(self) -> "Axes":
        """The first axes, which are the only ones of a plot with one panel."""
        return self.axes[0]


def image_file(save: Save) -> ImageFile:
    """The file that `save` names, at the default size where it is a path alone."""
    return save if isinstance(save, ImageFile) else ImageFile(path=save)


def canvas(
    ax: "Axes | None",
    panel: tuple[float, float],
    *,
    show: bool | None,
    save: Save | None,
    n_panels: int = 1,
) -> Canvas:
    """The given axes, or a new figure with panels of `panel` inches each, in as many rows as their width makes needed.

    Raises InputError before anything is drawn, for `ax` where several panels are needed, a file of unknown format or a
    size that no file can have.
    """
    check_file(save)
    if ax is not None:
        if n_panels > 1:
            raise InputError(f"{n_panels} panels do not fit into one axes; ask for one at a time, or leave ax= out")
        figure = ax.get_figure(root=True)
        assert figure is not None
        return Canvas(figure, [ax], own=False)
    from matplotlib.figure import Figure

    given = None if save is None else image_file(save).size
    n_columns = min(n_panels, max(1, int((given[0] if given else _WIDEST) // panel[0])))
    n_rows = -(-n_panels // n_columns)
    size = given or (panel[0] * n_columns, panel[1] * n_rows)
    if show or (show is None and save is None and _is_watched()):
        import matplotlib.pyplot as plt

        new = plt.figure(figsize=size, layout="constrained")
    else:
        new = Figure(figsize=size, layout="constrained")
    axes = [new.add_subplot(n_rows, n_columns, i + 1) for i in range(n_panels)]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return Canvas(new, axes, own=True)


def finish(
    drawn: Canvas, store: "FeatureStore", show: bool | None, save: Save | None, of: tuple[str, str] | None = None
) -> None:
    """Save the figure, and show and close it if it was made here.

    `of` is the kind and the id of the run that is shown; None is the associations, or else the codes, of the store.
    Raises InputError where a given size has no room for what is drawn.
    """
    if save is not None:
        import matplotlib as mpl

        file = image_file(save)
        path = Path(file.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        fonts: Any = {"svg.hashsalt": "scsae", "svg.fonttype": "none", "pdf.fonttype": 42}
        whole: Any = {"bbox_inches": "tight"} if file.size is None else {}
        with mpl.rc_context(fonts), warnings.catch_warnings():
            warnings.filterwarnings("error", message="constrained_layout not applied")
            try:
                drawn.figure.savefig(path, dpi=file.dpi, metadata=_metadata(drawn.figure, store, file, of), **whole)
            except UserWarning as error:
                width, height = drawn.figure.get_size_inches()
                raise InputError(
                    f"size was {width:g} x {height:g} inches, which has no room for the axes beside their names and "
                    "keys; give a larger one, or none"
                ) from error
    if drawn.own and show:
        import matplotlib.pyplot as plt

        plt.show()
        plt.close(drawn.figure)


def check_file(save: Save | None) -> None:
    """Raise InputError for a file whose suffix names no format, or of a size that no file can have."""
    if save is None:
        return
    file = image_file(save)
    if Path(file.path).suffix.lower() not in _SUFFIXES:
        raise InputError(f"{file.path} names no kind of picture; end it with {', '.join(_SUFFIXES)}")
    if file.dpi < 1:
        raise InputError(f"dpi was {file.dpi}; give a number of pixels per inch above 0, such as {_DOTS_PER_INCH}")
    if file.size is not None and not all(0 < side * file.dpi < _MOST_PIXELS for side in file.size):
        width, height = file.size
        raise InputError(
            f"size was {width:g} x {height:g} inches at {file.dpi} dpi; both sides have to be above 0 and below "
            f"{_MOST_PIXELS / file.dpi:.0f} inches"
        )


def _metadata(figure: "Figure", store: "FeatureStore", file: ImageFile, of: tuple[str, str] | None) -> dict[str, Any]:
    """Title, store, run, date of the run and command, under the names that the format of the file has for them.

    Of the store it is the name of its folder alone: a path says who made a file, and on which machine.
    """
    dates = created_of(store.layout, store.lineage)
    run = f"{of[0]} {of[1]}" if of else next(iter(dates), "no run")
    created = dates.get(run)
    titles = [figure.get_suptitle(), *(ax.get_title(loc) for ax in figure.axes for loc in ("center", "left"))]
    title = " ".join(next(filter(None, titles), "").replace(r"\$", "$").split())
    source = f"store {store.layout.root.name}, {run}"
    formats: dict[str, dict[str, Any]] = {
        ".png": {
            "Software": "scsae",
            "Title": title,
            "Source": source,
            "Creation Time": created,
            "Comment": file.command,
        },
        ".pdf": {
            "Creator": "scsae",
            "Title": title,
            "Subject": source,
            "Keywords": file.command,
            "CreationDate": created and datetime.fromisoformat(created),
        },
        ".svg": {"Creator": "scsae", "Title": title, "Source": source, "Date": created, "Description": file.command},
    }
    found = formats[Path(file.path).suffix.lower()]
    # careful: matplotlib writes the time at which it draws where a date is not given as None
    return {name: value for name, value in found.items() if value is not None or name in ("Date", "CreationDate")}


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


def head_all(drawn: Canvas, title: str) -> None:
    """Set the title of all panels, wrapped to the width of the figure; of axes that were given, their own title."""
    if not drawn.own:
        head(drawn.ax, title)
        return
    drawn.figure.suptitle("\n".join(textwrap.wrap(title, max(20, int(drawn.figure.get_figwidth() * 11)))), fontsize=11)


def key(ax: "Axes", colours: Mapping[str, str], used: set[str], more: Mapping[str, Any] | None = None) -> None:
    """Draw a legend of the colours in use right of the panel, and of `more` artists by their names."""
    from matplotlib.patches import Patch

    shown: dict[str, Any] = {name: Patch(color=colour) for name, colour in colours.items() if colour in used}
    shown |= more or {}
    beside(ax, list(shown.values()), list(shown))


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


def below(ax: "Axes", shown: Mapping[str, Any], inches: float, ncols: int = 1) -> None:
    """Draw a legend of artists by their names, its top `inches` below the axes; none where nothing is shown."""
    from matplotlib.transforms import ScaledTranslation

    figure = ax.get_figure(root=True)
    assert figure is not None
    if shown:
        place = ax.transAxes + ScaledTranslation(0, -inches, figure.dpi_scale_trans)
        options: Any = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "bbox_transform": place, "ncols": ncols}
        ax.legend(shown.values(), shown, frameon=False, fontsize=SMALL, borderaxespad=0, handletextpad=0.4, **options)


def name_dots(ax: "Axes", names: Iterable[tuple[float, float, Sequence[str]]], **style: Any) -> None:
    """Write a name beside each dot (x, y, its names from the longest to the shortest), the first names first.

    A name that fits nowhere, because it would cover another or leave the axes, is left out. Everything else has to be
    drawn before, because it decides where the axes lie.
    """
    from matplotlib.patheffects import withStroke

    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    placed: list[Bbox] = []
    inside = ax.get_window_extent()
    for x, y, texts in names:
        for text, right, up in product(dict.fromkeys(texts), (True, False), (True, False)):
            note = ax.annotate(
                text,
                (x, y),
                xytext=(4 if right else -4, 2 if up else -2),
                textcoords="offset points",
                ha="left" if right else "right",
                va="bottom" if up else "top",
                **{"fontsize": SMALL - 1, **style},
            )
            note.set_path_effects([withStroke(linewidth=2, foreground="white")])
            box = note.get_window_extent()
            is_inside = inside.x0 < box.x0 and box.x1 < inside.x1 and inside.y0 < box.y0 and box.y1 < inside.y1
            if is_inside and not any(box.overlaps(other) for other in placed):
                placed.append(box)
                break
            note.remove()


def _is_watched() -> bool:
    """Whether pyplot shows its figures by itself: in a notebook, or in interactive mode."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    return "ipykernel" in sys.modules or (pyplot is not None and bool(pyplot.isinteractive()))
