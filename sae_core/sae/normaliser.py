"""`Normaliser`: the mean and the scale of activations, fitted in one pass over a stream.

Activations of transformers have a large mean and a few large dimensions. Centring prevents dead features: where the
mean is long relative to the spread (gamma = ||mu|| / ||sigma||), the pre-activations of random directions are dominated
by the mean, and most features fire either always or never (arXiv 2605.31518). All dimensions share one scale, so that
ratios of distances are kept. The sums are updated in float64 by Chan's form of Welford's algorithm, so the normalisers
of two streams can be merged.
"""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from sae_core.errors import ConfigError, TrainingError


class Normaliser:
    """The mean [d_model] and the total squared deviation of all tokens so far.

    Usage: `Normaliser.fit(batches)`, or `update` for each batch and `merge` across workers.
    """

    def __init__(self, d_model: int) -> None:
        self.n_tokens = 0
        self.mean: Float64[Tensor, " d_model"] = torch.zeros(d_model, dtype=torch.float64)
        self.squares = 0.0
        """Sum over tokens of ||x - mean||^2."""

    @classmethod
    def fit(cls, batches: Iterable[Float[Tensor, "_ _"]]) -> "Normaliser":
        """The normaliser of all batches; a `ConfigError` if there is no batch."""
        fitted: Normaliser | None = None
        for batch in batches:
            fitted = fitted or cls(batch.shape[1])
            fitted.update(batch)
        if fitted is None:
            raise ConfigError("batches are empty: give at least 2 tokens of activations to fit the normaliser on.")
        return fitted

    def update(self, x: Float[Tensor, "token d_model"]) -> None:
        """Add a batch of raw activations.

        Raises:
            ConfigError: the batch has another width.
            TrainingError: an activation is not finite.
        """
        if x.shape[1] != self.mean.numel():
            raise ConfigError(
                f"the activations have d_model = {x.shape[1]}; allowed is {self.mean.numel()}, that of the normaliser."
            )
        if x.shape[0] == 0:
            return
        wide = x.detach().double().cpu()
        mean = wide.mean(dim=0)
        squares = float((wide - mean).square().sum())
        if not math.isfinite(squares):
            bad = int((~wide.isfinite().all(dim=1)).nonzero()[0])
            raise TrainingError(
                f"the activation of token {self.n_tokens + bad} of the stream that the normaliser is fitted on is not "
                "finite. Extract the activations again, in float32 if they overflow float16."
            )
        self._add(x.shape[0], mean, squares)

    def merge(self, other: "Normaliser") -> None:
        """Add all tokens of another normaliser."""
        self._add(other.n_tokens, other.mean, other.squares)

    def _add(self, n: int, mean: Float64[Tensor, " d_model"], squares: float) -> None:
        total = self.n_tokens + n
        if total == 0:
            return
        shift = mean - self.mean
        self.squares += squares + float(shift.square().sum()) * self.n_tokens * n / total
        self.mean = self.mean + shift * (n / total)
        self.n_tokens = total

    @property
    def mu(self) -> Float[Tensor, " d_model"]:
        """The mean activation in float32."""
        return self.mean.float()

    @property
    def scale(self) -> float:
        """The scale sqrt(mean ||x - mu||^2); a `TrainingError` if all tokens are equal."""
        value = math.sqrt(self.squares / self.n_tokens) if self.n_tokens else 0.0
        if value == 0.0:
            raise TrainingError(
                f"the {self.n_tokens} tokens of the normaliser do not vary: give activations of at least 2 different "
                "tokens."
            )
        return value

    @property
    def gamma(self) -> float:
        """The ratio ||mu|| / ||sigma||; the larger it is, the more features die without centring."""
        return float(torch.linalg.vector_norm(self.mean)) / self.scale
