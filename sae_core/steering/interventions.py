"""The six interventions on codes; each one gives the change z' - z of the values of its features.

With z the value of a feature on a token, and dose * unit an amount in the units of the code:
    Ablate   z' = 0
    Clamp    z' = dose * unit           also where the feature is inactive
    Add      z' = z + dose * unit       also where the feature is inactive
    Scale    z' = factor * z
    Toward   z' = z + amount * (mean_code - z)
    Shift    z' = z + amount * difference
`unit` holds one scale for each feature (for example its 99th percentile on the `train` split), so that a dose means
the same for a feature of small values and one of large values; without it a dose is in the units of the activation.
`amount` is one number, or one for each feature. `mean_code` and `difference` may depend on the token's gene and its
cell's group (`GroupMeans`). An intervention returns z' - z instead of z', so that an intervention without effect is
exactly zero and `Add` adds exactly its dose.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sae_core.errors import ConfigError
from sae_core.scfm.sites import TokenInfo
from sae_core.steering.group_means import GroupMeans


@dataclass(frozen=True, kw_only=True, eq=False)
class Intervention(ABC):
    """A change to the values of some features; each subclass defines one kind of change.

    Raises:
        ConfigError: no feature is named, a feature is negative, or a number is not finite.
    """

    features: Sequence[int]
    """Feature ids; they are sorted, and repeated ids count once."""

    def __post_init__(self) -> None:
        chosen = tuple(sorted({int(feature) for feature in self.features}))
        if not chosen or chosen[0] < 0:
            raise ConfigError(f"features = {list(self.features)} is not allowed: give one or more feature ids >= 0.")
        object.__setattr__(self, "features", chosen)
        for name, value in vars(self).items():
            if isinstance(value, float | Tensor) and not bool(torch.as_tensor(value).isfinite().all()):
                raise ConfigError(f"{name} = {value} is not finite; allowed are finite numbers.")

    @abstractmethod
    def change(self, z: Float[Tensor, "token chosen"], info: TokenInfo) -> Float[Tensor, "token chosen"]:
        """The change z' - z of the values of `features`, in their order, on the tokens of `info`."""

    @property
    def groups(self) -> Int64[Tensor, " cell"] | None:
        """The group of each cell, or None if the change does not depend on it."""
        return None

    def vectors(self) -> dict[str, Float[Tensor, " feature"]]:
        """The fields that hold one value for each feature of the autoencoder, by name."""
        return {name: v for name, v in vars(self).items() if isinstance(v, Tensor) and name != "group_of_cell"}

    def check(self, n_features: int) -> None:
        """Check that the intervention fits an autoencoder of `n_features`.

        Raises:
            ConfigError: a feature does not exist, or a vector over features has another length.
        """
        if self.features[-1] >= n_features:
            raise ConfigError(
                f"feature {self.features[-1]} does not exist: the autoencoder has features 0 to {n_features - 1}. "
                "`scsae features` lists them."
            )
        for name, vector in self.vectors().items():
            if vector.shape != (n_features,):
                raise ConfigError(
                    f"{name} has shape {tuple(vector.shape)}; allowed is ({n_features},), one value for each feature."
                )

    def index(self, device: torch.device) -> Int64[Tensor, " chosen"]:
        """The feature ids as a tensor on `device`."""
        return torch.tensor(self.features, device=device)

    def _of_chosen(self, vector: Tensor, z: Tensor) -> Tensor:
        return vector.to(device=z.device, dtype=z.dtype)[self.index(z.device)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Ablate(Intervention):
    """z' = 0."""

    def change(self, z: Float[Tensor, "token chosen"], info: TokenInfo) -> Float[Tensor, "token chosen"]:
        """The change -z."""
        return -z


@dataclass(frozen=True, kw_only=True, eq=False)
class _DosedIntervention(Intervention):
    dose: float
    unit: Float[Tensor, " feature"] | None = None
    """One scale for each feature of the autoencoder; None: 1, so that the dose is in the units of the code."""

    def _amount(self, z: Float[Tensor, "token chosen"]) -> Float[Tensor, "token chosen"]:
        if self.unit is None:
            return torch.full_like(z, self.dose)
        return (self.dose * self._of_chosen(self.unit, z)).expand_as(z)


@dataclass(frozen=True, kw_only=True, eq=False)
class Clamp(_DosedIntervention):
    """z' = dose * unit for every z."""

    def change(self, z: Float[Tensor, "token chosen"], info: TokenInfo) -> Float[Tensor, "token chosen"]:
        """The change dose * unit - z."""
        return self._amount(z) - z


@dataclass(frozen=True, kw_only=True, eq=False)
class Add(_DosedIntervention):
    """z' = z + dose * unit."""

    def change(self, z: Float[Tensor, "token chosen"], info: TokenInfo) -> Float[Tensor, "token chosen"]:
        """The change dose * unit."""
        return self._amount(z)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scale(Intervention):
    """z' = factor * z; an inactive feature stays inactive."""

    factor: float

    def change(self, z: Float[Tensor, "token chosen"], info: TokenInfo) -> Float[Tensor, "token chosen"]:
        """The change (factor - 1) z."""
        return (self.factor - 1) * z


@dataclass(frozen=True, kw_only=True, eq=False)
class _GroupIntervention(Intervention):
    amount: float | Float[Tensor, " feature"] = 1.0
    """Factor on the change: one number, or one for each feature of the autoencoder."""
    group_of_cell: Int64[Tensor, " cell"] | None = None
    """The group of each cell in the model's input; needed with `GroupMeans`."""

    def __post_init__(self) -> None:
        given = list(self.features)
        super().__post_init__()
        for table in (value for value in vars(self).values() if isinstance(value, GroupMeans)):
            if given != list(self.features) or table.values.shape[1] != len(given):
                raise ConfigError(
                    f"the group means have {table.values.shape[1]} columns for features {given}: give one column for "
                    "each feature, and name the features in ascending order, each once."
                )
            if self.group_of_cell is None:
                raise ConfigError("group_of_cell = None is not allowed with GroupMeans: give the group of each cell.")

    @property
    def groups(self) -> Int64[Tensor, " cell"] | None:
        """The group of each cell."""
        return self.group_of_cell

    def _lookup(
        self, source: Tensor | GroupMeans, z: Float[Tensor, "token chosen"], info: TokenInfo
    ) -> tuple[Float[Tensor, "#token chosen"], Bool[Tensor, "#token 1"]]:
        """The vector of `source` for each token, and whether the token has one."""
        if isinstance(source, Tensor):
            return self._of_chosen(source, z)[None], torch.ones(1, 1, dtype=torch.bool, device=z.device)
        assert self.group_of_cell is not None
        values, has_row = source.lookup(self.group_of_cell, info)
        return values.to(z.dtype), has_row[:, None]

    def _times_amount(self, change: Float[Tensor, "token chosen"]) -> Float[Tensor, "token chosen"]:
        return (self._of_chosen(self.amount, change) if isinstance(self.amount, Tensor) else self.amount) * change


@dataclass(frozen=True, kw_only=True, eq=False)
class Toward(_GroupIntervention):
    """z' = z + amount * (mean_code - z): a move to a group's mean code, complete at amount 1."""

    mean_code: Float[Tensor, " feature"] | GroupMeans
    """The mean code: one value for each feature of the autoencoder, or `GroupMeans` with one column for each of
    `features`; a token without a row keeps its code."""

    def change(self, z: Float[Tensor, "token chosen"], info: TokenInfo) -> Float[Tensor, "token chosen"]:
        """The change amount * (mean_code - z)."""
        mean_code, has_row = self._lookup(self.mean_code, z, info)
        return self._times_amount(mean_code - z).where(has_row, 0.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Shift(_GroupIntervention):
    """z' = z + amount * difference, with the difference between the mean codes of two groups.

    Unlike `Toward`, it keeps the differences between the tokens of one group and gene.
    """

    difference: GroupMeans
    """The mean code of one group minus that of the other, with one column for each of `features`; a token without a
    row keeps its code."""

    def change(self, z: Float[Tensor, "token chosen"], info: TokenInfo) -> Float[Tensor, "token chosen"]:
        """The change amount * difference."""
        difference, has_row = self._lookup(self.difference, z, info)
        return self._times_amount(difference).where(has_row, 0.0)
