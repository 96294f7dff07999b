"""`Normaliser`: the mean and the scale of activations, fitted in one pass over a stream.

Activations of transformers have a large mean and a few large dimensions. Centring is what prevents dead features:
where the mean is long against the spread (gamma = ||mu|| / ||sigma||), random directions see the mean and nothing
else, and most features either fire always or never (arXiv 2605.31518). One scale for all dimensions, not one each, so
that distances keep their shape. Sums are Chan's update of Welford's, in float64: two streams can be fitted apart and
merged.
"""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from sae_core.errors import ConfigError, TrainingError


class Normaliser:
    """Running mean [d_model] and total squared deviation of the tokens seen so far.

    Usage: `Normaliser.fit(batches)`, or `update` batch by batch and `merge` across workers.
    """

    def __init__(self, d_model: int) -> None:
        self.n_tokens = 0
        self.mean: Float64[Tensor, " d_model"] = torch.zeros(d_model, dtype=torch.float64)
        self.squares = 0.0
        """Sum over tokens of ||x - mean||^2."""

    @classmethod
    def fit(cls, batches: Iterable[Float[Tensor, "_ _"]]) -> "Normaliser":
        """Normaliser of all batches together."""
        fitted: Normaliser | None = None
        for batch in batches:
            fitted = fitted or cls(batch.shape[1])
            fitted.update(batch)
        if fitted is None:
            raise ConfigError("the normaliser was given no batch: give at least two tokens of activations.")
        return fitted

    def update(self, x: Float[Tensor, "token d_model"]) -> None:
        """Take in a batch of raw activations; `TrainingError` if one of them is not finite."""
        if x.shape[1] != self.mean.numel():
            raise ConfigError(
                f"activations have d_model = {x.shape[1]}, the normaliser was made for {self.mean.numel()}."
            )
        if x.shape[0] == 0:
            return
        wide = x.detach().double().cpu()
        mean = wide.mean(dim=0)
        squares = float((wide - mean).square().sum())
        if not math.isfinite(squares):
            bad = int((~wide.isfinite().all(dim=1)).nonzero()[0])
            raise TrainingError(
                f"activations are not finite: first at token {self.n_tokens + bad} of the stream that the normaliser "
                "is fitted on. Extract the activations again, in float32 if they overflow float16."
            )
        self._absorb(x.shape[0], mean, squares)

    def merge(self, other: "Normaliser") -> None:
        """Take in all that `other` has seen."""
        self._absorb(other.n_tokens, other.mean, other.squares)

    def _absorb(self, n: int, mean: Float64[Tensor, " d_model"], squares: float) -> None:
        total = self.n_tokens + n
        if total == 0:
            return
        shift = mean - self.mean
        self.squares += squares + float(shift.square().sum()) * self.n_tokens * n / total
        self.mean = self.mean + shift * (n / total)
        self.n_tokens = total

    @property
    def mu(self) -> Float[Tensor, " d_model"]:
        """Mean activation, float32."""
        return self.mean.float()

    @property
    def scale(self) -> float:
        """sqrt(mean ||x - mu||^2); `TrainingError` if the tokens seen do not vary."""
        value = math.sqrt(self.squares / self.n_tokens) if self.n_tokens else 0.0
        if value == 0.0:
            raise TrainingError(
                f"the {self.n_tokens} tokens that the normaliser has seen do not vary: give it activations of at "
                "least two different tokens."
            )
        return value

    @property
    def gamma(self) -> float:
        """||mu|| / ||sigma||: the longer the mean against the spread, the more features die without centring."""
        return float(torch.linalg.vector_norm(self.mean)) / self.scale
