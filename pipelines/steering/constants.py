"""The constants that steering results depend on, which are all numeric constants of the modules that compute results.

They are part of a steering run's plan, so that another value gives another run. Constants whose name begins with an
underscore bound memory and change no result.
"""

from types import ModuleType
from typing import Any

from feature_store.storage.plans import constants_of
from pipelines.steering import (
    actors,
    dose_selection,
    embedding_baselines,
    evaluation,
    evaluation_cells,
    evaluators,
    feature_selection,
    group_means,
    masked_gene_prediction,
    token_sample,
)
from pipelines.steering.metrics import (
    distances,
    dose_response,
    intervals,
    knn,
    mixing,
    scib,
    type_preservation,
)

MODULES: tuple[ModuleType, ...] = (
    actors,
    distances,
    dose_response,
    dose_selection,
    embedding_baselines,
    evaluation,
    evaluation_cells,
    evaluators,
    feature_selection,
    group_means,
    intervals,
    knn,
    masked_gene_prediction,
    mixing,
    scib,
    token_sample,
    type_preservation,
)


def result_constants() -> dict[str, Any]:
    """Return the constants by `module.NAME`."""
    return constants_of(MODULES)
