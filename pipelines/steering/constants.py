"""The constants that steering results depend on, which are all numeric constants of the modules that compute results.

They are part of a steering run's plan, so that another value gives another run. Constants whose name begins with an
underscore bound memory and change no result.
"""

from types import ModuleType
from typing import Any

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
    return {
        f"{module.__name__.rpartition('.')[2]}.{name}": value
        for module in MODULES
        for name, value in sorted(vars(module).items())
        if name.isupper() and not name.startswith("_") and _is_number(value)
    }


def _is_number(value: Any) -> bool:
    if isinstance(value, tuple):
        return bool(value) and all(map(_is_number, value))
    return isinstance(value, int | float) and not isinstance(value, bool)
