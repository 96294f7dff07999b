"""MLflow: one run per training and per steering evaluation, and the registry of SAEs with its champion.

`store` opens the database and logs runs, `registry` holds the versions and what was measured of them, `headline` says
which figures count and which way, `promotion` moves the champion, `lineage` says what a version came from.
"""

from pipelines.tracking.headline import HEADLINES, Headline
from pipelines.tracking.promotion import Promotion, promote
from pipelines.tracking.registry import CHAMPION, Evaluation, ModelVersion, Tracking
from pipelines.tracking.runs import EXPERIMENT, RUN_TAG

__all__ = [
    "CHAMPION",
    "EXPERIMENT",
    "HEADLINES",
    "RUN_TAG",
    "Evaluation",
    "Headline",
    "ModelVersion",
    "Promotion",
    "Tracking",
    "promote",
]
