"""MLflow: one run for each training and each steering evaluation, and the registry of SAEs with its champion.

`runs` opens the database and logs runs. `registry` holds the versions of each SAE and what was measured of them.
`promotion` decides whether a version becomes the champion. `provenance` says what a version was made from. Which
metrics count, and which way, is in `feature_store.query.metrics`.
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
