"""What an error message offers in place of a name that is not there."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

MOST_COMPARED = 100_000
"""Names among which the nearest is looked for; a comparison takes about 10 microseconds."""


def same_but_for_case(name: str, names: Iterable[str]) -> list[str]:
    """The names that equal `name` but for upper and lower case."""
    return sorted(other for other in names if other.casefold() == name.casefold())


def closest_names(name: str, names: Sequence[str], n: int = 3) -> list[str]:
    """At most n of the names, those most like `name`, whatever their case; none of very many."""
    known: dict[str, list[str]] = {}
    for other in names if len(names) <= MOST_COMPARED else ():
        known.setdefault(other.casefold(), []).append(other)
    found = difflib.get_close_matches(name.casefold(), known, n=n, cutoff=0.5)
    return [other for folded in found for other in known[folded]][:n]


def did_you_mean(name: str, names: Sequence[str], n: int = 1) -> str:
    """`; did you mean ...?` with the nearest names, or nothing."""
    found = same_but_for_case(name, names)[:n] or closest_names(name, names, n)
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""


def join_names(names: Sequence[Any], n: int = 10) -> str:
    """The first names in order, and how many there are where that is not all."""
    shown = ", ".join(str(name) for name in sorted(names)[:n])
    return shown if len(names) <= n else f"{shown}, ... ({len(names)})"
