"""The registry: the versions of SAEs, the champion among them, and the steering evaluations of each.

Registering a version is the last step, with tags for the run and the hash of its manifest, so that a rerun finds it. An
evaluation is an MLflow run of its own with a tag for the SAE's run; its metrics are also attached to the version's
LoggedModel.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from feature_store.query.metrics import COMPARED_BY
from pipelines.config.train import MAX_NAME
from pipelines.errors import UsageError
from pipelines.runtime.visible import visible
from pipelines.tracking.runs import RUN_TAG, TrackingStore

CHAMPION = "champion"
KIND_TAG, SAE_TAG, DATASET_TAG, QUESTION_TAG = "scsae.kind", "scsae.sae", "scsae.dataset", "scsae.question"
MISSING_TAG = "scsae.missing"
"""The tag with the metrics of the training that could not be measured, each with its reason, as JSON."""
ANSWER = "test/chosen"
"""The prefix of the metrics of the chosen variant on `test` cells in an evaluation."""
MODEL_CODE = Path(__file__).parent.with_name("registered_sae.py")


@dataclass(frozen=True, kw_only=True)
class ModelVersion:
    """One version in the registry, with its provenance."""

    name: str
    version: int
    aliases: tuple[str, ...]
    metrics: Mapping[str, float]
    """The metrics of its training."""
    tags: Mapping[str, str]
    model_id: str
    mlflow_run: str

    @property
    def missing(self) -> dict[str, str]:
        """The reason for each metric of its training that could not be measured."""
        return dict(json.loads(self.tags.get(MISSING_TAG, "{}")))


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One steering evaluation that was logged."""

    run: str
    """The id of the steering run."""
    mlflow_run: str
    sae: str
    task: str
    """The steering task in words, such as "stim -> ctrl"; evaluations of one task measure the same thing."""
    dataset: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]

    @property
    def headlines(self) -> dict[str, float]:
        """The metrics of the chosen variant on `test` cells that compare versions; the first one decides."""
        found = {name: self.metrics.get(f"{ANSWER}/{name}") for name in COMPARED_BY}
        return {name: value for name, value in found.items() if value is not None}

    def label(self, headline: str) -> str:
        """The full name of a metric, with its task and data set: "remaining (stim -> ctrl, DATASET)"."""
        return f"{headline} ({self.task}, {self.dataset})"


def registered_name(text: str) -> str:
    """Return a text as a name that the registry takes: the folder of a model may be called anything."""
    kept = "".join("-" if one in "/:" or not one.isprintable() else one for one in text)
    return kept[:MAX_NAME].lstrip(".")


class Tracking(TrackingStore):
    """The tracking store of one feature store, with the registry in it."""

    def register(
        self,
        folder: Path,
        *,
        name: str,
        d_model: int,
        n_features: int,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
    ) -> ModelVersion:
        """Log the SAE in `folder` inside the active run and register it with its tags; the first is the champion."""
        import numpy as np
        from mlflow.models import ModelSignature
        from mlflow.types import Schema, TensorSpec

        signature = ModelSignature(
            inputs=Schema([TensorSpec(np.dtype("float32"), (-1, d_model))]),
            outputs=Schema([TensorSpec(np.dtype("float32"), (-1, n_features))]),
        )
        logged = self._mlflow.pyfunc.log_model(
            name="sae",
            python_model=str(MODEL_CODE),
            artifacts={"sae": str(folder)},
            signature=signature,
            pip_requirements=["scsae"],
        )
        active = self._mlflow.active_run().info.run_id
        self.log_metrics(active, metrics, model_id=logged.model_id)
        if not self._knows(name):
            self.client.create_registered_model(name)
        version = self.client.create_model_version(
            name, logged.model_uri, run_id=active, tags={key: visible(value) for key, value in tags.items()}
        )
        return self.settled(self.version(name, int(version.version)))

    def _knows(self, name: str) -> bool:
        from mlflow.exceptions import MlflowException

        # careful: a search by name would have to quote it
        try:
            self.client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        return True

    def settled(self, found: ModelVersion) -> ModelVersion:
        """The version, after the alias that a crash may have prevented is set if its name has no champion yet."""
        if self.champion(found.name) is None:
            self.client.set_registered_model_alias(found.name, CHAMPION, str(found.version))
        return self.version(found.name, found.version)

    def champion(self, name: str) -> ModelVersion | None:
        """Return the version of `name` that carries the alias `champion`, if there is one."""
        from mlflow.exceptions import MlflowException

        try:
            found = self.client.get_model_version_by_alias(name, CHAMPION)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return None
        return self.version(name, int(found.version))

    def version(self, name: str, version: int) -> ModelVersion:
        """Return one registered version; raise UsageError if it does not exist."""
        from mlflow.exceptions import MlflowException

        try:
            found = self.client.get_model_version(name, str(version))
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            known = ", ".join(f"{v.name} {v.version}" for v in self.versions()) or "none"
            raise UsageError(f"{name} version {version} is not registered; registered: {known}") from None
        model_id = str(found.source).rsplit("/", 1)[-1]
        metrics = self.client.get_logged_model(model_id).metrics or []
        return ModelVersion(
            name=name,
            version=version,
            aliases=tuple(found.aliases),
            metrics={m.key: m.value for m in metrics if m.run_id == found.run_id},
            tags=dict(found.tags),
            model_id=model_id,
            mlflow_run=str(found.run_id),
        )

    def versions(self) -> list[ModelVersion]:
        """Return every registered version, by name and version."""
        found = self.client.search_model_versions(order_by=["name ASC", "version_number ASC"])
        return [self.version(item.name, int(item.version)) for item in found]

    def of_run(self, run: str) -> ModelVersion | None:
        """Return the version registered for store run `run`, if there is one."""
        found = self.client.search_model_versions(f"tags.`{RUN_TAG}` = '{run}'", max_results=1)
        return self.version(found[0].name, int(found[0].version)) if found else None

    def evaluations(self, sae: str | None = None) -> list[Evaluation]:
        """Return the steering evaluations with a complete log, newest first, of one SAE's run or of all."""
        wanted = f"tags.`{KIND_TAG}` = 'steering' and attributes.status = 'FINISHED'"
        if sae is not None:
            wanted += f" and tags.`{SAE_TAG}` = '{sae}'"
        found, token = [], None
        while True:
            page = self.client.search_runs([self.experiment_id], wanted, page_token=token)
            found += list(page)
            token = page.token
            if not token:
                break
        return [
            Evaluation(
                run=run.data.tags[RUN_TAG],
                mlflow_run=run.info.run_id,
                sae=run.data.tags[SAE_TAG],
                task=run.data.tags.get(QUESTION_TAG, ""),
                dataset=run.data.tags.get(DATASET_TAG, ""),
                params=run.data.params,
                metrics=run.data.metrics,
            )
            for run in found
        ]
