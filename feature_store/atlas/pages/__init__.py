"""The resources of every page, a module a topic."""

from collections.abc import Sequence

from feature_store.atlas.pages import batch, cells, controls, feature, features, names, overview, run, steering
from feature_store.atlas.resources import Route

ROUTES: Sequence[Route] = (
    *overview.ROUTES,
    *features.ROUTES,
    *feature.ROUTES,
    *names.ROUTES,
    *cells.ROUTES,
    *batch.ROUTES,
    *controls.ROUTES,
    *run.ROUTES,
    *steering.ROUTES,
)
