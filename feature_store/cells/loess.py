"""Loess of degree 2 in one dimension: a curve through points, by local weighted regression.

The curve is fitted at some vertices and interpolated between them, so the cost grows with the points times the
vertices (33 for 20,000 points: 40 ms). At a vertex v, the nearest `span` of the points have the weights
(1 - (|x - v| / h)^3)^3, with h the distance of the furthest, and the parabola of least weighted squares gives value and
slope. Vertices are the ends of the range, each moved outwards by a `MARGIN` of it, and the medians at which the points
are halved until a cell has at most `CELL` of the points of a neighbourhood. Between two vertices the curve is the cubic
with their values and slopes.

Methods: Cleveland 1979, doi:10.1080/01621459.1979.10481038; vertices and blending: Cleveland and Grosse 1991,
doi:10.1007/BF01890836. These are the defaults of `loess` in R and in scikit-misc, which scanpy uses.
"""

import numpy as np
import numpy.typing as npt

DEGREE = 2
CELL = 0.2
MARGIN = 0.005
_LEAST_SINGULAR = 1e-13
Floats = npt.NDArray[np.float64]


def loess(x: Floats, y: Floats, *, span: float) -> Floats:
    """The curve through the points (x, y) [n], at each x [n]. Where all x are the same it is the mean of y."""
    # not above: no stage but the choice of variable genes needs it
    from scipy.interpolate import CubicHermiteSpline

    order = np.argsort(x, kind="stable")
    sorted_x, sorted_y = x[order], y[order]
    if sorted_x[0] == sorted_x[-1]:
        return np.full(len(x), y.mean())
    vertices = _vertices(sorted_x, most=int(len(x) * span * CELL))
    n_near = min(len(x), int(len(x) * span + 1e-5))
    fits = np.array([_parabola(sorted_x, sorted_y, vertex, n_near) for vertex in vertices])
    curve: Floats = CubicHermiteSpline(vertices, fits[:, 0], fits[:, 1])(x)
    return curve


def _vertices(x: Floats, *, most: int) -> Floats:
    """The ascending vertices of ascending x, for cells of at most `most` points."""
    margin = MARGIN * (x[-1] - x[0])
    found = [x[0] - margin, x[-1] + margin]
    cells = [(0, len(x) - 1)]
    while cells:
        first, last = cells.pop()
        if last - first + 1 > max(most, 1) and (middle := _cut(x, first, last)) is not None:
            found.append(x[middle])
            cells += [(first, middle), (middle + 1, last)]
    return np.unique(found)


def _cut(x: Floats, first: int, last: int) -> int | None:
    """The place nearest to the middle after which x rises, the later of two; None if x does not rise in the cell."""
    rises = first + np.flatnonzero(np.diff(x[first : last + 1]) > 0)
    # of two places at the same distance, the later comes first
    return None if not len(rises) else int(rises[::-1][np.argmin(np.abs(rises[::-1] - (first + last) // 2))])


def _parabola(x: Floats, y: Floats, at: float, n_near: int) -> tuple[float, float]:
    """Value and slope at a vertex of the weighted parabola through the `n_near` nearest points."""
    distance = np.abs(x - at)
    width = np.partition(distance, n_near - 1)[n_near - 1]
    if not (distance < width).any():
        # points at one distance fill the neighbourhood, as genes of one mean do: it reaches to the next point
        further = distance[distance > width]
        width = further.min() if len(further) else 2 * width
    near = distance < width
    root = np.sqrt((1 - (distance[near] / width) ** 3) ** 3)
    u = (x[near] - at) / width
    # a parabola needs three places, a line two
    degree = min(len(np.unique(u)), DEGREE + 1) - 1
    design = u[:, None] ** np.arange(degree + 1) * root[:, None]
    scale = np.sqrt((design**2).sum(axis=0))
    weights = np.linalg.lstsq(design / scale, y[near] * root, rcond=_LEAST_SINGULAR)[0] / scale
    return float(weights[0]), float(weights[1] / width) if degree else 0.0
