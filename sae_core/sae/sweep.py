"""`Sweep`: trains many autoencoders on one pass over the stream; each equals a separate training bit for bit.

Reading activations can cost more than a step of a small autoencoder, so N configurations (coefficients, widths,
architectures, seeds) share it. They share nothing else: no weight, random number or workspace. Neither the number of
trainers nor their order changes any of them, and if one diverges the others continue.
"""

from collections.abc import Iterable, Sequence

from jaxtyping import Float
from torch import Tensor

from sae_core.errors import ConfigError, TrainingError
from sae_core.sae.autoencoder import SparseAutoencoder
from sae_core.sae.trainer import StepMetrics, Trainer


class Sweep:
    """Trainers that all get the same batches.

    Usage:
        sweep = Sweep([Trainer(config, train_config, normaliser) for config in configs])
        for x in stream: sweep.step(x)
        saes = sweep.finish(held_out)
    """

    def __init__(self, trainers: Sequence[Trainer]) -> None:
        """A sweep over one or more trainers, each at any step; a `ConfigError` if there is none."""
        if not trainers:
            raise ConfigError("trainers is empty: a sweep needs at least one trainer.")
        self.trainers = tuple(trainers)
        self.stopped: dict[int, TrainingError] = {}
        """The errors of stopped trainers, by index; a stopped trainer keeps the state of its last good step."""

    def step(self, x: Float[Tensor, "token d_model"]) -> list[StepMetrics | None]:
        """Do one step of every running trainer, and return its metrics, or None for a stopped trainer.

        Raises:
            ConfigError: the batch has no token, or another width than an autoencoder; nothing has changed.
            TrainingError: no trainer is running any more.
        """
        for trainer in self.trainers:
            trainer.check_batch(x)
        metrics: list[StepMetrics | None] = [None] * len(self.trainers)
        for index, trainer in enumerate(self.trainers):
            if index in self.stopped:
                continue
            try:
                metrics[index] = trainer.step(x)
            except TrainingError as error:
                if len(self.trainers) == 1:
                    raise
                self.stopped[index] = error
        if len(self.stopped) == len(self.trainers):
            reasons = "; ".join(f"trainer {index}: {error}" for index, error in sorted(self.stopped.items()))
            raise TrainingError(f"all trainers of the sweep have stopped. {reasons}")
        return metrics

    def finish(self, held_out: Iterable[Float[Tensor, "_ _"]]) -> list[SparseAutoencoder]:
        """The trained autoencoders; a stopped one is that of its last good step. `held_out` is held in memory."""
        batches = list(held_out)
        return [trainer.finish(batches) for trainer in self.trainers]
