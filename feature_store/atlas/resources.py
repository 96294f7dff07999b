"""All resources of the atlas of one store: the routes of every page, and the look-up of a path among them.

The server makes a resource when a browser asks for it, and an export writes all of them to files of the same paths, so
both are the same page. The pages import `routes` and `data`; this module alone imports the pages.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence

import polars as pl

from feature_store.atlas.data import AtlasData, NoSuchResource
from feature_store.atlas.pages import (
    batch,
    cells,
    controls,
    feature,
    features,
    labels,
    modules,
    names,
    overview,
    run,
    selection_recipes,
    selections,
    steering,
)
from feature_store.atlas.routes import Resource, Route
from feature_store.errors import StoreError
from feature_store.query.store import FeatureStore

ROUTES: Sequence[Route] = (
    *overview.ROUTES,
    *features.ROUTES,
    *feature.ROUTES,
    *names.ROUTES,
    *labels.ROUTES,
    *modules.ROUTES,
    *cells.ROUTES,
    *selections.ROUTES,
    *selection_recipes.ROUTES,
    *batch.ROUTES,
    *controls.ROUTES,
    *run.ROUTES,
    *steering.ROUTES,
)
_NEEDED_FIRST = ("atlas.json", "features.cols", "cells.cols", "names.json", "labels/0.cols")


class Resources:
    """All resources of one store.

    One resource is made at a time: resources share tables that are read once, and Polars uses all cores for one.
    """

    def __init__(self, store: FeatureStore) -> None:
        self.data = AtlasData(store)
        self._lock = threading.Lock()

    def get(self, path: str) -> Resource | None:
        """The resource of a path, or None where there is none. Raises IntegrityError for a damaged store."""
        for route in ROUTES:
            places = route.places(path)
            if places is not None:
                with self._lock:
                    try:
                        return Resource(route.make(self.data, *places), route.media_type)
                    except NoSuchResource:
                        return None
                    except (OSError, pl.exceptions.PolarsError) as error:
                        self.data.store.raise_if_damaged(error)
                        raise
        return None

    def warm(self) -> None:
        """Read the tables that most pages need, so that the first page is as fast as later ones."""
        for path in _NEEDED_FIRST:
            with contextlib.suppress(StoreError):
                # careful: the request that needs the resource reports the error
                self.get(path)

    def paths(self) -> Iterator[str]:
        """The paths of all resources."""
        for _, paths in self.kinds():
            yield from paths

    def kinds(self) -> Iterator[tuple[str, list[str]]]:
        """The pattern of each kind of resource, and the paths of all resources of the kind."""
        for route in ROUTES:
            yield route.pattern, list(route.paths(self.data))
