"""What a typed name means: the gene of another name, and the gene sets that some words name.

The names of a gene are those of `gene_aliases.json` (proteins, CD antigens and symbols of earlier years, each by its
present symbol; 208 genes, most of them of immune cells) and its Ensembl id, where the data have one. Nothing is
downloaded. A name is compared without case, spaces and hyphens: PD-1 is PD1.
"""

import json
import re
from collections.abc import Collection, Mapping
from functools import cache
from importlib import resources
from typing import NamedTuple

from feature_store.query.suggestions import join_names

_NO_LETTER = re.compile(r"[\W_]+")
_VERSION = re.compile(r"(ENS\w*G\d+)\.\d+", re.IGNORECASE)


class MeantNames(NamedTuple):
    """The names that a typed one means, and a sentence on what was taken; it is empty where the name is there."""

    names: tuple[str, ...]
    note: str = ""


@cache
def _genes_of_alias() -> Mapping[str, tuple[str, ...]]:
    """Symbols of the genes that have a name, by that name as `_plain` writes it."""
    aliases: dict[str, list[str]] = json.loads(resources.files(__package__).joinpath("gene_aliases.json").read_text())
    found: dict[str, list[str]] = {}
    for symbol, others in aliases.items():
        group = [symbol, *others]
        for name in group:
            # older data have an older symbol, so that each name of a gene leads to each other one
            found.setdefault(_plain(name), []).extend(other for other in group if other != name)
    return {name: tuple(dict.fromkeys(symbols)) for name, symbols in found.items()}


def other_names(gene: str, known: Collection[str]) -> tuple[str, ...]:
    """The genes among `known` that have `gene` as another name, in the order of the table of names.

    >>> other_names("CD20", ["CD79A", "MS4A1"])
    ('MS4A1',)
    """
    return tuple(symbol for symbol in _genes_of_alias().get(_plain(gene), ()) if symbol in known)


def symbols_of(gene: str) -> tuple[str, ...]:
    """All other names of a gene that the table of names has; none for a name that it lacks."""
    return _genes_of_alias().get(_plain(gene), ())


def without_version(ensembl_id: str) -> str:
    """An Ensembl id in upper case without the version behind its point; any other text is returned as it is."""
    found = _VERSION.fullmatch(ensembl_id.strip())
    return (found[1] if found else ensembl_id.strip()).upper()


def gene_note(given: str, taken: str) -> str:
    """What is said where the features of a gene of another name are shown."""
    return f"{given} is another name of {taken}, whose features are shown"


def sets_note(given: str, taken: Collection[str]) -> str:
    """What is said where the features of the gene sets with a word are shown."""
    if len(taken) == 1:
        return f"the gene set with {given!r} in its name is {next(iter(taken))}"
    return (
        f"{len(taken)} gene sets have {given!r} in their names: {join_names(list(taken))}; the features of all are "
        "shown, and those of one with its whole name"
    )


def _plain(name: str) -> str:
    return _NO_LETTER.sub("", name).upper()
