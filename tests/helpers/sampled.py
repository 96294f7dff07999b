"""Cases of which a few are in the default run and all in the slow one."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def sampled(cases: Iterable[Any], keep: Sequence[Any]) -> list[Any]:
    """The cases, of which those that are not in `keep` are slow; a tuple holds several arguments."""
    found = list(cases)
    lost = [case for case in keep if case not in found]
    if lost:
        raise ValueError(f"no such cases: {lost}")
    return [case if case in keep else _slow(case) for case in found]


def _slow(case: Any) -> Any:
    arguments = case if isinstance(case, tuple) else (case,)
    return pytest.param(*arguments, marks=pytest.mark.slow)


WINDOWS = sampled(product((1440, 1024, 390), (False, True)), keep=[(1440, False), (390, True)])
"""Widths of a window, and whether it is dark."""
