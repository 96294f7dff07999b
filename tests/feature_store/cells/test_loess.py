"""Loess: the figures that R prints for its own example, the written out parabolas, and no trouble with ties."""

from __future__ import annotations

import numpy as np
import pytest
from loess_oracle import direct

from feature_store.cells.loess import _vertices, loess

SPEED = [4, 4, 7, 7, 8, 9, 10, 10, 10, 11, 11, 12, 12, 12, 12, 13, 13, 13, 13, 14, 14, 14, 14, 15, 15, 15, 16, 16, 17]
SPEED += [17, 17, 18, 18, 18, 18, 19, 19, 19, 20, 20, 20, 20, 20, 22, 23, 24, 24, 24, 24, 25]
DISTANCE = [2, 10, 4, 22, 16, 10, 18, 26, 34, 17, 28, 14, 20, 24, 28, 26, 34, 34, 46, 26, 36, 60, 80, 20, 26, 54, 32]
DISTANCE += [40, 32, 40, 50, 42, 56, 76, 84, 36, 46, 68, 32, 48, 52, 56, 64, 66, 54, 70, 92, 93, 120, 85]
OF_R = {7: 12.499786, 8: 15.281082, 9: 18.446568, 10: 21.865315, 11: 25.517015, 12: 29.350386, 13: 33.230660}
OF_R |= {14: 37.167935, 15: 41.205226, 16: 45.055736, 18: 49.824812, 19: 51.986702, 20: 56.461318, 22: 68.569313}
OF_R |= {23: 76.316068, 24: 85.212121, 25: 95.324047}
"""predict(loess(dist ~ speed, cars)), as in R's help page of predict.loess."""


def test_the_curve_is_that_of_r_on_its_example() -> None:
    x, y = np.array(SPEED, float), np.array(DISTANCE, float)
    found = dict(zip(SPEED, loess(x, y, span=0.75), strict=True))
    assert {speed: found[speed] for speed in OF_R} == pytest.approx(OF_R, abs=1e-6)


def test_value_and_slope_at_a_vertex_are_those_of_the_parabola_and_the_curve_between_is_near_it() -> None:
    rng = np.random.default_rng(0)
    x = np.sort(rng.normal(0, 1, 900))
    y = np.sin(x) + rng.normal(0, 0.3, 900)
    vertices = _vertices(x, most=int(900 * 0.3 * 0.2))
    # 900 points are halved until a cell has at most 54
    assert 17 <= len(vertices) <= 33
    curve = loess(x, y, span=0.3)
    # those inside the range are points themselves
    np.testing.assert_allclose(curve[np.isin(x, vertices)], direct(x, y, span=0.3, at=vertices[1:-1]), atol=1e-9)
    gap = np.abs(curve - direct(x, y, span=0.3))
    # measured: .0300, in the first cell, a tail as wide as a third of the range; .0051 between the inner vertices
    assert gap.max() < 0.031
    assert gap[(x > vertices[1]) & (x < vertices[-2])].max() < 0.0055


def test_a_parabola_comes_back_whatever_the_order_of_the_points() -> None:
    x = np.random.default_rng(1).permutation(np.linspace(-2, 5, 200))
    y = 1 + 2 * x - 0.5 * x**2
    np.testing.assert_allclose(loess(x, y, span=0.3), y, atol=1e-8)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 1.0])
def test_points_at_one_place_have_their_mean_and_give_no_hole(share: float) -> None:
    n = 300
    x = np.where(np.arange(n) < share * n, 0.0, np.linspace(0.1, 3, n))
    y = x + np.tile([-0.1, 0.1], n // 2)
    curve = loess(x, y, span=0.3)
    assert np.isfinite(curve).all()
    np.testing.assert_allclose(curve[x == 0], 0.0, atol=0.06)
