"""`Trainer`: trains one autoencoder step by step; it does no I/O, and its whole state is tensors and plain values.

The caller has the stream of activations and calls `step` for each batch and `finish` at the end: a script, a Ray
worker, or a `Sweep` that gives each batch to many trainers. A run that is interrupted, saved by `state_dict` and
continued by `load_state_dict` equals an uninterrupted run bit for bit. A step whose loss or gradient is not finite
raises an error before anything has changed.

Cost, CPU ms a step on one thread, B 4096: 34 against 185 for a dense step at d 128, F 1024, k 16; 999 against 5550 at
d 512, F 16384, k 32, of which 771 are the product x W_enc^T (`tests/benchmarks/bench_sae_step.py`).
"""

import math
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sae_core.errors import CheckpointError, ConfigError, TrainingError
from sae_core.sae.autoencoder import SparseAutoencoder
from sae_core.sae.calibration import calibrate_threshold, calibrated_theta
from sae_core.sae.codes import SparseCodes
from sae_core.sae.config import SAEConfig, TrainConfig
from sae_core.sae.dead_features import DeadFeatureRisk, dead_feature_risks
from sae_core.sae.kernels import Kernel, kernel_for
from sae_core.sae.normaliser import Normaliser
from sae_core.sae.objectives import Forward, Loss, loss_of
from sae_core.sae.parallel import Communicator
from sae_core.sae.ranking import batch_topk_by_int8, has_int8, ranking_on


class StepMetrics(NamedTuple):
    """The metrics of one step over all ranks, in normalised units (an activation has mean squared length 1)."""

    step: int
    """Number of steps done, including this one."""
    loss: float
    mse: float
    """Squared error per token of the reconstruction by all features; close to the fvu."""
    aux: float
    """The AuxK loss, unweighted."""
    sparsity: float
    """The L1 or L0 loss, unweighted; 0 for an architecture without one."""
    l0: float
    n_dead: int
    """Number of features that were dead when the step began."""
    theta: float
    """Mean threshold over the features: the learned one, or a running mean of the smallest selected value."""
    lr: float


class _StepSums(NamedTuple):
    """The results of the forward passes of one step on all ranks: sums over tokens, means of losses over ranks."""

    n_tokens: int
    firings: Int64[Tensor, " feature"]
    loss: float
    mse: float
    aux: float
    sparsity: float
    cutoff: float | None
    """Smallest selected value, averaged over ranks; None if no value was selected."""


class TrainerState(NamedTuple):
    """The whole state of a trainer: tensors by name, and plain JSON values."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


class Trainer:
    """Trains one autoencoder on batches of raw activations.

    Usage:
        config = SAEConfig(d_model=128, n_features=1024, k=16)
        trainer = Trainer(config, TrainConfig(n_steps=3000), Normaliser.fit(first))
        for x in stream: trainer.step(x)
        sae = trainer.finish(held_out)
    """

    def __init__(
        self,
        sae_config: SAEConfig,
        train_config: TrainConfig,
        normaliser: Normaliser,
        *,
        device: torch.device | str = "cpu",
        kernel: Kernel | None = None,
        communicator: Communicator | None = None,
    ) -> None:
        """A trainer at step 0.

        Args:
            sae_config: of the autoencoder.
            train_config: of the run.
            normaliser: fitted on activations of the same stream.
            device: where weights and batches are.
            kernel: None is the kernel of the device.
            communicator: None trains in this process alone.

        Raises:
            ConfigError: the normaliser has another width than the autoencoder.
        """
        if normaliser.mean.numel() != sae_config.d_model:
            raise ConfigError(
                f"the normaliser has d_model = {normaliser.mean.numel()}, the autoencoder has {sae_config.d_model}: "
                "fit it on the activations that the autoencoder is trained on."
            )
        self.config = train_config
        self.kernel = kernel or kernel_for(torch.device(device))
        self.communicator = communicator or Communicator()
        self.generator = torch.Generator().manual_seed(train_config.seed)
        self.sae = SparseAutoencoder(sae_config, generator=self.generator).to(device)
        """The autoencoder in training, with the normaliser unfolded and the learned or running threshold."""
        self.r_mag = torch.zeros(sae_config.n_features, device=device)
        self._learned = {name: getattr(self.sae, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
        self._learned |= {name: self._learnable(name) for name in self.sae.architecture.learned}
        self.n_steps_done = 0
        self.tokens_since_fired = torch.zeros(sae_config.n_features, dtype=torch.int64, device=device)
        self.n_dead_before = 0
        """Number of features that were dead when the last window of `dead_window` tokens began."""
        self.ranking = ranking_on(
            torch.device(device), train_config.encoder_precision, over_batch=self.sae.architecture.over_batch
        )
        """The precision in which this run ranks pre-activations; a resumed run keeps that of its first start."""
        self._workspace = torch.empty(0)
        rate = train_config.lr_at(0, sae_config.n_features)
        self._adam = torch.optim.Adam(self._learned.values(), lr=rate, fused=True)
        self.sae.mu.copy_(normaliser.mu)
        self.sae.scale.fill_(normaliser.scale)

    def step(self, x: Float[Tensor, "token d_model"]) -> StepMetrics:
        """Do one optimizer step on raw activations; with several ranks, each has its own batch of the same size.

        Raises:
            ConfigError: the batch has no token, or another width.
            TrainingError: the loss or its gradient is not finite, or all steps are done; nothing has changed.
        """
        self.check_batch(x)
        self._check_schedule()
        sae, dead = self.sae, self.tokens_since_fired >= self.config.dead_window
        forward = self._forward(sae.normalise(x), dead)
        warm_up = self.config.sparsity_at(self.n_steps_done)
        loss = loss_of(sae.architecture.objective, forward, warm_up=warm_up)
        sums, n_dead = self._sum_over_ranks(forward, loss), int(dead.sum())
        self._differentiate(loss, x, value=sums.loss)
        self._update_weights(dead)
        self._update_counters(sums, n_dead=n_dead)
        return StepMetrics(
            step=self.n_steps_done,
            loss=sums.loss,
            mse=sums.mse,
            aux=sums.aux,
            sparsity=sums.sparsity,
            l0=int(sums.firings.sum()) / sums.n_tokens,
            n_dead=n_dead,
            theta=sae.theta.mean().item(),
            lr=self._adam.param_groups[0]["lr"],
        )

    def finish(self, held_out: Iterable[Float[Tensor, "_ _"]]) -> SparseAutoencoder:
        """The trained autoencoder, with thresholds calibrated on held-out raw activations and the normaliser folded in.

        Architectures without a calibrated threshold (topk, gated, standard) do not read `held_out`.
        """
        if not self.sae.architecture.calibrated:
            return self.sae.folded()
        theta = calibrated_theta(self.sae, calibrate_threshold(self.sae, held_out))
        finished = self.sae.folded()
        finished.theta.copy_(theta * self.sae.scale)
        return finished

    def dead_feature_risks(self) -> list[DeadFeatureRisk]:
        """Early signs that many features will die; an empty list if there are none."""
        n_dead = int((self.tokens_since_fired >= self.config.dead_window).sum())
        gamma = float(torch.linalg.vector_norm(self.sae.mu) / self.sae.scale)
        return dead_feature_risks(
            gamma=gamma, n_dead=n_dead, n_dead_before=self.n_dead_before, n_features=self.sae.config.n_features
        )

    def state_dict(self) -> TrainerState:
        """A copy, on the CPU, of weights, Adam moments, counters, generator, configuration and position."""
        tensors = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        for name, weight in self._learned.items():
            moments = self._adam.state.get(weight, {})
            tensors |= {f"adam.{name}.{key}": value for key, value in moments.items()}
        tensors["r_mag"] = self.r_mag
        tensors["tokens_since_fired"] = self.tokens_since_fired
        tensors["generator"] = self.generator.get_state()
        meta = {
            "sae_config": self.sae.config.to_dict(),
            "train_config": self.config.to_dict(),
            "n_steps_done": self.n_steps_done,
            "n_dead_before": self.n_dead_before,
            "ranking": self.ranking,
        }
        return TrainerState({name: value.detach().cpu().clone() for name, value in tensors.items()}, meta)

    def load_state_dict(self, state: TrainerState) -> None:
        """Continue from a saved state, which includes the normaliser.

        Raises:
            CheckpointError: the state has another configuration; the message names the fields that differ.
        """
        _check_same("sae_config", self.sae.config.to_dict(), SAEConfig.from_dict(state.meta["sae_config"]).to_dict())
        _check_same("train_config", self.config.to_dict(), TrainConfig.from_dict(state.meta["train_config"]).to_dict())
        tensors, device = state.tensors, self.tokens_since_fired.device
        # states of earlier versions have no ranking: theirs was the precision that was asked for
        ranking = str(state.meta.get("ranking", self.config.encoder_precision))
        if ranking == "int8" and not has_int8(device):
            raise CheckpointError(
                f"the saved run ranks its pre-activations in int8, which is not possible on {device}: continue it on a "
                "CPU of the kind x86 with AVX2, or start a new run."
            )
        self.ranking = ranking
        self.sae.load_state_dict({name[4:]: value for name, value in tensors.items() if name.startswith("sae.")})
        with torch.no_grad():
            self.r_mag.copy_(tensors["r_mag"])
        for name, weight in self._learned.items():
            prefix = f"adam.{name}."
            moments = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
            if moments:
                self._adam.state[weight] = {key: value.to(device).clone() for key, value in moments.items()}
        self.tokens_since_fired = tensors["tokens_since_fired"].to(device).clone()
        self.generator.set_state(tensors["generator"])
        self.n_steps_done = int(state.meta["n_steps_done"])
        self.n_dead_before = int(state.meta["n_dead_before"])

    @property
    def _lr(self) -> float:
        return self.config.lr_at(self.n_steps_done, self.sae.config.n_features)

    def check_batch(self, x: Float[Tensor, "token d_model"]) -> None:
        """Raise a `ConfigError` if a batch has no token or another width than the autoencoder."""
        if x.shape[0] == 0:
            raise ConfigError("the batch has 0 tokens; a step needs at least 1.")
        self.sae.check_width(x)

    def _check_schedule(self) -> None:
        if self.n_steps_done >= self.config.n_steps:
            raise TrainingError(
                f"all {self.config.n_steps} steps are done: call finish(), or start a trainer with a larger n_steps."
            )

    def _learnable(self, name: str) -> Tensor:
        owner = self if name == "r_mag" else self.sae
        tensor: Tensor = getattr(owner, name).requires_grad_()
        return tensor

    def _pre_activations(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token feature"]:
        # allocating a [token feature] matrix every step costs page faults: 420 ms against 360 at B 4096, d 512, F 8192
        dtype = torch.bfloat16 if self.ranking == "bf16" else x.dtype
        if len(self._workspace) < len(x) or self._workspace.dtype != dtype:
            self._workspace = x.new_empty(x.shape[0], self.sae.config.n_features, dtype=dtype)
        W_enc, b_enc = self.sae.W_enc.to(dtype), self.sae.b_enc.to(dtype)
        return torch.addmm(b_enc, x.to(dtype), W_enc.T, out=self._workspace[: x.shape[0]])

    @torch.no_grad()
    def _select(self, x: Float[Tensor, "token d_model"]) -> SparseCodes:
        sae, arch = self.sae, self.sae.architecture
        if self.ranking == "int8":
            codes = batch_topk_by_int8(x, sae.W_enc, sae.b_enc, sae.config.k, self.kernel)
            if codes is not None:
                return codes
        return arch.select(self._pre_activations(x), sae.theta, sae.config)

    def _forward(self, x: Float[Tensor, "token d_model"], dead: Bool[Tensor, " feature"]) -> Forward:
        sae, config, arch = self.sae, self.sae.config, self.sae.architecture
        codes = self._select(x).with_index()
        pre = self.kernel.encode(x, sae.W_enc, sae.b_enc, codes)
        codes = codes.with_value(arch.activate(pre, sae.theta.index_select(0, codes.col), config.bandwidth))
        grouped = codes.split_groups(config.group_stops) if arch.nested else codes
        parts = self.kernel.decode(grouped, sae.W_dec).view(x.shape[0], -1, config.d_model).unbind(dim=1)
        return Forward(
            x=x,
            pre=pre,
            codes=codes,
            nested_x_hat=tuple(accumulate(parts, initial=sae.b_dec))[1:],
            dead=dead,
            weights=sae.weights,
            r_mag=self.r_mag,
            config=config,
            kernel=self.kernel,
            step=self.n_steps_done,
        )

    @torch.no_grad()
    def _sum_over_ranks(self, forward: Forward, loss: Loss) -> _StepSums:
        codes, zero = forward.codes, torch.zeros_like(loss.mse)
        firings = torch.bincount(codes.col[codes.value > 0], minlength=self.sae.config.n_features)
        sparsity = [loss.terms[term.name] for term in self.sae.architecture.objective if term.is_sparsity]
        means = [loss.total, loss.mse, loss.terms.get("auxk", zero), sum(sparsity, zero)]
        smallest = [codes.value.amin(), zero + 1] if codes.nnz else [zero, zero]
        sums = torch.stack([*means, *smallest, zero + forward.x.shape[0]]).double()
        self.communicator.sum_(sums, firings)
        total, mse, aux, sparse, cutoff, n_selecting, n_tokens = sums.tolist()
        size = self.communicator.size
        return _StepSums(
            n_tokens=int(n_tokens),
            firings=firings,
            loss=total / size,
            mse=mse / size,
            aux=aux / size,
            sparsity=sparse / size,
            cutoff=cutoff / n_selecting if n_selecting else None,
        )

    def _differentiate(self, loss: Loss, x: Float[Tensor, "token d_model"], *, value: float) -> None:
        """Compute the gradients of the loss, whose mean over ranks is `value`.

        Raises:
            TrainingError: the loss or the gradient is not finite.
        """
        self._adam.zero_grad(set_to_none=True)
        length = math.nan
        if math.isfinite(value):
            torch.autograd.backward(loss.total)
            self.communicator.average_gradients(self._learned.values())
            gradients = [weight.grad for weight in self._learned.values() if weight.grad is not None]
            length = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(length):
            self._adam.zero_grad(set_to_none=True)
            n_bad = (~x.isfinite()).sum()
            self.communicator.sum_(n_bad)
            what = f"the loss of step {self.n_steps_done + 1} is {value}"
            raise TrainingError(
                f"{what if not math.isfinite(value) else what + f' and its gradient is {length}'}; the batch holds "
                f"{int(n_bad)} values that are not finite. Check the activations (`scsae verify`), or lower the "
                f"learning rate (now {self._lr:.2g}). The state of step {self.n_steps_done} is kept."
            )

    @torch.no_grad()
    def _update_weights(self, dead: Bool[Tensor, " feature"]) -> None:
        constraints = self.sae.architecture.constraints
        for constraint in constraints:
            constraint.before_step(self.sae.weights)
        for group in self._adam.param_groups:
            group["lr"] = self._lr
        self._adam.step()
        for constraint in constraints:
            constraint.after_step(self.sae.weights, dead)

    @torch.no_grad()
    def _update_counters(self, sums: _StepSums, *, n_dead: int) -> None:
        """Update the counters and the running threshold after a step."""
        theta = self.sae.theta
        self.tokens_since_fired += sums.n_tokens
        self.tokens_since_fired[sums.firings > 0] = 0
        if self.n_steps_done % max(1, self.config.dead_window // self.config.batch_size) == 0:
            self.n_dead_before = n_dead
        running = self.sae.architecture.calibrated and "theta" not in self._learned
        if running and sums.cutoff is not None:
            cutoff = torch.tensor(sums.cutoff, dtype=theta.dtype, device=theta.device)
            first = self.n_steps_done == 0
            theta.copy_(cutoff if first else torch.lerp(cutoff, theta, self.config.theta_decay))
        self.n_steps_done += 1


def _check_same(part: str, own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    differing = [f"{key} ({own[key]!r} here, {saved[key]!r} saved)" for key in sorted(own) if own[key] != saved[key]]
    if differing:
        raise CheckpointError(
            f"the saved training state has another {part}: {', '.join(differing)}. Continue with the saved "
            "configuration, or start a new run."
        )
