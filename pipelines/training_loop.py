"""The training loop: a plain function, `fit`, that reads a run's tokens once and trains one or more autoencoders.

Checkpoints are the loop's own (atomic, safetensors + JSON, two kept), so a run resumes bit for bit with or without a
worker process. The SAE is fitted to tokens of `train` cells; tokens of `select` cells calibrate the threshold and
give the reported metrics. The normaliser and those metrics come from seeded samples of the whole run, because the cells
of an atlas are often sorted by study.

With several ranks, each rank reads its share of the row groups and takes its share of a step's tokens. All ranks hold
the same weights (`sae_core.sae.parallel`), and the first rank writes. Each SAE of a sweep takes the same steps as it
would alone, and has a run and checkpoints of its own.
"""

import json
import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from feature_store.activations import ActivationReader, TokenStream, sample_tokens
from feature_store.cells import SELECT, TEST, TRAIN, read_split_numbers
from feature_store.errors import IntegrityError, NotFoundError
from feature_store.storage import commit, filesystem
from feature_store.storage.layout import HISTORY, SUMMARY, Layout, as_path
from feature_store.storage.plans import SAEPlan
from pipelines.errors import UsageError
from pipelines.loss_recovered import RecoveryProbe, probe, value_or_reason
from pipelines.runtime.progress import stderr_console
from pipelines.runtime.threads import torch_threads

if TYPE_CHECKING:
    import torch

    from sae_core.sae import Normaliser, SparseAutoencoder, StepMetrics, Trainer, TrainerState
    from sae_core.sae.parallel import Communicator

REPORT_STEPS = 50
"""Number of steps between two rows of the training curves."""
HELD_OUT_TOKENS = 65_536
"""Most tokens of a split on which metrics are measured."""
NORMALISER_TOKENS = 1_000_000
"""Most tokens on which mean and scale of the activations are measured."""
CHECKPOINTS = "checkpoints"
CHECKPOINT_HEADER = "trainer.json"
PROGRESS = "progress.json"
EVALUATED_SPLITS = ("select", "test")
"""Splits on whose tokens the FVU of a summary is measured. That of `test` cells is only reported; nothing uses it."""
SAE_FILES = ("sae.safetensors", "config.json", HISTORY, SUMMARY)

Finding = dict[str, Any]
"""The kind, step, value and message of an early warning, as JSON values."""


def evaluation_constants() -> dict[str, Any]:
    """Return the constants on which the curves and metrics of a training depend; they are part of its plan."""
    return {
        "report_steps": REPORT_STEPS,
        "held_out_tokens": HELD_OUT_TOKENS,
        "normaliser_tokens": NORMALISER_TOKENS,
        "splits": EVALUATED_SPLITS,
    }


@dataclass(frozen=True, kw_only=True)
class SAEJob:
    """The run folder and configurations of one SAE; it holds plain values, so it can be sent to a worker."""

    folder: str
    sae: dict[str, Any]
    train: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Everything the training loop needs; it holds plain values, so it can be sent to a worker.

    The SAEs share the number of steps, the tokens per step and the seed, which determine the token stream.
    """

    activations: str
    store: str
    dataset: str
    saes: tuple[SAEJob, ...]
    checkpoint_steps: int
    recovery_cells: int
    device: str
    n_threads: int


class SAERun:
    """One SAE in training, with its metrics and warnings so far."""

    def __init__(self, folder: Path, trainer: "Trainer") -> None:
        self.folder = folder
        self.trainer = trainer
        self.history: list[dict[str, float]] = []
        self.findings: dict[str, Finding] = _ranking(trainer)
        """The first finding of each kind."""

    def note(self, metrics: "StepMetrics") -> dict[str, float]:
        """Store the metrics of a step and the warnings that follow from them; return the metrics."""
        row = {key: float(value) for key, value in metrics._asdict().items()}
        self.history.append(row)
        for found in self.trainer.dead_feature_risks():
            self.findings.setdefault(found.kind, {**found._asdict(), "step": metrics.step})
        return row

    def checkpoints(self) -> dict[int, Path]:
        """Return the checkpoint folders by step; an incomplete one may be among them."""
        return {int(path.name.removeprefix("step-")): path for path in (self.folder / CHECKPOINTS).glob("step-*")}

    def load(self, state: "TrainerState", extra: dict[str, Any]) -> None:
        """Continue from a checkpoint; CheckpointError if it is of another configuration."""
        self.trainer.load_state_dict(state)
        self.history, self.findings = extra["history"], extra["findings"]

    def save(self, stream: dict[str, Any]) -> None:
        """Write a checkpoint and keep the newest two, so that a crash during the write leaves the one before."""
        from sae_core.sae import save_training

        target = self.folder / CHECKPOINTS / f"step-{self.trainer.n_steps_done:08d}"
        extra = {**stream, "history": self.history, "findings": self.findings}
        with (
            filesystem.clear_write_errors(self.folder),
            filesystem.written_folder(target, last=CHECKPOINT_HEADER) as local,
        ):
            save_training(self.trainer.state_dict(), local, extra)
        for old in sorted(target.parent.glob("step-*"))[:-2]:
            filesystem.remove_folder(old)


def _ranking(trainer: "Trainer") -> dict[str, Finding]:
    """Say that features are not ranked in the precision that was asked for, if they are not."""
    wanted = trainer.config.encoder_precision
    if trainer.ranking == wanted:
        return {}
    message = (
        f"encoder_precision was {wanted}, but features are ranked in {trainer.ranking}: for "
        f"{trainer.sae.config.arch} on this device {wanted} is slower or not possible"
    )
    return {"ranking": {"kind": "ranking", "step": 0, "value": None, "message": message}}


def fit(
    job: TrainJob,
    *,
    report: Callable[[dict[str, float]], None] = lambda _: None,
    communicator: "Communicator | None" = None,
) -> None:
    """Fit, checkpoint, calibrate, evaluate and commit the SAEs of `job`; a restart resumes from the newest checkpoint.

    Raises:
        TrainingError: a loss is not finite; its last good checkpoint is kept, and the others of a sweep are finished.
        CheckpointError, InputError: a checkpoint is of another configuration or another stream; it is left alone.
        IntegrityError: a part of the activations is missing or damaged.
    """
    # without a worker the loop is in the process of the caller, whose threads it leaves as they were
    with torch_threads(job.n_threads):
        _fit(job, report, communicator)


def _fit(job: TrainJob, report: Callable[[dict[str, float]], None], communicator: "Communicator | None") -> None:
    import torch

    from sae_core.errors import TrainingError
    from sae_core.sae import SAEConfig, Sweep, TrainConfig, Trainer
    from sae_core.sae.parallel import Communicator

    ranks = communicator or Communicator()
    reader = ActivationReader(commit.Run.open(job.activations))
    split = read_split_numbers(Layout(as_path(job.store)).cells_dir(job.dataset))
    config = TrainConfig.from_dict(job.saes[0].train)
    stream = TokenStream(
        reader,
        keep_cells=split == TRAIN,
        batch_tokens=config.batch_size // ranks.size,
        seed=config.seed,
        rank=ranks.rank,
        n_ranks=ranks.size,
    )
    normaliser = fit_normaliser(reader, split == TRAIN, seed=config.seed)
    runs = [
        SAERun(
            as_path(one.folder),
            Trainer(
                SAEConfig.from_dict(one.sae),
                TrainConfig.from_dict(one.train),
                normaliser,
                device=job.device,
                communicator=communicator,
            ),
        )
        for one in job.saes
    ]
    first = _resume(runs, stream, ranks)
    sweep = Sweep([run.trainer for run in runs])
    with closing(_batches(stream)) as batches:
        for step in range(first + 1, config.n_steps + 1):
            metrics = sweep.step(torch.from_numpy(next(batches)).to(job.device))
            going = [(run, seen) for run, seen in zip(runs, metrics, strict=True) if seen is not None]
            if step % REPORT_STEPS == 0 or step == config.n_steps:
                rows = [(run, run.note(seen)) for run, seen in going]
                if ranks.rank == 0:
                    for run, row in rows:
                        shown = {**row, "findings": list(run.findings.values())}
                        filesystem.replace_text(run.folder / PROGRESS, json.dumps(shown))
                report(rows[0][1])
            if step % job.checkpoint_steps == 0 and step < config.n_steps:
                place = _place(stream, ranks)
                if ranks.rank == 0:
                    for run, _ in going:
                        run.save(place)
    if ranks.rank == 0:
        done = [run for at, run in enumerate(runs) if at not in sweep.stopped]
        _finish(job, reader, split, done, seed=config.seed, gamma=normaliser.gamma)
    if sweep.stopped:
        told = "; ".join(f"{runs[at].folder.name}: {error}" for at, error in sorted(sweep.stopped.items()))
        raise TrainingError(f"{len(sweep.stopped)} of {len(runs)} autoencoders stopped. {told}")


def _batches(stream: TokenStream) -> Generator[npt.NDArray[np.float32], None, None]:
    """Yield the batches of a stream from a generator, whose `close` ends the reading thread with the loop."""
    yield from stream


def fit_normaliser(reader: ActivationReader, keep_cells: npt.NDArray[np.bool_], *, seed: int) -> "Normaliser":
    """Fit mean and scale to a seeded sample of a million tokens of the kept cells, from the whole run."""
    import torch

    from sae_core.sae import Normaliser

    sample = sample_tokens(reader, keep_cells, n_tokens=NORMALISER_TOKENS, seed=seed)
    return Normaliser.fit(torch.from_numpy(act) for act in sample)


def held_out(
    reader: ActivationReader, keep_cells: npt.NDArray[np.bool_], *, seed: int, split: str = "select"
) -> "torch.Tensor":
    """Return a seeded sample of up to 65,536 tokens of the kept cells, from the whole run, float32
    [n_tokens d_model]; TrainingError if one is not finite.
    """
    import torch

    from sae_core.errors import TrainingError

    blocks = list(sample_tokens(reader, keep_cells, n_tokens=HELD_OUT_TOKENS, seed=seed))
    if not blocks:
        raise UsageError(f"no token of a `{split}` cell is stored; extract more cells or more tokens per cell")
    tokens = np.concatenate(blocks)
    if not np.isfinite(tokens).all():
        raise TrainingError(
            f"activations of `{split}` cells are not finite ({int((~np.isfinite(tokens)).sum())} values), so the "
            "autoencoder cannot be judged; extract the activations again, in float32 if they overflow float16"
        )
    return torch.from_numpy(tokens)


def _resume(runs: Sequence[SAERun], stream: TokenStream, ranks: "Communicator") -> int:
    """Restore trainers and stream from the newest checkpoint that all runs have; return its step, or 0 without one."""
    from sae_core.errors import CheckpointError, TrainingError
    from sae_core.sae import load_training

    found = [run.checkpoints() for run in runs]
    first = 0
    for step in sorted(set.intersection(*(set(steps) for steps in found)), reverse=True):
        try:
            loaded = []
            for steps in found:
                with filesystem.local_folder(steps[step]) as local:
                    loaded.append(load_training(local))
        except CheckpointError as error:
            # careful: a kill during the write leaves an incomplete newest checkpoint; the one before it is whole
            text = f"warning: {error}; training resumes from the checkpoint before it"
            stderr_console().print(text, style="yellow", soft_wrap=True)
            continue
        for run, (state, extra) in zip(runs, loaded, strict=True):
            run.load(state, extra)
        extra = loaded[0][1]
        epoch, position = extra["places"][ranks.rank]
        stream.load_state_dict({**extra["stream"], "epoch": epoch, "position": position})
        first = step
        break
    starts = [step for (step,) in ranks.gather([first])]
    if len(set(starts)) > 1:
        raise TrainingError(
            f"the workers found checkpoints of different steps ({starts}): they have to see one store; run again "
            "once the folder is the same on all nodes"
        )
    return first


def _place(stream: TokenStream, ranks: "Communicator") -> dict[str, Any]:
    """Return the positions of the streams of all ranks, as JSON values."""
    state = stream.state_dict()
    return {"stream": state, "places": ranks.gather([state["epoch"], state["position"]])}


def _finish(
    job: TrainJob,
    reader: ActivationReader,
    split: npt.NDArray[np.uint8],
    runs: Sequence[SAERun],
    *,
    seed: int,
    gamma: float,
) -> None:
    """Calibrate, evaluate and commit each SAE, on the same `select` tokens and cells."""
    import torch

    batches = torch.split(held_out(reader, split == SELECT, seed=seed).to(job.device), 4096)
    reported = held_out_batches(reader, split, seed=seed, device=job.device)
    measured = select_probe(reader.run, job.store, split, n_cells=job.recovery_cells, seed=seed, device=job.device)
    for run in runs:
        sae = run.trainer.finish(batches)
        summary = {"gamma": gamma, **figures_of(sae, batches, reported, measured)}
        commit_sae(run.folder, sae, summary, history=run.history, findings=list(run.findings.values()))


def select_probe(
    run: commit.Run, store: str, split: npt.NDArray[np.uint8], *, n_cells: int, seed: int, device: str
) -> RecoveryProbe | str:
    """Return a probe of `n_cells` seeded `select` cells in the model of the activations `run`, or why there is none."""
    if not n_cells:
        return "none was asked for (--recovery-cells 0)"
    select = np.flatnonzero(split == SELECT)
    chosen = np.random.default_rng(seed).choice(select, min(n_cells, len(select)), replace=False)
    return probe(run, store, np.sort(chosen), device=device)


def held_out_batches(
    reader: ActivationReader, split: npt.NDArray[np.uint8], *, seed: int, device: str
) -> "Sequence[torch.Tensor] | str":
    """Return tokens of `test` cells, sampled like those of `select` cells, or the reason why there are none."""
    import torch

    tokens = value_or_reason(lambda: held_out(reader, split == TEST, seed=seed, split="test"))
    return tokens if isinstance(tokens, str) else torch.split(tokens.to(device), 4096)


def figures_of(
    sae: "SparseAutoencoder",
    batches: "Sequence[torch.Tensor]",
    reported: "Sequence[torch.Tensor] | str",
    measured: RecoveryProbe | str,
) -> dict[str, Any]:
    """Return the metrics of the summary, on `select` tokens in `batches`, `test` tokens in `reported`, and probe cells.

    If a metric could not be measured, the entry `missing` gives the reason for each such metric.
    """
    from sae_core.sae import evaluate

    recovery, missing = _recovery(sae, measured)
    figures = {**_figures(sae, batches), **recovery}
    if isinstance(reported, str):
        missing["test_fvu"] = reported
    else:
        figures["test_fvu"] = float(evaluate(sae, reported).fvu)
    return figures | ({"missing": missing} if missing else {})


def shown_figures(summary: dict[str, Any]) -> dict[str, Any]:
    """Return the summary as a stage shows it, with the reason in place of each missing metric."""
    missing = summary.get("missing", {})
    shown = {name: value for name, value in summary.items() if name != "missing"}
    return shown | {name: f"not measured: {reason}" for name, reason in missing.items()}


def _figures(sae: "SparseAutoencoder", batches: "Sequence[torch.Tensor]") -> dict[str, float]:
    from sae_core.sae import evaluate

    figures = evaluate(sae, batches)
    return {
        "select_fvu": float(figures.fvu),
        "select_l0": float(figures.l0),
        "select_dead_fraction": float(figures.dead_fraction),
        "select_tokens": int(figures.n_tokens),
        "theta": float(sae.theta.mean()),
    }


def _recovery(sae: "SparseAutoencoder", measured: RecoveryProbe | str) -> tuple[dict[str, float], dict[str, str]]:
    """Return recovery of embedding and loss as entries of the summary, and the reason for each missing entry."""
    recovery = measured if isinstance(measured, str) else value_or_reason(lambda: measured.of(sae))
    if isinstance(measured, str) or isinstance(recovery, str):
        return {}, dict.fromkeys(("select_recovery", "select_recovery_loss"), str(recovery))
    entries = {"select_recovery": recovery.embedding, "recovery_cells": measured.tokens.n_cells}
    if recovery.losses is not None:
        entries |= {f"select_loss_{name}": value for name, value in recovery.losses._asdict().items()}
    if isinstance(recovery.loss, str):
        return entries, {"select_recovery_loss": recovery.loss}
    return {**entries, "select_recovery_loss": recovery.loss}, {}


def create_sae_run(layout: Layout, plan: SAEPlan) -> commit.Run:
    """Create or reopen the run of an SAE, whose parts are SAE_FILES."""
    content = plan.table("sae", n_shards=len(SAE_FILES), files=SAE_FILES)
    return commit.Run.create(layout.saes_dir(plan.id), content)


def is_complete(folder: Path) -> bool:
    """Whether all files of an SAE are there; one whose plan is gone or damaged is made again, which mends it."""
    try:
        return not commit.Run.open(folder).pending()
    except (NotFoundError, IntegrityError):
        return False


def commit_sae(
    folder: Path,
    sae: "SparseAutoencoder",
    summary: dict[str, Any],
    *,
    history: Sequence[dict[str, float]] = (),
    findings: Sequence[Finding] = (),
) -> None:
    """Commit weights, configuration, curves and metrics to a run of SAE_FILES."""
    from sae_core.sae import save_sae

    run = commit.Run.open(folder)
    summary = {**summary, "findings": list(findings)}
    with filesystem.clear_write_errors(run.path), filesystem.scratch_folder(run.path) as made:
        plan = SAEPlan.of(run)
        save_sae(sae, made, {"activations": plan.activations, "site": plan.site})
        for name, content in {HISTORY: list(history), SUMMARY: summary}.items():
            # careful: rows loaded from a checkpoint have their keys in another order
            (made / name).write_text(json.dumps(content, sort_keys=True))
        for shard, name in enumerate(SAE_FILES):
            run.commit_shard(shard, _copy_from(made / name), start=shard, stop=shard + 1)
    run.finalize()


def _copy_from(source: Path) -> Callable[[Path], int]:
    def write(target: Path) -> int:
        shutil.copyfile(source, target)
        return 1

    return write
