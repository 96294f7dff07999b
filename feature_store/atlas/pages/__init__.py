"""The resources of every page, a module a topic."""

from collections.abc import Sequence

from feature_store.atlas.pages import batch, controls, feature, features, overview, run
from feature_store.atlas.resources import Route

ROUTES: Sequence[Route] = (
    *overview.ROUTES,
    *features.ROUTES,
    *feature.ROUTES,
    *batch.ROUTES,
    *controls.ROUTES,
    *run.ROUTES,
)
