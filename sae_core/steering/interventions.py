"""What is done to a code: six interventions, each the change that it adds to the values of its features.

With z the value of a feature on a token, and dose * unit the amount in the code's own units:
    Ablate   z' = 0
    Clamp    z' = dose * unit           also where the feature was inactive
    Add      z' = z + dose * unit       also where the feature was inactive
    Scale    z' = factor * z
    Toward   z' = z + amount * (mean_code - z)
    Shift    z' = z + amount * difference
`unit` holds one scale a feature (its 99th percentile on `train`, say), so that a dose means the same for a faint
feature and a loud one; without it a dose is in the activation's own units. `amount` is one number or one a feature.
A reference or difference may depend on the token's gene and its cell's group (`GroupMeans`). An intervention returns
the change z' - z and not z', so that doing nothing is exactly zero and `Add` adds exactly what it says.
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
    """A change to the values of some features; subclasses say which change."""

    features: Sequence[int]
    """Feature ids; kept ascending, each once."""

    def __post_init__(self) -> None:
        chosen = tuple(sorted({int(feature) for feature in self.features}))
        if not chosen or chosen[0] < 0:
            raise ConfigError(
                f"features = {list(self.features)} select nothing that exists: give one or more ids, from 0 on."
            )
        object.__setattr__(self, "features", chosen)
        for name, value in vars(self).items():
            if isinstance(value, float | Tensor) and not bool(torch.as_tensor(value).isfinite().all()):
                raise ConfigError(f"{name} = {value} is not finite: a code cannot be moved by it.")

    @abstractmethod
    def change(self, z: Float[Tensor, "token chosen"], info: TokenInfo) -> Float[Tensor, "token chosen"]:
        """What is added to the values z of `features`, in their order, on the tokens of `info`."""

    @property
    def groups(self) -> Int64[Tensor, " cell"] | None:
        """Group of each cell, where the change depends on it."""
        return None

    def vectors(self) -> dict[str, Float[Tensor, " feature"]]:
        """Vectors over all features that the intervention was given, by field name."""
        return {name: v for name, v in vars(self).items() if isinstance(v, Tensor) and name != "group_of_cell"}

    def check(self, n_features: int) -> None:
        """`ConfigError` if a feature, or a vector over features, does not fit an autoencoder of `n_features`."""
        if self.features[-1] >= n_features:
            raise ConfigError(
                f"feature {self.features[-1]} does not exist: the autoencoder has features 0 to {n_features - 1}. "
                "`scsae features` lists them."
            )
        for name, vector in self.vectors().items():
            if vector.shape != (n_features,):
                raise ConfigError(
                    f"{name} has shape {tuple(vector.shape)}: it needs one value for each of the {n_features} features."
                )

    def index(self, device: torch.device) -> Int64[Tensor, " chosen"]:
        """The features as an index."""
        return torch.tensor(self.features, device=device)

    def _of_chosen(self, vector: Tensor, z: Tensor) -> Tensor:
        return vector.to(device=z.device, dtype=z.dtype)[self.index(z.device)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Ablate(Intervention):
    """z' = 0."""

    def change(self, z: Float[Tensor, "token chosen"], info: TokenInfo) -> Float[Tensor, "token chosen"]:
        """-z."""
        return -z


@dataclass(frozen=True, kw_only=True, eq=False)
class _DosedIntervention(Intervention):
    dose: float
    unit: Float[Tensor, " feature"] | None = None
    """One scale for each feature of the autoencoder; None: the code's own units."""

    def _amount(self, z: Float[Tensor, "token chosen"]) -> Float[Tensor, "token chosen"]:
        if self.unit is None:
            return torch.full_like(z, self.dose)
        return (self.dose * self._of_chosen(self.unit, z)).expand_as(z)


@dataclass(frozen=True, kw_only=True, eq=False)
class Clamp(_DosedIntervention):
    """z' = dose * unit, whatever z was."""

    def change(self, z: Float[Tensor, "token chosen"], info: TokenInfo) -> Float[Tensor, "token chosen"]:
        """Difference dose * unit - z."""
        return self._amount(z) - z


@dataclass(frozen=True, kw_only=True, eq=False)
class Add(_DosedIntervention):
    """z' = z + dose * unit."""

    def change(self, z: Float[Tensor, "token chosen"], info: TokenInfo) -> Float[Tensor, "token chosen"]:
        """The amount dose * unit."""
        return self._amount(z)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scale(Intervention):
    """z' = factor * z: an inactive feature stays inactive."""

    factor: float

    def change(self, z: Float[Tensor, "token chosen"], info: TokenInfo) -> Float[Tensor, "token chosen"]:
        """(factor - 1) z."""
        return (self.factor - 1) * z


@dataclass(frozen=True, kw_only=True, eq=False)
class _GroupIntervention(Intervention):
    amount: float | Float[Tensor, " feature"] = 1.0
    """How far: one number, or one for each feature of the autoencoder."""
    group_of_cell: Int64[Tensor, " cell"] | None = None
    """Group of each cell that the model is given, for `GroupMeans`."""

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
                raise ConfigError("the means are by group: give group_of_cell, the group of each cell.")

    @property
    def groups(self) -> Int64[Tensor, " cell"] | None:
        """Group of each cell."""
        return self.group_of_cell

    def _lookup(
        self, source: Tensor | GroupMeans, z: Float[Tensor, "token chosen"], info: TokenInfo
    ) -> tuple[Float[Tensor, "#token chosen"], Bool[Tensor, "#token 1"]]:
        """What `source` holds for each token, and whether it holds anything."""
        if isinstance(source, Tensor):
            return self._of_chosen(source, z)[None], torch.ones(1, 1, dtype=torch.bool, device=z.device)
        assert self.group_of_cell is not None
        values, known = source.lookup(self.group_of_cell, info)
        return values.to(z.dtype), known[:, None]

    def _times_amount(self, way: Float[Tensor, "token chosen"]) -> Float[Tensor, "token chosen"]:
        return (self._of_chosen(self.amount, way) if isinstance(self.amount, Tensor) else self.amount) * way


@dataclass(frozen=True, kw_only=True, eq=False)
class Toward(_GroupIntervention):
    """z' = z + amount * (mean_code - z): part of the way (0 to 1) to a group's mean code."""

    mean_code: Float[Tensor, " feature"] | GroupMeans
    """Mean codes: one value for each feature of the autoencoder, or a table; a token without a row keeps its code."""

    def change(self, z: Float[Tensor, "token chosen"], info: TokenInfo) -> Float[Tensor, "token chosen"]:
        """Share amount * (mean_code - z) of the way."""
        mean_code, known = self._lookup(self.mean_code, z, info)
        return self._times_amount(mean_code - z).where(known, 0.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Shift(_GroupIntervention):
    """z' = z + amount * difference: the way from one group's mean code to another's, added to each token's own.

    Unlike `Toward` it keeps what tells the tokens of a group and gene apart.
    """

    difference: GroupMeans
    """Mean code of the one group less that of the other; a token without a row keeps its code."""

    def change(self, z: Float[Tensor, "token chosen"], info: TokenInfo) -> Float[Tensor, "token chosen"]:
        """The amount of the difference."""
        difference, known = self._lookup(self.difference, z, info)
        return self._times_amount(difference).where(known, 0.0)
