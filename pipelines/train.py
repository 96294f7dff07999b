"""Training: a Ray Train job that fits sparse autoencoders to stored activations.

The loop is a plain function, `training_loop.fit`; Ray Train schedules its workers in the cluster and restarts them.
Each SAE is a run of its own whose name is a hash of its plan, so an SAE that is trained alone, again, or in a sweep
with others is the same run with the same bytes.
"""

import contextlib
import json
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_store.activations import ActivationReader
from feature_store.query.runs import resolve_run
from feature_store.storage import commit, filesystem
from feature_store.storage.layout import SUMMARY, Layout, as_path
from feature_store.storage.plans import ActivationsPlan, SAEPlan, as_json
from pipelines.config import TrainOptions
from pipelines.errors import UsageError
from pipelines.moved_data import record_new_place
from pipelines.runtime import idle_actors
from pipelines.runtime.checks import check_before_work, check_tracking
from pipelines.runtime.cluster import actors_that_fit, ray_session
from pipelines.runtime.failures import explained, root_cause
from pipelines.runtime.progress import activity, progress_bar, repeated, stderr_console
from pipelines.runtime.stage import Clock, StageResult
from pipelines.tracking.registration import register_sae
from pipelines.training_loop import (
    PROGRESS,
    SAEJob,
    TrainJob,
    create_sae_run,
    evaluation_constants,
    fit,
    shown_figures,
)

if TYPE_CHECKING:
    from sae_core.sae import SAEConfig, TrainConfig

POLL_S = 0.5
AT_START, AT_END = "starts its workers", "measures the SAE on select and test tokens and cells"
"""What is said before the first step and after the last one."""


class TrainingWarnings:
    """Shows early warnings on stderr, once per run and kind."""

    def __init__(self) -> None:
        self._shown: set[tuple[str, str]] = set()

    def show(self, run: str, findings: Sequence[dict[str, Any]]) -> None:
        """Print those warnings that have not been shown before."""
        for found in findings:
            if (run, found["kind"]) not in self._shown:
                self._shown.add((run, found["kind"]))
                text = f"warning: saes/{run}, step {found['step']}: {found['message']}"
                stderr_console().print(text, style="yellow", soft_wrap=True)


def train(options: TrainOptions, store: Path, *, address: str | None = None) -> StageResult:
    """Fit one SAE to an activations run, save it and register it; calling it again resumes. See `train_all`."""
    asked = {"arch": options.arch, "k": options.k, "l1_coefficient": options.l1_coefficient}
    if several := {name: values for name, values in asked.items() if len(values) > 1}:
        raise UsageError(f"one SAE is trained here, but there are several of {several}; give one of each")
    (result,) = train_all(options, store, address=address)
    return result


def train_all(options: TrainOptions, store: Path, *, address: str | None = None) -> list[StageResult]:
    """Fit an SAE for each combination of arch, k and l1_coefficient, reading the activations once for all.

    Raises:
        NotFoundError, ConfigError, UsageError: there are no activations, or an option is not allowed; nothing is
            written.
        TrainingError: a loss is not finite; the last good checkpoint is kept, and the other SAEs are finished.
        IntegrityError: a part of the activations is missing or damaged; the last checkpoint is kept.
    """
    from sae_core.errors import TrainingError

    clock = Clock()
    layout = Layout(store)
    check_before_work(layout, address=address)
    parent = commit.Run.open(resolve_run(layout, "activations", options.activations, option="--activations").path)
    # damaged activations are reported even if every SAE is complete
    parent.manifest()
    source = ActivationsPlan.of(parent)
    record_new_place(layout, source.dataset, options.data)
    train_config = train_config_of(options)
    plans = [
        SAEPlan(
            control_of=source.control_of,
            activations=parent.path.name,
            dataset=source.dataset,
            model=source.model,
            model_digest=source.model_digest,
            site=source.site,
            sae=sae_config.to_dict(),
            train=train_config.to_dict(),
            baseline=None,
            imported=None,
            n_ranks=max(1, options.num_workers),
            recovery_cells=options.recovery_cells,
            evaluation=as_json(evaluation_constants()),
        )
        for sae_config in sae_configs_of(options, source.d_model)
    ]
    _check_shares(options, parent)
    check_tracking(layout)
    runs = [create_sae_run(layout, plan) for plan in plans]
    pending = [run for run in runs if run.pending()]
    early_warnings, failed = TrainingWarnings(), None
    if pending:
        job = TrainJob(
            activations=str(parent.path.resolve()),
            store=str(layout.root.resolve()),
            dataset=source.dataset,
            saes=tuple(
                SAEJob(folder=str(run.path.resolve()), sae=dict(plan.sae), train=dict(plan.train))
                for run, plan in zip(runs, plans, strict=True)
                if run in pending
            ),
            checkpoint_steps=options.checkpoint_steps,
            recovery_cells=options.recovery_cells,
            device="cuda" if options.num_gpus > 0 else "cpu",
            n_threads=options.num_cpus,
        )
        with contextlib.ExitStack() as drivers:
            for run in pending:
                drivers.enter_context(run.exclusive())
            try:
                _run_job(job, options, early_warnings, address=address)
            except TrainingError as error:
                failed = error
    results = []
    for run, plan in zip(runs, plans, strict=True):
        if failed is not None and run.pending():
            continue
        run.finalize()
        summary = run.read_json(SUMMARY)
        findings = summary.pop("findings")
        if run in pending:
            early_warnings.show(run.path.name, findings)
        summary = shown_figures(summary)
        summary |= {found["kind"]: f"step {found['step']}: {found['message']}" for found in findings}
        with activity("train", f"registers saes/{run.path.name} in MLflow"):
            version = register_sae(layout, run, name=options.name)
        results.append(
            StageResult(
                kind="saes",
                run=run.path.name,
                path=run.path,
                done=options.n_steps if run in pending else 0,
                reused=0 if run in pending else options.n_steps,
                seconds=clock.seconds,
                facts={"arch": plan.arch, "k": plan.k, **summary, "registered": version},
            )
        )
    if failed is not None:
        raise failed
    return results


def sae_configs_of(options: TrainOptions, d_model: int) -> "list[SAEConfig]":
    """Return the configurations of the requested SAEs without duplicates; ConfigError if one is not allowed."""
    from sae_core.sae import SAEConfig
    from sae_core.sae.architectures import architecture

    shared: dict[str, Any] = {
        "d_model": d_model,
        "n_features": options.n_features or 8 * d_model,
        "orthogonality_coefficient": options.orthogonality_coefficient,
    }
    if options.groups:
        shared["groups"] = options.groups
    configs = []
    for arch, k, l1 in product(options.arch, options.k, options.l1_coefficient or (None,)):
        architecture(arch)
        own = {"arch": arch, "k": k} if l1 is None else {"arch": arch, "k": k, "l1_coefficient": l1}
        configs.append(SAEConfig.from_dict({**shared, **own}))
    return list(dict.fromkeys(configs))


def train_config_of(options: TrainOptions) -> "TrainConfig":
    """Return the training configuration; ConfigError if it is not allowed."""
    from sae_core.sae import TrainConfig

    given = {
        name: getattr(options, name)
        for name in ("warmup_fraction", "decay_fraction", "sparsity_warmup_fraction", "dead_window_tokens")
        if getattr(options, name) is not None
    }
    return TrainConfig(
        n_steps=options.n_steps,
        batch_size=options.batch_size,
        lr=options.lr,
        encoder_precision=options.encoder_precision,
        seed=options.seed,
        **given,
    )


def _check_shares(options: TrainOptions, parent: commit.Run) -> None:
    """Raise UsageError if the workers cannot share a step's tokens evenly, or outnumber the row groups."""
    n = max(1, options.num_workers)
    if options.batch_size % n:
        raise UsageError(
            f"--batch-size was {options.batch_size}, which {n} workers cannot share evenly; give a multiple of {n}"
        )
    if n > 1 and (n_groups := len(ActivationReader(parent).row_groups)) < n:
        raise UsageError(
            f"--num-workers was {n}, but activations/{parent.path.name} has {n_groups} row groups to share; give at "
            f"most {n_groups}, or extract in smaller shards (--shard-cells)"
        )


def _run_job(job: TrainJob, options: TrainOptions, early_warnings: TrainingWarnings, *, address: str | None) -> None:
    """Run the loop under Ray Train and show its progress; an expected error of the loop is raised unchanged."""
    # the workers write in processes of their own
    filesystem.note_write()
    with ray_session(address=address), progress_bar("train", options.n_steps, "steps") as report:
        import ray.train
        from ray.train.torch import TorchTrainer

        if options.num_workers:
            # they hold cores and GPUs that the workers need
            idle_actors.end_all()
        _say_if_waiting(options)
        resources: dict[str, float] = {"CPU": options.num_cpus}
        if options.num_gpus > 0:
            resources["GPU"] = options.num_gpus
        trainer = TorchTrainer(
            train_loop,
            train_loop_config={"job": job},
            scaling_config=ray.train.ScalingConfig(
                num_workers=options.num_workers, use_gpu=options.num_gpus > 0, resources_per_worker=resources
            ),
            run_config=ray.train.RunConfig(name="ray_train", storage_path=job.saes[0].folder),
        )
        folders = [as_path(one.folder) for one in job.saes]
        with _shown_progress(folders, options.n_steps, report, early_warnings), _ctrl_c_interrupts():
            try:
                trainer.fit()
            except Exception as error:  # noqa: BLE001  Ray wraps whatever a worker raises
                raise explained(root_cause(error)) from None


def _say_if_waiting(options: TrainOptions) -> None:
    """Warn if not all workers fit now, because Ray Train waits silently; UsageError if not one of them fits."""
    n = options.num_workers
    if n and (fit_now := actors_that_fit(None, num_cpus=options.num_cpus, num_gpus=options.num_gpus, n_tasks=n)) < n:
        stderr_console().print(
            f"the Ray cluster has room for {fit_now} of {n} workers (--num-workers); training starts when it has grown",
            style="yellow",
        )


@contextlib.contextmanager
def _ctrl_c_interrupts() -> Iterator[None]:
    """Restore the handler of Ctrl-C, because that of Ray Train ends the process and outlives the training."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def _shown_progress(
    folders: Sequence[Path], n_steps: int, report: Callable[..., None], early_warnings: TrainingWarnings
) -> Iterator[None]:
    """Show the progress and the warnings that the first worker writes into the runs' folders, until the block ends."""

    def look() -> None:
        rows: list[dict[str, Any]] = []
        for folder in folders:
            with contextlib.suppress(FileNotFoundError):
                rows.append(json.loads(filesystem.read_bytes(folder / PROGRESS)))
                early_warnings.show(folder.name, rows[-1]["findings"])
        now = max(rows, key=lambda row: row["step"], default=None)
        if now is None:
            report(0, AT_START)
        else:
            figures = f"mse {now['mse']:.3f} l0 {now['l0']:.1f} dead {now['n_dead']:.0f}"
            report(int(now["step"]), f"{figures}; {AT_END}" if now["step"] >= n_steps else figures)

    with repeated(look, first_s=POLL_S, every_s=POLL_S):
        yield


def train_loop(config: dict[str, Any]) -> None:
    """Run `fit` in a Ray Train worker and report its metrics to Ray Train."""
    import ray.train

    from sae_core.sae.parallel import TorchCommunicator

    job: TrainJob = config["job"]
    alone = ray.train.get_context().get_world_size() == 1
    communicator = None if alone else TorchCommunicator(job.device)
    fit(job, report=lambda metrics: ray.train.report(dict(metrics)), communicator=communicator)
