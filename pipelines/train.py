"""Training: a Ray Train job that fits a sparse autoencoder to stored activations.

The loop is a plain function, `fit`; Ray Train gives it a worker, restarts and a place in the cluster. Checkpoints are
the loop's own (atomic, safetensors + JSON, two kept), so a run resumes bit for bit with or without a worker process.
Tokens of `train` cells are fitted; tokens of `select` cells calibrate the threshold and give the reported figures.
"""

import contextlib
import importlib.metadata
import json
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from feature_store import commit, files, ingest
from feature_store.activations import ActivationReader
from feature_store.layout import Layout, as_path, run_id
from feature_store.stream import TokenStream
from pipelines.cluster import ray_session
from pipelines.config import TrainOptions
from pipelines.errors import RunFailedError, UsageError, root_cause
from pipelines.progress import ticking
from pipelines.stage import FORMAT_VERSION, Clock, StageResult, parent_run
from pipelines.tracking import Tracking

if TYPE_CHECKING:
    import torch

    from sae_core.sae import Normaliser, Trainer

REPORT_STEPS = 50
HELD_OUT_TOKENS = 65_536
NORMALISER_TOKENS = 1_000_000
POLL_S = 0.5
CHECKPOINTS = "checkpoints"
CHECKPOINT_HEADER = "trainer.json"
PROGRESS = "progress.json"
SAE_FILES = ("sae.safetensors", "config.json", "history.json", "summary.json")


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Everything the training loop needs; plain values, so that it travels to a worker."""

    activations: str
    cells: str
    folder: str
    sae: dict[str, Any]
    train: dict[str, Any]
    checkpoint_steps: int
    device: str
    n_threads: int


def train(options: TrainOptions, store: Path, *, address: str | None = None) -> StageResult:
    """Fit an SAE to an activations run, save it and register it; resumed by calling again.

    Raises:
        NotFoundError, ConfigError: there are no activations, or an option is not allowed; nothing is written.
        TrainingError: the loss is not finite; the last good checkpoint is kept.
    """
    from sae_core.sae import SAEConfig, TrainConfig

    clock = Clock()
    layout = Layout(store)
    parent = commit.Run.open(parent_run(layout, "activations", options.run).path)
    source = parent.plan
    sae = {"d_model": source["d_model"], "n_features": options.n_features or 8 * source["d_model"]}
    sae |= {"k": options.k, "arch": options.arch}
    if options.l1_coefficient is not None:
        sae["l1_coefficient"] = options.l1_coefficient
    sae_config = SAEConfig.from_dict(sae)
    train_config = TrainConfig(batch_size=options.batch_size, n_steps=options.n_steps, lr=options.lr, seed=options.seed)
    plan = {
        "format": FORMAT_VERSION,
        "activations": parent.path.name,
        "dataset": source["dataset"],
        "model": source["model"],
        "model_digest": source["model_digest"],
        "site": source["site"],
        "sae": sae_config.to_dict(),
        "train": train_config.to_dict(),
        "files": list(SAE_FILES),
        "n_shards": len(SAE_FILES),
    }
    run = commit.Run.create(layout.saes_dir(run_id(plan)), plan)
    pending = bool(run.pending())
    if pending:
        job = TrainJob(
            activations=str(parent.path.resolve()),
            cells=str(layout.cells_dir(source["dataset"]).resolve()),
            folder=str(run.path.resolve()),
            sae=plan["sae"],
            train=plan["train"],
            checkpoint_steps=options.checkpoint_steps,
            device="cuda" if options.num_gpus > 0 else "cpu",
            n_threads=options.num_cpus,
        )
        with run.sole_driver():
            _run_job(job, options, address=address)
    run.finalize()
    summary = json.loads((run.path / "summary.json").read_text())
    version = register(layout, run, options, activations_sha=parent.manifest().sha)
    return StageResult(
        kind="saes",
        run=run.path.name,
        path=run.path,
        done=options.n_steps if pending else 0,
        reused=0 if pending else options.n_steps,
        seconds=clock.seconds,
        facts={**summary, "registered": version},
    )


def _run_job(job: TrainJob, options: TrainOptions, *, address: str | None) -> None:
    """Run the loop under Ray Train and show its progress; raise the loop's own error when it failed on purpose."""
    with ray_session(address=address), ticking("train", job.train["n_steps"], "steps") as tick:
        import ray.train
        from ray.train.torch import TorchTrainer

        resources: dict[str, float] = {"CPU": options.num_cpus}
        if options.num_gpus > 0:
            resources["GPU"] = options.num_gpus
        trainer = TorchTrainer(
            train_loop,
            train_loop_config=asdict(job),
            scaling_config=ray.train.ScalingConfig(
                num_workers=options.num_workers, use_gpu=options.num_gpus > 0, resources_per_worker=resources
            ),
            run_config=ray.train.RunConfig(name="ray_train", storage_path=job.folder),
        )
        with _watching(as_path(job.folder) / PROGRESS, tick), _ctrl_c_interrupts():
            try:
                trainer.fit()
            except Exception as error:
                cause = root_cause(error)
                if cause is error:
                    raise RunFailedError(
                        f"the training job failed: {error}; run the command again to resume"
                    ) from error
                raise cause from None


@contextlib.contextmanager
def _ctrl_c_interrupts() -> Iterator[None]:
    """Undo what Ray Train makes of Ctrl-C: it ends the process, and its handler outlives the training."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def _watching(file: Path, tick: Callable[..., None]) -> Iterator[None]:
    """Show the progress that the worker writes to `file`, until the block ends."""
    stopped = threading.Event()

    def poll() -> None:
        while not stopped.wait(POLL_S):
            with contextlib.suppress(FileNotFoundError):
                now = json.loads(files.read_bytes(file))
                tick(int(now["step"]), f"mse {now['mse']:.3f} l0 {now['l0']:.1f} dead {now['n_dead']:.0f}")

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def train_loop(config: dict[str, Any]) -> None:
    """What a Ray Train worker runs: `fit`, reporting to Ray Train."""
    import ray.train

    fit(TrainJob(**config), report=lambda metrics: ray.train.report(dict(metrics)))


def fit(job: TrainJob, *, report: Callable[[dict[str, float]], None] = lambda _: None) -> None:
    """Fit, checkpoint, calibrate, evaluate and commit the SAE of `job`; resumes from its newest checkpoint."""
    import torch

    from sae_core.sae import SAEConfig, TrainConfig, Trainer

    torch.set_num_threads(job.n_threads)
    folder = as_path(job.folder)
    train_config = TrainConfig(**job.train)
    reader = ActivationReader(commit.Run.open(job.activations))
    split = ingest.read_splits(job.cells)
    stream = TokenStream(
        reader, keep_cells=split == "train", batch_tokens=train_config.batch_size, seed=train_config.seed
    )
    normaliser = fit_normaliser(reader, split == "train")
    trainer = Trainer(SAEConfig.from_dict(job.sae), train_config, normaliser, device=job.device)
    history = _resume(folder, trainer, stream)
    batches = iter(stream)
    while trainer.n_steps_done < train_config.n_steps:
        metrics = trainer.step(torch.from_numpy(next(batches)).to(job.device))
        step = trainer.n_steps_done
        if step % REPORT_STEPS == 0 or step == train_config.n_steps:
            row = {key: float(value) for key, value in metrics._asdict().items()}
            history.append(row)
            files.replace_text(folder / PROGRESS, json.dumps(row))
            report(row)
        if step % job.checkpoint_steps == 0 and step < train_config.n_steps:
            _save(folder, trainer, stream, history)
    _finish(job, trainer, held_out(reader, split == "select"), history, gamma=normaliser.gamma)


def fit_normaliser(reader: ActivationReader, keep_cells: npt.NDArray[np.bool_]) -> "Normaliser":
    """Fit mean and scale to the first million tokens of the kept cells, in shard order; one pass."""
    import torch

    from sae_core.sae import Normaliser

    return Normaliser.fit(torch.from_numpy(act) for act in _blocks(reader, keep_cells, NORMALISER_TOKENS))


def held_out(reader: ActivationReader, keep_cells: npt.NDArray[np.bool_]) -> "torch.Tensor":
    """Return up to 65,536 tokens of the kept cells, float32 [n_tokens d_model]."""
    import torch

    blocks = list(_blocks(reader, keep_cells, HELD_OUT_TOKENS))
    if not blocks:
        raise UsageError("no token of a `select` cell is stored; extract more cells or more tokens per cell")
    return torch.from_numpy(np.concatenate(blocks))


def _blocks(
    reader: ActivationReader, keep_cells: npt.NDArray[np.bool_], n_tokens: int
) -> Iterator[npt.NDArray[np.float32]]:
    """Kept tokens, float32 [n d_model] a row group, until `n_tokens` have gone by."""
    left = n_tokens
    for group in reader.row_groups:
        part = reader.read(group.shard, group.group)
        act = part.act_f32()[keep_cells[part.cell_idx]][:left]
        left -= len(act)
        if len(act):
            yield act
        if left <= 0:
            return


def _resume(folder: Path, trainer: "Trainer", stream: TokenStream) -> list[dict[str, float]]:
    """Put trainer and stream where the newest checkpoint left them; return the history up to there."""
    from sae_core.errors import CheckpointError
    from sae_core.sae import load_training

    for checkpoint in sorted((folder / CHECKPOINTS).glob("step-*"), reverse=True):
        try:
            with files.local_folder(checkpoint) as local:
                state, extra = load_training(local)
        except CheckpointError:
            # careful: a kill during the write leaves a torn newest one; the one before it is whole
            continue
        trainer.load_state_dict(state)
        stream.load_state_dict(extra["stream"])
        history: list[dict[str, float]] = extra["history"]
        return history
    return []


def _save(folder: Path, trainer: "Trainer", stream: TokenStream, history: list[dict[str, float]]) -> None:
    """Write a checkpoint and keep the newest two: a crash during the write leaves the one before."""
    from sae_core.sae import save_training

    target = folder / CHECKPOINTS / f"step-{trainer.n_steps_done:08d}"
    with files.clear_write_errors(folder), files.written_folder(target, last=CHECKPOINT_HEADER) as local:
        save_training(trainer.state_dict(), local, {"stream": stream.state_dict(), "history": history})
    for old in sorted(target.parent.glob("step-*"))[:-2]:
        files.remove_folder(old)


def _finish(
    job: TrainJob, trainer: "Trainer", tokens: "torch.Tensor", history: list[dict[str, float]], *, gamma: float
) -> None:
    """Calibrate and evaluate on held-out tokens, then commit weights, configuration, curve and figures."""
    import torch

    from sae_core.sae import evaluate, save_sae

    batches = torch.split(tokens.to(job.device), 4096)
    sae = trainer.finish(batches)
    figures = evaluate(sae, batches)
    run = commit.Run.open(job.folder)
    with files.clear_write_errors(run.path), files.scratch_folder(run.path) as made:
        save_sae(sae, made, {"activations": run.plan["activations"], "site": run.plan["site"]})
        metrics = {
            "select_fvu": float(figures.fvu),
            "select_l0": float(figures.l0),
            "select_dead_fraction": float(figures.dead_fraction),
            "select_tokens": int(figures.n_tokens),
            "theta": float(sae.theta.mean()),
            "gamma": gamma,
        }
        for name, content in {"history.json": history, "summary.json": metrics}.items():
            # careful: rows that came back from a checkpoint have their keys in another order
            (made / name).write_text(json.dumps(content, sort_keys=True))
        for shard, name in enumerate(SAE_FILES):
            run.commit_shard(shard, _copy_from(made / name), start=shard, stop=shard + 1)
    run.finalize()


def _copy_from(source: Path) -> Callable[[Path], int]:
    def write(target: Path) -> int:
        shutil.copyfile(source, target)
        return 1

    return write


def register(layout: Layout, run: commit.Run, options: TrainOptions, *, activations_sha: str) -> str:
    """Log the training to MLflow and register its SAE, once; return "NAME VERSION (alias)"."""
    tracking = Tracking(layout)
    found = tracking.of_run(run.path.name)
    if found is None:
        plan, metrics = run.plan, json.loads((run.path / "summary.json").read_text())
        name = options.name or f"sae-{plan['model']}-{plan['site']}"
        tags = {
            "scsae.run": run.path.name,
            "scsae.manifest_sha256": run.manifest().sha,
            "scsae.activations": plan["activations"],
            "scsae.activations_manifest_sha256": activations_sha,
            "scsae.dataset": plan["dataset"],
            "scsae.model_digest": plan["model_digest"],
            "scsae.site": plan["site"],
            "scsae.version": importlib.metadata.version("scsae"),
        }
        params = {**plan["sae"], **plan["train"], "model": plan["model"], "site": plan["site"]}
        with tracking.run(run.path.name, params=params, tags=tags) as mlflow_run:
            tracking.log_curves(mlflow_run, json.loads((run.path / "history.json").read_text()))
            tracking.log_metrics(mlflow_run, metrics)
            with files.local_folder(run.path) as folder:
                found = tracking.register(
                    folder,
                    name=name,
                    d_model=plan["sae"]["d_model"],
                    n_features=plan["sae"]["n_features"],
                    metrics=metrics,
                    tags=tags,
                )
    return f"{found.name} {found.version}" + "".join(f" ({alias})" for alias in found.aliases)
