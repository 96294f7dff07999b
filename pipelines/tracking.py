"""MLflow: one run per training and per steering evaluation, and the registry of SAEs.

sqlite below the store unless $MLFLOW_TRACKING_URI names a server. Object storage holds no database: for a store there
it is below ./scsae-local, in the folder and on the machine of the driver, and whoever works from several names a
server. Only the driver logs; it makes the database before anything else runs (processes that open a fresh one together
crash in its migrations). mlflow is imported on first use: it takes 1.3 s. Runs are found again by the tag `scsae.run`,
so that a repeated stage logs nothing twice.
"""

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feature_store.errors import NotFoundError
from feature_store.layout import Layout
from pipelines.errors import UsageError

EXPERIMENT = "scsae"
CHAMPION = "champion"
RUN_TAG = "scsae.run"
RANK_METRIC = "select_fvu"
"""What `promote` compares: fraction of variance unexplained on held-out tokens; lower is better."""


@dataclass(frozen=True, kw_only=True)
class ModelVersion:
    """One version in the registry, with what it came from."""

    name: str
    version: int
    aliases: tuple[str, ...]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    model_id: str
    mlflow_run: str


class Tracking:
    """The tracking store of one feature store."""

    def __init__(self, layout: Layout) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        with _quiet():
            import mlflow.pyfunc

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        logging.getLogger("alembic").setLevel(logging.ERROR)
        self._mlflow = mlflow
        folder = layout.mlflow_dir.resolve()
        self.uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
        if self.uri.startswith("sqlite"):
            folder.mkdir(parents=True, exist_ok=True)
        self._select()
        self.client = mlflow.MlflowClient(self.uri, self.uri)
        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        if experiment is not None:
            self.experiment_id = str(experiment.experiment_id)
        else:
            artifacts = (folder / "artifacts").as_uri() if self.uri.startswith("sqlite") else None
            self.experiment_id = str(self.client.create_experiment(EXPERIMENT, artifact_location=artifacts))

    def _select(self) -> None:
        """Point mlflow's global calls at this store, without leaving it in the environment for the next one."""
        kept = {name: os.environ.get(name) for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")}
        self._mlflow.set_tracking_uri(self.uri)
        self._mlflow.set_registry_uri(self.uri)
        for name, value in kept.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    @classmethod
    def existing(cls, layout: Layout) -> "Tracking":
        """Open the registry to read from it; raise NotFoundError, and make nothing, where there is none yet."""
        if not (os.environ.get("MLFLOW_TRACKING_URI") or (layout.mlflow_dir / "mlflow.db").is_file()):
            raise NotFoundError(
                f"{layout.root} has no model registry yet; type `scsae train --store {layout.root}` first"
            )
        return cls(layout)

    def find(self, run: str) -> str | None:
        """Return the finished MLflow run that logged store run `run`, if there is one."""
        found = self.client.search_runs(
            [self.experiment_id], f"tags.`{RUN_TAG}` = '{run}' and attributes.status = 'FINISHED'", max_results=1
        )
        return str(found[0].info.run_id) if found else None

    @contextlib.contextmanager
    def run(self, run: str, *, params: Mapping[str, Any], tags: Mapping[str, str]) -> Iterator[str]:
        """Open an MLflow run for store run `run`, with its parameters; yield the MLflow run id."""
        self._select()
        with _quiet(), self._mlflow.start_run(experiment_id=self.experiment_id, run_name=run) as active:
            self._mlflow.set_tags({**tags, RUN_TAG: run})
            self._mlflow.log_params({key: str(value)[:500] for key, value in params.items()})
            yield active.info.run_id

    def log_curves(self, mlflow_run: str, history: Sequence[Mapping[str, float]]) -> None:
        """Log rows of {"step": n, metric: value, ...} in batches, never one call a number."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(key, float(value), now, int(row["step"]))
            for row in history
            for key, value in row.items()
            if key != "step"
        ]
        for start in range(0, len(metrics), 1000):
            self.client.log_batch(mlflow_run, metrics=metrics[start : start + 1000])

    def log_metrics(self, mlflow_run: str, metrics: Mapping[str, float], *, model_id: str | None = None) -> None:
        """Log final figures of a run; with `model_id` they are attached to that registered model as well."""
        self._mlflow.log_metrics(dict(metrics), run_id=mlflow_run, model_id=model_id)

    def log_files(self, mlflow_run: str, files: Sequence[Path]) -> None:
        """Attach files to a run."""
        for file in files:
            self.client.log_artifact(mlflow_run, str(file))

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
            python_model=str(Path(__file__).with_name("registered_sae.py")),
            artifacts={"sae": str(folder)},
            signature=signature,
            pip_requirements=["scsae"],
        )
        self._mlflow.log_metrics(dict(metrics), model_id=logged.model_id)
        if not self.client.search_registered_models(f"name = '{name}'"):
            self.client.create_registered_model(name)
        version = self.client.create_model_version(
            name, logged.model_uri, run_id=self._mlflow.active_run().info.run_id, tags=dict(tags)
        )
        if self.champion(name) is None:
            self.client.set_registered_model_alias(name, CHAMPION, version.version)
        return self.version(name, int(version.version))

    def champion(self, name: str) -> ModelVersion | None:
        """Return the version of `name` that carries the alias `champion`, if there is one."""
        from mlflow.exceptions import MlflowException

        try:
            found = self.client.get_model_version_by_alias(name, CHAMPION)
        except MlflowException:
            return None
        return self.version(name, int(found.version))

    def version(self, name: str, version: int) -> ModelVersion:
        """Return one registered version; raise UsageError when it does not exist."""
        from mlflow.exceptions import MlflowException

        try:
            found = self.client.get_model_version(name, str(version))
        except MlflowException:
            known = ", ".join(f"{v.name} {v.version}" for v in self.versions()) or "none"
            raise UsageError(f"{name} version {version} is not registered; registered: {known}") from None
        model_id = str(found.source).rsplit("/", 1)[-1]
        metrics = {m.key: m.value for m in self.client.get_logged_model(model_id).metrics or []}
        return ModelVersion(
            name=name,
            version=version,
            aliases=tuple(found.aliases),
            metrics=metrics,
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
        return next((v for v in self.versions() if v.tags.get(RUN_TAG) == run), None)

    def promote(self, name: str, version: int) -> ModelVersion:
        """Give `champion` to a version; raise UsageError when its select FVU is worse than the champion's."""
        candidate, champion = self.version(name, version), self.champion(name)
        if champion is not None and champion.version != version:
            new, old = candidate.metrics.get(RANK_METRIC), champion.metrics.get(RANK_METRIC)
            if new is None or (old is not None and new > old):
                raise UsageError(
                    f"{name} version {version} has {RANK_METRIC} {new}, the champion (version {champion.version}) "
                    f"{old}; only a version that is at least as good (lower is better) can be promoted"
                )
        self.client.set_registered_model_alias(name, CHAMPION, str(version))
        return self.version(name, version)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep mlflow's advice about type hints and input examples off the screen: the signature is given."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?is).*(type hint|input example)")
        shown = warnings.showwarning

        def show(message: Warning | str, *rest: Any, **more: Any) -> None:
            # mlflow resets the filters before it gives this advice
            if "type hint" not in str(message).lower():
                shown(message, *rest, **more)

        warnings.showwarning = show
        yield
