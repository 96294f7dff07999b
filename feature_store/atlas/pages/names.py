"""Names to search for, and the features that go with each of them.

A name is its place in its list: of labels in that of the overview (`Opened.labels`), of genes and gene sets in that of
`names.json`. At most `ranking.MOST` features are told of each.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import polars as pl

from feature_store.atlas.opened import Opened, place
from feature_store.atlas.ranking import Ranking, names_in, ranking
from feature_store.atlas.resources import Route, json_bytes
from feature_store.query.store import KIND_OF, RANKED_BY


def names(opened: Opened) -> bytes:
    """Lists of names: labels [label_kind, label], genes, gene_sets [collection, gene_set], quiet_genes (of the data
    set, but without a feature), n_cells; what the store has no table for is under `missing`, by list.
    """
    facts: dict[str, Any] = {"missing": {}, "n_cells": sum(opened.n_cells.values()) if opened.has("cells") else 0}
    for asked, key in (("label", "labels"), ("gene", "genes"), ("gene_set", "gene_sets")):
        if opened.has(RANKED_BY[asked][0]):
            facts[key] = [row if asked in KIND_OF else row[0] for row in _names(opened, asked).rows()]
        else:
            facts[key] = []
            facts["missing"][key] = opened.missing(RANKED_BY[asked][0])["missing"]
    known = set(facts["genes"])
    every: set[str] = set()
    if opened.has("genes"):
        every = set(opened.store.frame("genes").select(pl.col("symbol").drop_nulls()).collect()["symbol"])
    return json_bytes({**facts, "quiet_genes": sorted(every - known)})


def _names(opened: Opened, asked: str) -> pl.DataFrame:
    return opened.labels if asked == "label" else opened.once(_LISTS[asked])


def _list(asked: str) -> Callable[[Opened], pl.DataFrame]:
    return lambda opened: names_in(opened.store, asked)


def _ranking(asked: str) -> Callable[[Opened], Ranking]:
    return lambda opened: ranking(opened.store, asked, _names(opened, asked))


_LISTS = {asked: _list(asked) for asked in ("gene", "gene_set")}
_RANKINGS = {asked: _ranking(asked) for asked in RANKED_BY}


def _route(pattern: str, asked: str) -> Route:
    """The features that go with one name, as `Ranking.of`: best first."""
    table = RANKED_BY[asked][0]

    def make(opened: Opened, name: str) -> bytes:
        if not opened.has(table):
            return json_bytes(opened.missing(table))
        i = place(name, _names(opened, asked).height)
        return json_bytes(opened.once(_RANKINGS[asked]).of(i))

    def every(opened: Opened) -> Iterator[tuple[str]]:
        n = _names(opened, asked).height if opened.has(table) else 0
        return ((str(i),) for i in range(n))

    return Route(pattern=pattern, make=make, names=every)


ROUTES: Sequence[Route] = (
    Route(pattern="names.json", make=names),
    _route("genes/{id}.json", "gene"),
    _route("gene_sets/{id}.json", "gene_set"),
    _route("label_features/{id}.json", "label"),
)
