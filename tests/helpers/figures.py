"""What a figure of matplotlib shows, for tests: texts that cover each other, and colours that no key names."""

from itertools import combinations

from matplotlib.colors import to_hex
from matplotlib.text import Text

INK = {"#000000", "#ffffff"}
"""Colours that need no key: axes, whiskers and the paper."""
_SHRUNK = 0.96


def texts_of(figure):
    """The texts that are drawn: those of ticks only within the view."""
    hidden = set()
    for ax in figure.findobj(lambda artist: hasattr(artist, "xaxis")):
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            out = [tick for tick in ticks if not ax.axison or not low <= tick.get_loc() <= high]
            hidden |= {id(label) for tick in out for label in (tick.label1, tick.label2)}
            hidden |= set() if ax.axison else {id(axis.label)}
    texts = figure.findobj(Text)
    return [text for text in texts if text.get_visible() and text.get_text().strip() and id(text) not in hidden]


def collisions(figure):
    """Pairs of texts that cover each other, and legends and titles that lie on axes."""
    figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent().shrunk(_SHRUNK, _SHRUNK)) for text in texts_of(figure)]
    found = [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if one.overlaps(other)]
    for ax in figure.axes:
        legend, box = ax.get_legend(), ax.get_window_extent()
        found += [("legend", str(ax))] if legend is not None and legend.get_window_extent().overlaps(box) else []
        titles = [text for text in (ax.title, ax._left_title, figure._suptitle) if text is not None]
        found += [(title.get_text(), str(ax)) for title in titles if title.get_window_extent().overlaps(box)]
    return found


def unkeyed_colours(figure):
    """The colours of dots, bars, bands and lines that no legend shows and no colour bar explains."""
    drawn, keyed = set(), set()
    for ax in figure.axes:
        drawn |= {colour for artist in (*ax.lines, *ax.patches, *ax.collections) for colour in _colours(artist)}
        if (legend := ax.get_legend()) is not None:
            shown = [part for handle in legend.legend_handles for part in handle.findobj()]
            keyed |= {colour for artist in shown for colour in _colours(artist)}
    return drawn - keyed - INK


def _colours(artist):
    if getattr(artist, "get_array", lambda: None)() is not None or not artist.get_visible():
        return set()
    if hasattr(artist, "get_offsets") and not len(artist.get_offsets()):
        return set()
    names = [name for name in ("get_facecolor", "get_edgecolor", "get_color") if hasattr(artist, name)]
    if getattr(artist, "get_linestyle", lambda: None)() == "None":
        names = ["get_markeredgecolor"]
    found = set()
    for name in names:
        given = getattr(artist, name)()
        many = given if getattr(given, "ndim", 1) == 2 else [given]
        found |= {to_hex(colour) for colour in many if _is_seen(colour)}
    return found


def _is_seen(colour):
    from matplotlib.colors import to_rgba

    return to_rgba(colour)[3] > 0
