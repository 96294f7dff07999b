"""The tracking store, which holds one MLflow run for each store run, however often that is logged.

The database is sqlite below the store unless $MLFLOW_TRACKING_URI names a server. Object storage cannot hold a
database. For a store there it is below ./scsae-local in the working folder of the driver, and work from several
machines needs a server. Only drivers log. Processes that create a database at the same time crash in its migrations,
and two that look for a run at the same time log it twice, so both steps hold a lock (flock) beside the database. mlflow
is imported on first use, because that takes 1.3 s.

Runs are found again by the tag `scsae.run`. The next call completes a run that a crash left unfinished. Its content is
the same, because it follows from the store run, and metrics carry the start of the run as their time, so that a metric
that is logged twice is stored once.
"""

import contextlib
import fcntl
import logging
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from feature_store.errors import NotFoundError, StoreWriteError
from feature_store.storage.filesystem import clear_write_errors
from feature_store.storage.layout import Layout
from pipelines.errors import RunFailedError, UsageError
from pipelines.runtime.visible import visible

if TYPE_CHECKING:
    from mlflow.entities import Run

EXPERIMENT = "scsae"
RUN_TAG = "scsae.run"
CHECKED_TAG = "scsae.writable"
VALUE_CHARACTERS = 500
BATCH = 1000
"""Largest number of metrics in one call, which is the limit of a server."""
MODEL_BATCH = 100
"""The same limit for metrics of a model: mlflow fails on more of them if some are logged already."""
_SQLITE = "sqlite:///"
_UNWRITABLE = re.compile(r"readonly database|unable to open database|disk is full|Permission denied|Read-only", re.I)


class TrackingStore:
    """The runs and their metrics in the tracking store of one feature store."""

    def __init__(self, layout: Layout, *, reads: bool = False) -> None:
        """Open the database; with `reads`, an existing one without a lock, so that a read-only store can be read.

        Raises:
            StoreWriteError: the database cannot be made.
            UsageError: $MLFLOW_TRACKING_URI is not an address that MLflow supports.
            RunFailedError: the server does not answer.
        """
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        # careful: the default of 7 retries doubles each pause, so a server that is down is reported after minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        with quiet():
            import mlflow.pyfunc

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        logging.getLogger("alembic").setLevel(logging.ERROR)
        self.layout = layout
        self._mlflow = mlflow
        folder = layout.mlflow_dir.resolve()
        self.uri = os.environ.get("MLFLOW_TRACKING_URI") or f"{_SQLITE}{folder / 'mlflow.db'}"
        is_sqlite = self.uri.startswith(_SQLITE)
        file = self.uri.removeprefix(_SQLITE).partition("?")[0].removeprefix("file:")
        database = Path(file) if is_sqlite else folder / "server"
        self._lock = database.with_suffix(".lock")
        with contextlib.nullcontext() if reads else self._locked(), self._clear_errors():
            self._select()
            self.client = mlflow.MlflowClient(self.uri, self.uri)
            experiment = self.client.get_experiment_by_name(EXPERIMENT)
            if experiment is not None:
                self.experiment_id = str(experiment.experiment_id)
            else:
                artifacts = (database.parent / "artifacts").as_uri() if is_sqlite else None
                self.experiment_id = str(self.client.create_experiment(EXPERIMENT, artifact_location=artifacts))

    @classmethod
    def existing(cls, layout: Layout) -> Self:
        """Open the registry to read from it; raise NotFoundError, and create nothing, if there is none yet."""
        if not (os.environ.get("MLFLOW_TRACKING_URI") or (layout.mlflow_dir / "mlflow.db").is_file()):
            raise NotFoundError(
                f"{layout.root} has no model registry yet; type `scsae train {layout.store_option}` first"
            )
        return cls(layout, reads=bool((layout.mlflow_dir / "mlflow.db").is_file()))

    def check_writable(self) -> None:
        """Write a tag of the experiment, which has no other use than to fail before the work does.

        Raises:
            StoreWriteError, RunFailedError: see `exclusive`.
        """
        with self.exclusive():
            self.client.set_experiment_tag(self.experiment_id, CHECKED_TAG, "yes")

    def _select(self) -> None:
        """Point mlflow's global calls at this store, and keep its address out of the environment."""
        kept = {name: os.environ.get(name) for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")}
        self._mlflow.set_tracking_uri(self.uri)
        self._mlflow.set_registry_uri(self.uri)
        for name, value in kept.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the lock of the database while a run is looked for and logged; the lock is not reentrant.

        Raises:
            StoreWriteError: the database cannot be written.
            RunFailedError: the server failed; the run in the store is kept, and a rerun logs it.
        """
        with self._locked(), self._clear_errors():
            yield

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with clear_write_errors(self._lock.parent):
            self._lock.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with contextlib.suppress(OSError):
                # a file system without flock is not shared, so the lock is not needed there
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _clear_errors(self) -> Iterator[None]:
        """Turn errors of MLflow into errors of this package with the next command."""
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (MlflowException, SQLAlchemyError) as error:
            text = str(error).strip().splitlines()[0]
            if _UNWRITABLE.search(str(error)):
                raise StoreWriteError(
                    f"cannot write the tracking database {self.uri}: {text}; free the disk, fix the permissions or "
                    "name a server in MLFLOW_TRACKING_URI, then run the command again: it keeps what is committed"
                ) from error
            if "unsupported uri" in text.lower():
                raise UsageError(
                    f"MLFLOW_TRACKING_URI was {self.uri!r}, which MLflow does not know; give http://HOST:PORT or "
                    "sqlite:////PATH.db, or unset it for a database in the store"
                ) from error
            raise RunFailedError(
                f"MLflow at {self.uri} failed: {text}; see that it answers (MLFLOW_TRACKING_URI), then run the "
                "command again: it keeps what is committed and logs the rest"
            ) from error

    def logged(self, run: str) -> "list[Run]":
        """The MLflow runs of store run `run`, finished or not, newest first."""
        return list(self.client.search_runs([self.experiment_id], f"tags.`{RUN_TAG}` = '{run}'"))

    def find(self, run: str) -> str | None:
        """Return the finished MLflow run that logged store run `run`, if there is one."""
        return next((str(found.info.run_id) for found in self.logged(run) if found.info.status == "FINISHED"), None)

    @contextlib.contextmanager
    def run(self, run: str, *, params: Mapping[str, Any], tags: Mapping[str, str]) -> Iterator[str]:
        """Open the MLflow run of store run `run`, or a new one, log its parameters and yield the MLflow run id."""
        self._select()
        # labels and paths are logged as they are printed, because other programs print them from there
        tags = {name: visible(value) for name, value in tags.items()}
        left = next(iter(self.logged(run)), None)
        # careful: a parameter of a run cannot be changed, and an older version may have logged another value
        known = left.data.params if left else {}
        with (
            quiet(),
            self._mlflow.start_run(
                run_id=left.info.run_id if left else None,
                experiment_id=self.experiment_id,
                run_name=run,
                tags={**tags, RUN_TAG: run},
            ) as active,
        ):
            # a run that is resumed ignores the tags of start_run
            self._mlflow.set_tags({**tags, RUN_TAG: run})
            new = {key: visible(str(value))[:VALUE_CHARACTERS] for key, value in params.items() if key not in known}
            self._mlflow.log_params(new)
            yield active.info.run_id

    def log_curves(self, mlflow_run: str, history: Sequence[Mapping[str, float]]) -> None:
        """Log rows of {"step": n, metric: value, ...} in batches, and not with one call per number."""
        self._log(
            mlflow_run,
            [(key, float(value), int(row["step"])) for row in history for key, value in row.items() if key != "step"],
        )

    def log_metrics(self, mlflow_run: str, metrics: Mapping[str, float], *, model_id: str | None = None) -> None:
        """Log the final metrics of a run; with `model_id` they are also attached to that registered model."""
        self._log(mlflow_run, [(key, float(value), 0) for key, value in metrics.items()], model_id=model_id)

    def _log(self, mlflow_run: str, values: Sequence[tuple[str, float, int]], *, model_id: str | None = None) -> None:
        from mlflow.entities import Metric

        started = self.client.get_run(mlflow_run).info.start_time
        metrics = [
            Metric(key, value, started, step, model_id=model_id, run_id=mlflow_run)
            for key, value, step in values
            if math.isfinite(value)
        ]
        size = BATCH if model_id is None else MODEL_BATCH
        for start in range(0, len(metrics), size):
            self.client.log_batch(mlflow_run, metrics=metrics[start : start + size])

    def log_files(self, mlflow_run: str, files: Sequence[Path], *, folder: str | None = None) -> None:
        """Attach files to a run, in a folder of its artifacts."""
        for file in files:
            self.client.log_artifact(mlflow_run, str(file), folder)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress mlflow's advice about type hints and input examples, because the signature is given."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?is).*(type hint|input example)")
        shown = warnings.showwarning

        def show(message: Warning | str, *rest: Any, **more: Any) -> None:
            # mlflow resets the filters before it gives this advice
            if "type hint" not in str(message).lower():
                shown(message, *rest, **more)

        warnings.showwarning = show
        yield
