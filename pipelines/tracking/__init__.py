"""MLflow: one run for each training and each steering evaluation, and the registry of SAEs with its champion.

`runs` opens the database and logs runs. `registry` holds the versions of each SAE and their metrics. `promotion`
decides whether a version becomes the champion. `provenance` records the inputs of a version, and `registration`
registers an SAE of the store.
`feature_store.query.metrics` holds the metrics that are compared and their directions.
"""

from pipelines.tracking.promotion import Promotion, promote
from pipelines.tracking.registry import CHAMPION, Evaluation, ModelVersion, Tracking
from pipelines.tracking.runs import EXPERIMENT, RUN_TAG

__all__ = [
    "CHAMPION",
    "EXPERIMENT",
    "RUN_TAG",
    "Evaluation",
    "ModelVersion",
    "Promotion",
    "Tracking",
    "promote",
]
