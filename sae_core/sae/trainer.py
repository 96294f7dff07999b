"""`Trainer`: one optimizer step at a time, no I/O, its whole state in and out as tensors and plain values.

Whoever has a stream of activations calls `step` for each batch and `finish` at the end: a script, a Ray worker, a
sweep that feeds one batch to many trainers. A run that is interrupted, saved by `state_dict` and continued by
`from_state` equals the undisturbed one bit for bit. A step whose loss is not finite raises before anything has
changed.

Cost, CPU ms a step on one thread, B 4096: 34 against 185 for a dense step at d 128, F 1024, k 16; 999 against 5550 at
d 512, F 16384, k 32, of which 771 are the product x W_enc^T (`tests/benchmarks/bench_sae_step.py`).
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.errors import CheckpointError, ConfigError, TrainingError
from sae_core.sae.autoencoder import SparseAutoencoder
from sae_core.sae.calibration import calibrate_threshold
from sae_core.sae.config import SAEConfig, TrainConfig
from sae_core.sae.kernels import Kernel, kernel_for
from sae_core.sae.normaliser import Normaliser
from sae_core.sae.objectives import Forward, Loss


class StepMetrics(NamedTuple):
    """What one step saw, in normalised units (mean squared length of an activation: 1)."""

    step: int
    """Steps done, this one included."""
    loss: float
    mse: float
    """Squared error per token; close to the fvu."""
    aux: float
    l0: float
    n_dead: int
    """Features that had not fired for the dead window when the step began."""
    theta: float
    """Running mean of the smallest value chosen; for display."""
    lr: float


class TrainerState(NamedTuple):
    """All that a trainer is: tensors by name, and plain JSON values."""

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
    ) -> None:
        """A trainer at step 0; `kernel` None takes the one written for the device."""
        if normaliser.mean.numel() != sae_config.d_model:
            raise ConfigError(
                f"the normaliser was fitted on d_model = {normaliser.mean.numel()}, the autoencoder has "
                f"d_model = {sae_config.d_model}: fit it on the activations that the autoencoder is trained on."
            )
        self._set_up(sae_config, train_config, torch.device(device), kernel)
        self.sae.mu.copy_(normaliser.mu)
        self.sae.scale.fill_(normaliser.scale)

    def _set_up(
        self, sae_config: SAEConfig, train_config: TrainConfig, device: torch.device, kernel: Kernel | None
    ) -> None:
        self.config = train_config
        self.kernel = kernel or kernel_for(device)
        self.generator = torch.Generator().manual_seed(train_config.seed)
        self.sae = SparseAutoencoder(sae_config, generator=self.generator).to(device)
        """The autoencoder so far, normaliser unfolded, threshold the running one."""
        self.n_steps_done = 0
        self.tokens_since_fired = torch.zeros(sae_config.n_features, dtype=torch.int64, device=device)
        self._workspace = torch.empty(0, sae_config.n_features, device=device)
        self._adam = torch.optim.Adam(self.sae.weights, lr=train_config.lr_at(0, sae_config.n_features), fused=True)

    def step(self, x: Float[Tensor, "token d_model"]) -> StepMetrics:
        """One optimizer step on raw activations.

        `TrainingError`, with nothing changed, if the loss is not finite or all steps of the schedule are done.
        """
        self._check(x)
        sae, dead = self.sae, self.tokens_since_fired >= self.config.dead_window
        forward = self._forward(sae.normalise(x), dead)
        loss = sae.architecture.objective(forward)
        if not math.isfinite(loss.total.item()):
            raise TrainingError(
                f"the loss of step {self.n_steps_done + 1} is {loss.total.item()}: the batch holds "
                f"{int((~x.isfinite()).sum())} values that are not finite. Check the activations (`scsae verify`), or "
                f"lower the learning rate ({self._lr:.2g} now); the state of step {self.n_steps_done} is kept."
            )
        self._descend(loss)
        self._count(forward, n_tokens=x.shape[0])
        return StepMetrics(
            step=self.n_steps_done,
            loss=loss.total.item(),
            mse=loss.mse.item(),
            aux=loss.aux.item(),
            l0=forward.codes.nnz / x.shape[0],
            n_dead=int(dead.sum()),
            theta=float(sae.theta),
            lr=self._adam.param_groups[0]["lr"],
        )

    def finish(self, held_out: Iterable[Float[Tensor, "_ _"]]) -> SparseAutoencoder:
        """The trained autoencoder: threshold calibrated on held-out raw activations, normaliser folded in."""
        calibration = calibrate_threshold(self.sae, held_out) if self.sae.architecture.calibrated else None
        finished = self.sae.folded()
        if calibration is not None:
            finished.theta.fill_(calibration.theta).mul_(self.sae.scale)
        return finished

    def state_dict(self) -> TrainerState:
        """Weights, moments, counters, generator, configuration and position: copies, on the CPU."""
        tensors = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        for name, weight in self.sae.named_parameters():
            moments = self._adam.state.get(weight, {})
            tensors |= {f"adam.{name}.{key}": value for key, value in moments.items()}
        tensors["tokens_since_fired"] = self.tokens_since_fired
        tensors["generator"] = self.generator.get_state()
        meta = {
            "sae_config": self.sae.config.to_dict(),
            "train_config": self.config.to_dict(),
            "n_steps_done": self.n_steps_done,
        }
        return TrainerState({name: value.detach().cpu().clone() for name, value in tensors.items()}, meta)

    def load_state_dict(self, state: TrainerState) -> None:
        """Take over a state of the same configuration; `CheckpointError` names the fields that differ."""
        mine, theirs = self.state_dict().meta, state.meta
        for part in ("sae_config", "train_config"):
            differing = {
                key: (mine[part].get(key), theirs[part].get(key))
                for key in sorted(set(mine[part]) | set(theirs[part]))
                if mine[part].get(key) != theirs[part].get(key)
            }
            if differing:
                told = ", ".join(f"{key} ({ours!r} here, {saved!r} saved)" for key, (ours, saved) in differing.items())
                raise CheckpointError(
                    f"the saved training state is of another {part}: {told}. Continue with the saved configuration, or "
                    "start a new run."
                )
        tensors, device = state.tensors, self.tokens_since_fired.device
        self.sae.load_state_dict({name[4:]: value for name, value in tensors.items() if name.startswith("sae.")})
        for name, weight in self.sae.named_parameters():
            prefix = f"adam.{name}."
            moments = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
            if moments:
                self._adam.state[weight] = {key: value.to(device).clone() for key, value in moments.items()}
        self.tokens_since_fired = tensors["tokens_since_fired"].to(device).clone()
        self.generator.set_state(tensors["generator"])
        self.n_steps_done = int(theirs["n_steps_done"])

    @classmethod
    def from_state(
        cls, state: TrainerState, *, device: torch.device | str = "cpu", kernel: Kernel | None = None
    ) -> "Trainer":
        """A trainer that continues where `state` was taken; the normaliser is part of it."""
        trainer = cls.__new__(cls)
        sae_config = SAEConfig.from_dict(state.meta["sae_config"])
        train_config = TrainConfig.from_dict(state.meta["train_config"])
        trainer._set_up(sae_config, train_config, torch.device(device), kernel)
        trainer.load_state_dict(state)
        return trainer

    @property
    def _lr(self) -> float:
        return self.config.lr_at(self.n_steps_done, self.sae.config.n_features)

    def _check(self, x: Tensor) -> None:
        if self.n_steps_done >= self.config.n_steps:
            raise TrainingError(
                f"all {self.config.n_steps} steps are done and the learning rate has fallen to 0: call finish(), or "
                "start a trainer with more n_steps."
            )
        if x.shape[0] == 0:
            raise ConfigError("a step was given a batch of 0 tokens: give at least one.")

    def _pre_activations(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token feature"]:
        # a fresh [token feature] matrix every step costs its page faults: 420 ms against 360 at B 4096, d 512, F 8192
        if self._workspace.shape[0] < x.shape[0]:
            self._workspace = x.new_empty(x.shape[0], self.sae.config.n_features)
        return torch.addmm(self.sae.b_enc, x, self.sae.W_enc.T, out=self._workspace[: x.shape[0]])

    def _forward(self, x: Float[Tensor, "token d_model"], dead: Tensor) -> Forward:
        sae, config = self.sae, self.sae.config
        with torch.no_grad():
            pre = self._pre_activations(x)
            codes = sae.architecture.select(pre, config.k)
        codes = codes.with_value(self.kernel.encode(x, sae.W_enc, sae.b_enc, codes))
        return Forward(
            x=x,
            pre=pre,
            codes=codes,
            x_hat=self.kernel.decode(codes, sae.W_dec) + sae.b_dec,
            dead=dead,
            weights=sae.weights,
            n_aux=config.n_aux,
            aux_coefficient=config.aux_coefficient,
        )

    def _descend(self, loss: Loss) -> None:
        W_dec, constraint = self.sae.W_dec, self.sae.architecture.constraint
        self._adam.zero_grad(set_to_none=True)
        torch.autograd.backward(loss.total)
        assert W_dec.grad is not None
        with torch.no_grad():
            constraint.before_step(W_dec.grad, W_dec)
            for group in self._adam.param_groups:
                group["lr"] = self._lr
            self._adam.step()
            constraint.after_step(W_dec)

    @torch.no_grad()
    def _count(self, forward: Forward, *, n_tokens: int) -> None:
        codes, theta = forward.codes, self.sae.theta
        self.tokens_since_fired += n_tokens
        self.tokens_since_fired[codes.col.long()] = 0
        if codes.nnz:
            cutoff = codes.value.detach().amin()
            first = self.n_steps_done == 0
            theta.copy_(cutoff if first else torch.lerp(cutoff, theta, self.config.theta_decay))
        self.n_steps_done += 1
