"""Ranges of neighbouring genes or features whose sizes are limited."""

from collections.abc import Iterable


def split_by_size(sizes: Iterable[float], *, limit: float, most: int) -> list[int]:
    """The bounds of consecutive ranges: where each begins, and at the end the number of sizes.

    A range holds at most `most` sizes, which sum up to at most `limit`, but always at least one.
    """
    bounds, held, place = [0], 0.0, -1
    for place, size in enumerate(sizes):
        if place > bounds[-1] and (held + size > limit or place - bounds[-1] >= most):
            bounds.append(place)
            held = 0.0
        held += size
    return [*bounds, place + 1]
