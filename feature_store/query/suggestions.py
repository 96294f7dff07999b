"""Suggestions for error messages: the known names that are closest to an unknown one."""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

SHORT_WORD = 3
"""A word with fewer letters has to be a whole word of a name: the B of `b cell` is in most names."""
MOST_COMPARED = 100_000
"""Largest number of names that are compared; a comparison takes about 10 microseconds."""
_NO_LETTER = re.compile(r"[\W_]+")


def same_but_for_case(name: str, names: Iterable[str]) -> list[str]:
    """The names that differ from `name` only in upper and lower case."""
    return sorted(other for other in names if other.casefold() == name.casefold())


def names_with_words(text: str, names: Iterable[str]) -> list[str]:
    """The names that have every word of a text in them, in alphabetical order; short words as whole words.

    >>> names_with_words("interferon", ["CELL_CYCLE", "INTERFERON_RESPONSE"])
    ['INTERFERON_RESPONSE']
    """
    words = _words(text)
    return sorted(name for name in names if words and all(_has_word(name, word) for word in words))


def closest_names(name: str, names: Sequence[str], n: int = 3) -> list[str]:
    """At most n names that are most like `name` in any case; none if there are more than MOST_COMPARED names.

    Those that have every word of it, the shortest first; where there is none, those of similar letters, and then those
    that share a whole word with it.

    >>> closest_names("CD8", ["CD34+", "CD8+ T", "CD8+ Naive"])
    ['CD8+ T', 'CD8+ Naive']
    """
    known: dict[str, list[str]] = {}
    for other in names if len(names) <= MOST_COMPARED else ():
        known.setdefault(other.casefold(), []).append(other)
    every = [other for others in known.values() for other in others]
    if found := sorted(names_with_words(name, every), key=len)[:n]:
        return found
    similar = difflib.get_close_matches(name.casefold(), known, n=n)
    found = [other for folded in similar for other in known[folded]]
    words = set(_words(name))
    found += sorted(other for other in every if words.intersection(_words(other)))
    return list(dict.fromkeys(found))[:n]


def did_you_mean(name: str, names: Sequence[str], n: int = 1) -> str:
    """The text `; did you mean ...?` with the closest names, or an empty text if no name is similar."""
    found = same_but_for_case(name, names)[:n] or closest_names(name, names, n)
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""


def join_names(names: Sequence[Any], n: int = 10) -> str:
    """The first n names in order as a text, followed by their number if there are more."""
    shown = ", ".join(str(name) for name in sorted(names)[:n])
    return shown if len(names) <= n else f"{shown}, ... ({len(names)})"


def _words(text: str) -> list[str]:
    return [word for word in _NO_LETTER.split(text.casefold()) if word]


def _has_word(name: str, word: str) -> bool:
    return word in (name.casefold() if len(word) >= SHORT_WORD else _words(name))
