"""The scatter, pixel by pixel: what is drawn where, and what is under the pointer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Page

RED, GREEN, BLUE = 0xFF0000FF, 0xFF00FF00, 0xFFFF0000
MAKE = """async ({ xs, ys, ink, options }) => {
    const { Scatter } = await import('/static/js/scatter.js');
    const main = document.querySelector('main');
    main.replaceChildren(Object.assign(document.createElement('div'), { id: 'here' }));
    const here = document.getElementById('here');
    Object.assign(here.style, { width: '600px', height: '400px' });
    const plot = new Scatter(here, { ...options, onLasso: () => {} });
    plot.points(Float64Array.from(xs), Float64Array.from(ys));
    plot.colours(Uint32Array.from(ink));
    window.plot = plot;
}"""
PIXEL = """([x, y]) => {
    plot.draw();
    const at = plot.places, { image } = plot;
    return new Uint32Array(image.data.buffer)[Math.floor(at.y(y)) * image.width + Math.floor(at.x(x))];
}"""


class Drawn:
    """A scatter in a page, with what a test asks of it."""

    def __init__(self, page: Page, xs: Any, ys: Any, ink: Any, **options: Any) -> None:
        self.page = page
        page.evaluate(MAKE, {"xs": list(xs), "ys": list(ys), "ink": list(ink), "options": options})

    def __call__(self, expression: str, given: Any = None) -> Any:
        return self.page.evaluate(expression, given)

    def pixel(self, x: float, y: float) -> int:
        """The colour at a place of the data, 0 where there is none."""
        return int(self(PIXEL, [x, y]))


@pytest.fixture
def draw(open_page: Callable[..., Page]) -> Callable[..., Drawn]:
    page = open_page("")
    return lambda *given, **options: Drawn(page, *given, **options)


def test_a_dot_has_its_colour_at_its_place_and_nothing_lies_between(draw: Callable[..., Drawn]) -> None:
    plot = draw([0, 10, 0], [0, 0, 5], [RED, GREEN, BLUE])
    assert [plot.pixel(0, 0), plot.pixel(10, 0), plot.pixel(0, 5)] == [RED, GREEN, BLUE]
    assert plot.pixel(5, 2.5) == 0


def test_the_last_dot_lies_on_top_and_an_order_says_who_is_last(draw: Callable[..., Drawn]) -> None:
    plot = draw([0, 0, 9], [0, 0, 9], [RED, GREEN, BLUE])
    assert plot.pixel(0, 0) == GREEN
    plot("() => plot.order(Uint32Array.from([1, 0]))")
    assert plot.pixel(0, 0) == RED
    assert plot.pixel(9, 9) == 0


def test_a_hidden_dot_is_neither_drawn_nor_found(draw: Callable[..., Drawn]) -> None:
    plot = draw([0, 9], [0, 9], [RED, GREEN])
    find = "() => { const at = plot.places; return plot.nearest(at.x(0), at.y(0)); }"
    assert (plot.pixel(0, 0), plot(find)) == (RED, 0)
    plot("() => plot.show(Uint8Array.from([0, 1]))")
    assert (plot.pixel(0, 0), plot(find)) == (0, None)


def test_a_dot_without_a_place_is_left_out(draw: Callable[..., Drawn]) -> None:
    plot = draw([0, 9], [0, 9], [RED, GREEN])
    plot("() => plot.points(Float64Array.from([NaN, 9, 0]), Float64Array.from([0, 9, 0]))")
    assert plot("() => [plot.bounds.x0, plot.bounds.x1]") == [0, 9]


def test_the_dot_under_the_pointer_is_the_nearest_of_all(draw: Callable[..., Drawn]) -> None:
    rng = np.random.default_rng(0)
    xs, ys = rng.normal(size=(2, 3000))
    plot = draw(xs, ys, [RED] * 3000)
    asked = rng.uniform([20, 20], [580, 380], (200, 2))
    found = plot(
        """(asked) => { plot.draw(); const at = plot.places, found = asked.map(([x, y]) => plot.nearest(x, y));
        return { found, k: at.kx, x0: at.x(0), y0: at.y(0), r: plot.radius }; }""",
        asked.tolist(),
    )
    pixels = np.stack([found["x0"] + xs * found["k"], found["y0"] - ys * found["k"]], axis=1)
    for point, index in zip(asked, found["found"], strict=True):
        distance = np.hypot(*(pixels - point).T)
        best = int(distance.argmin())
        assert index == (best if distance[best] < 10 + found["r"] else None)


def test_zooming_keeps_what_is_under_the_pointer_and_moving_moves_it(draw: Callable[..., Drawn]) -> None:
    plot = draw([0, 9], [0, 9], [RED, GREEN])
    before, after, moved = plot(
        """() => { const at = () => { const p = plot.places; return [p.toX(120), p.toY(70)]; };
        const before = at(); plot.zoom(3.7, 120, 70); const after = at(); const x = plot.places.x(4);
        plot.pan(25, -10); return [before, after, plot.places.x(4) - x]; }"""
    )
    assert after == pytest.approx(before)
    assert moved == pytest.approx(25)


@pytest.mark.parametrize("equal", [True, False])
def test_a_unit_is_as_long_both_ways_on_a_map_and_each_axis_fits_by_itself_elsewhere(
    draw: Callable[..., Drawn], equal: bool
) -> None:
    plot = draw([0, 100], [0, 1], [RED, GREEN], equal=equal, axes=None if equal else {"x": "effect", "y": "other"})
    kx, ky = plot("() => { plot.draw(); return [plot.places.kx, plot.places.ky]; }")
    assert (kx == ky) == equal
    assert plot("() => document.querySelector('#here .overlay').textContent.includes('effect')") != equal


def test_many_dots_are_drawn_like_few(draw: Callable[..., Drawn]) -> None:
    """Above the number up to which edges are smooth, the middle of a dot is the same."""
    plot = draw([0, 10], [0, 5], [RED, GREEN])
    plot(
        """() => { const n = 200000, xs = new Float64Array(n).fill(10), ys = new Float64Array(n).fill(5);
        xs[0] = ys[0] = 0; plot.points(xs, ys); const ink = new Uint32Array(n).fill(0xff00ff00); ink[0] = 0xff0000ff;
        plot.colours(ink); }"""
    )
    assert [plot.pixel(0, 0), plot.pixel(10, 5), plot.pixel(5, 2)] == [RED, GREEN, 0]
