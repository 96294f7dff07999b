"""`Sweep`: many autoencoders trained on one read of the stream, each bit for bit as if it were alone.

Reading and decoding activations can cost more than a step of a small autoencoder; N configurations (coefficients,
widths, architectures, seeds) share it. Nothing else is shared: no weight, no random number, no workspace, so neither
the number of trainers nor their order changes any of them, and one that diverges leaves the others running.
"""

from collections.abc import Iterable, Sequence

from jaxtyping import Float
from torch import Tensor

from sae_core.errors import ConfigError, TrainingError
from sae_core.sae.autoencoder import SparseAutoencoder
from sae_core.sae.trainer import StepMetrics, Trainer


class Sweep:
    """Trainers that are fed the same batches.

    Usage:
        sweep = Sweep([Trainer(config, train_config, normaliser) for config in configs])
        for x in stream: sweep.step(x)
        saes = sweep.finish(held_out)
    """

    def __init__(self, trainers: Sequence[Trainer]) -> None:
        """A sweep over one or more trainers, each wherever it stands."""
        if not trainers:
            raise ConfigError("a sweep was given no trainer: give it at least one.")
        self.trainers = tuple(trainers)
        self.stopped: dict[int, TrainingError] = {}
        """Why a trainer takes no more steps, by its place; its state is that of its last good step."""

    def step(self, x: Float[Tensor, "token d_model"]) -> list[StepMetrics | None]:
        """One step of every trainer that still runs, None for the others; `TrainingError` if none is left.

        A batch that no autoencoder could take (its width, no token) is a `ConfigError` and changes nothing.
        """
        for trainer in self.trainers:
            trainer.check_batch(x)
        metrics: list[StepMetrics | None] = [None] * len(self.trainers)
        for place, trainer in enumerate(self.trainers):
            if place in self.stopped:
                continue
            try:
                metrics[place] = trainer.step(x)
            except TrainingError as error:
                if len(self.trainers) == 1:
                    raise
                self.stopped[place] = error
        if len(self.stopped) == len(self.trainers):
            told = "; ".join(f"trainer {place}: {error}" for place, error in sorted(self.stopped.items()))
            raise TrainingError(f"no trainer of the sweep is left. {told}")
        return metrics

    def finish(self, held_out: Iterable[Float[Tensor, "_ _"]]) -> list[SparseAutoencoder]:
        """The trained autoencoders, stopped ones as of their last good step; `held_out` is kept in memory."""
        batches = list(held_out)
        return [trainer.finish(batches) for trainer in self.trainers]
