"""How strongly a feature fires in the cells of each label: quartiles, and densities with Scott's bandwidth.

All groups of a feature are worked out together, because an operation of numpy takes as long for one group of a few
cells as for a hundred. Densities are Gaussian, as matplotlib's, of values that are counted into 512 bins first.

Scott, Multivariate Density Estimation, 1992.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from feature_store.associations.inputs import Floats, Ints

FEW = 20
"""Firing cells up to which each is drawn as a dot, because so few give no density."""
N_POINTS = 48
"""Points of an outline."""
MOST_GROUPS = 40
"""Labels of a column that are drawn, those of the highest mean."""
_N_BINS = 512
_GROUPS_AT_ONCE = 64
_EVEN = np.linspace(0, 1, N_POINTS)
_SHARES = np.array([0, 0.25, 0.5, 0.75, 1])
_FIGURES = ("low", "q25", "median", "q75", "high")


class Grouping(NamedTuple):
    """The label of each cell of the panel [n_panel], -1 for a cell that is not shown or has none; the number of cells
    of each label [n_labels]; and the number of cells that are shown and have none.
    """

    names: tuple[str, ...]
    code: Ints
    n: Ints
    n_unknown: int


def violins(groupings: Mapping[str, Grouping], place: Ints, value: Floats) -> dict[str, dict[str, Any]]:
    """How a feature's code spreads over the labels of each column, the highest mean first.

    place, value: the cells of the panel in which it fires, and its code there. groups: label, n, n_firing, mean (of all
    its cells) and of the firing ones: low, high, quartiles, and `outline` [N_POINTS] between low and high, 1 at its
    widest, or `dots`. Cells without a label are `n_unknown`, labels beyond MOST_GROUPS `n_left_out`.
    """
    found: dict[str, dict[str, Any]] = {}
    group, inside = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    abouts: list[dict[str, Any]] = []
    for column, (names, codes, n, n_unknown) in groupings.items():
        code = codes[place]
        here = np.flatnonzero(code >= 0)
        code = code[here]
        mean = (np.bincount(code, value[here], minlength=n.size) / np.maximum(n, 1)).tolist()
        shown = sorted(np.flatnonzero(n).tolist(), key=lambda i: (-mean[i], names[i]))
        number = np.full(n.size, -1)
        number[shown[:MOST_GROUPS]] = np.arange(len(abouts), len(abouts) + len(shown[:MOST_GROUPS]))
        is_shown = number[code] >= 0
        group.append(number[code[is_shown]])
        inside.append(here[is_shown])
        groups = [{"label": names[i], "n": int(n[i]), "mean": short(mean[i])} for i in shown[:MOST_GROUPS]]
        abouts += groups
        left_out = max(0, len(shown) - MOST_GROUPS)
        found[column] = {"groups": groups, "n_unknown": n_unknown, "n_left_out": left_out}
    spreads = spread(np.concatenate(group), value[np.concatenate(inside)], len(abouts))
    for about, figures in zip(abouts, spreads, strict=True):
        about |= figures
    return found


def spread(group: Ints, value: Floats, n_groups: int) -> list[dict[str, Any]]:
    """The figures of the firing cells of each group; see `violins`. group, value: one a cell [n_firing]."""
    order = np.lexsort((value, group))
    group, value = group[order], value[order]
    count = np.bincount(group, minlength=n_groups)
    start = np.cumsum(count) - count
    filled = np.flatnonzero(count)
    five = quantiles(value, start[filled], count[filled])
    low, high = five[:, 0], five[:, -1]
    wide = filled[(count[filled] > FEW) & (high - low > 1e-9 * high)]
    number = np.full(n_groups, -1)
    number[wide] = np.arange(wide.size)
    of_wide = number[group]
    shapes = np.round(outlines(of_wide[of_wide >= 0], value[of_wide >= 0], wide.size), 3).tolist()
    found: list[dict[str, Any]] = [{"n_firing": size, "outline": None, "dots": None} for size in count.tolist()]
    for place, figures in zip(filled.tolist(), five.tolist(), strict=True):
        about = found[place]
        about |= {name: short(figure) for name, figure in zip(_FIGURES, figures, strict=True)}
        if number[place] >= 0:
            about["outline"] = shapes[number[place]]
        elif about["n_firing"] <= FEW:
            about["dots"] = [short(one) for one in value[start[place] :][: about["n_firing"]].tolist()]
        else:
            about["dots"] = [about["median"]]
    return found


def short(value: float) -> float:
    """A code with the 7 digits that a float32 has; all 17 of a float64 would double the size of a document."""
    return float(f"{value:.7g}")


def quantiles(ordered: Floats, start: Ints, count: Ints, shares: Floats = _SHARES) -> Floats:
    """The quantiles of groups [n_groups n_shares], as `numpy.quantile` gives them, of values that ascend in each group.

    start, count: the first value of each group and their number, at least one.
    """
    place = shares * (count[:, None] - 1)
    below = np.floor(place).astype(np.int64)
    above = np.minimum(below + 1, count[:, None] - 1)
    first, second = ordered[start[:, None] + below], ordered[start[:, None] + above]
    found: Floats = first + (second - first) * (place - below)
    return found


def outlines(group: Ints, value: Floats, n_groups: int) -> Floats:
    """Densities of groups [n_groups N_POINTS] at even places from the smallest to the largest value of each, 1 at the
    highest point.

    group, value: ascending by group, and by value in each; each group has values that differ. A Gaussian kernel of
    Scott's bandwidth, n^(-1/5) standard deviations, but never narrower than the places are apart.
    """
    count = np.bincount(group, minlength=n_groups)
    last = np.cumsum(count)
    low, high = value[last - count], value[last - 1]
    mean = np.bincount(group, value, minlength=n_groups) / count
    variance = np.bincount(group, (value - mean[group]) ** 2, minlength=n_groups) / (count - 1)
    bandwidth = np.maximum(np.sqrt(variance) * count**-0.2 / (high - low), 1 / (N_POINTS - 1))
    place = (value - low[group]) / (high - low)[group]
    bins = np.minimum(place * _N_BINS, _N_BINS - 1).astype(np.int64)
    n_in_bin = np.bincount(group * _N_BINS + bins, minlength=n_groups * _N_BINS)
    filled = np.flatnonzero(n_in_bin)
    of_group = filled // _N_BINS
    density = np.empty((n_groups, N_POINTS))
    for first in range(0, n_groups, _GROUPS_AT_ONCE):
        here = slice(*np.searchsorted(of_group, [first, first + _GROUPS_AT_ONCE]))
        centre, own = (filled[here] % _N_BINS + 0.5) / _N_BINS, of_group[here]
        distance = (_EVEN - centre[:, None]) / bandwidth[own, None]
        weighted = np.exp(distance * distance * -0.5) * n_in_bin[filled[here], None]
        heads = np.flatnonzero(np.diff(own, prepend=-1))
        density[first : first + _GROUPS_AT_ONCE] = np.add.reduceat(weighted, heads, axis=0)
    relative: Floats = density / density.max(axis=1, keepdims=True, initial=0)
    return relative
