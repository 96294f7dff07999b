"""Names to search for, and the features that go with each of them.

A path names a label, gene or gene set by its place in a list: `AtlasData.labels` for labels, the lists of `names.json`
for genes and gene sets. At most `ranking.MOST` features are listed for each.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import polars as pl

from feature_store.atlas.data import AtlasData, path_number
from feature_store.atlas.pages.feature_effects import changers
from feature_store.atlas.ranking import Ranking, names_in, ranking
from feature_store.atlas.routes import Route, json_bytes
from feature_store.query.store import KIND_OF, RANKED_BY


def names(data: AtlasData) -> bytes:
    """Lists of names: labels [label_kind, label], genes, gene_sets [collection, gene_set], quiet_genes (of the data
    set, but without a feature), n_cells; what the store has no table for is under `missing`, by list.
    """
    facts: dict[str, Any] = {"missing": {}, "n_cells": sum(data.n_cells.values()) if data.has("cells") else 0}
    for name_type, key in (("label", "labels"), ("gene", "genes"), ("gene_set", "gene_sets")):
        if data.has(RANKED_BY[name_type][0]):
            facts[key] = [row if name_type in KIND_OF else row[0] for row in _names(data, name_type).rows()]
        else:
            facts[key] = []
            facts["missing"][key] = data.missing(RANKED_BY[name_type][0])["missing"]
    known = set(facts["genes"])
    every: set[str] = set()
    if data.has("genes"):
        every = set(data.store.frame("genes").select(pl.col("symbol").drop_nulls()).collect()["symbol"])
    return json_bytes({**facts, "quiet_genes": sorted(every - known)})


def _names(data: AtlasData, name_type: str) -> pl.DataFrame:
    return data.labels if name_type == "label" else data.cached(_LISTS[name_type])


def _list(name_type: str) -> Callable[[AtlasData], pl.DataFrame]:
    return lambda data: names_in(data.store, name_type)


def _ranking(name_type: str) -> Callable[[AtlasData], Ranking]:
    return lambda data: ranking(data.store, name_type, _names(data, name_type))


_LISTS = {name_type: _list(name_type) for name_type in ("gene", "gene_set")}
_RANKINGS = {name_type: _ranking(name_type) for name_type in RANKED_BY}


def _route(pattern: str, name_type: str) -> Route:
    """The features that go with one name, as `Ranking.of`: best first; for a gene also those that change it."""
    table = RANKED_BY[name_type][0]

    def make(data: AtlasData, name: str) -> bytes:
        if not data.has(table):
            return json_bytes(data.missing(table))
        i = path_number(name, _names(data, name_type).height)
        found = data.cached(_RANKINGS[name_type]).of(i)
        return json_bytes({**found, "changed_by": changers(data, found["gene"])} if name_type == "gene" else found)

    def every(data: AtlasData) -> Iterator[tuple[str]]:
        n = _names(data, name_type).height if data.has(table) else 0
        return ((str(i),) for i in range(n))

    return Route(pattern=pattern, make=make, names=every)


ROUTES: Sequence[Route] = (
    Route(pattern="names.json", make=names),
    _route("genes/{id}.json", "gene"),
    _route("gene_sets/{id}.json", "gene_set"),
    _route("label_features/{id}.json", "label"),
)
