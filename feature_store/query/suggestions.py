"""Suggestions for error messages: the known names that are closest to an unknown one."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

MOST_COMPARED = 100_000
"""Largest number of names that are compared; a comparison takes about 10 microseconds."""


def same_but_for_case(name: str, names: Iterable[str]) -> list[str]:
    """The names that differ from `name` only in upper and lower case."""
    return sorted(other for other in names if other.casefold() == name.casefold())


def closest_names(name: str, names: Sequence[str], n: int = 3) -> list[str]:
    """At most n names that are most similar to `name` in any case; none if there are more than MOST_COMPARED names."""
    known: dict[str, list[str]] = {}
    for other in names if len(names) <= MOST_COMPARED else ():
        known.setdefault(other.casefold(), []).append(other)
    found = difflib.get_close_matches(name.casefold(), known, n=n, cutoff=0.5)
    return [other for folded in found for other in known[folded]][:n]


def did_you_mean(name: str, names: Sequence[str], n: int = 1) -> str:
    """The text `; did you mean ...?` with the closest names, or an empty text if no name is similar."""
    found = same_but_for_case(name, names)[:n] or closest_names(name, names, n)
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""


def join_names(names: Sequence[Any], n: int = 10) -> str:
    """The first n names in order as a text, followed by their number if there are more."""
    shown = ", ".join(str(name) for name in sorted(names)[:n])
    return shown if len(names) <= n else f"{shown}, ... ({len(names)})"
