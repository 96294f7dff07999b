"""`SAEConfig`, what an autoencoder is, and `TrainConfig`, how it is trained.

They are separate because the first is saved with the weights and the second has no meaning once training has ended.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from itertools import accumulate
from typing import Any, get_args, get_type_hints

from sae_core.errors import ConfigError

PRECISIONS = ("f32", "bf16", "int8")
MAX_DEAD_WINDOW = 10_000_000  # tokens; the fixed window of arXiv 2406.04093 is only the upper bound here


def _require(ok: bool, rule: str, name: str, value: object) -> None:
    if not ok:
        raise ConfigError(f"{name} = {value!r} is not allowed: {rule}.")


def _require_whole(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(type(value) is int and value >= 1, f"{name} is a whole number >= 1", name, value)


def _require_share(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(0 <= value <= 1, "a share between 0 and 1", name, value)


def _checked_keys(cls: type, values: Mapping[str, Any]) -> Mapping[str, Any]:
    _require(isinstance(values, Mapping), "an object of fields and values", cls.__name__, values)
    known = {field.name: field.default is MISSING for field in fields(cls)}
    unknown = sorted(set(values) - set(known))
    missing = [name for name, needed in known.items() if needed and name not in values]
    if unknown or missing:
        raise ConfigError(
            f"{cls.__name__} cannot be made from the keys {sorted(values)}: {unknown} are unknown and {missing} are "
            f"missing; its fields are {', '.join(known)}."
        )
    kinds = {name: get_args(hint) or (hint,) for name, hint in get_type_hints(cls).items()}
    for name, value in values.items():
        _require_type(name, value, kinds[name])
    # JSON may write 0 for 0.0
    return {
        name: float(value) if float in kinds[name] and type(value) is int else value for name, value in values.items()
    }


def _require_type(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Check the type of a value from JSON; a list of numbers stands for a tuple."""
    if Ellipsis in allowed:
        ok = isinstance(value, list | tuple) and all(_is_number(entry) for entry in value)
        _require(ok, "a list of numbers", name, value)
        return
    words = {int: "a whole number", float: "a finite number", str: "a text", type(None): "null"}
    checks = {int: type(value) is int, float: _is_number(value), str: isinstance(value, str), type(None): value is None}
    known = [kind for kind in words if kind in allowed]
    _require(any(checks[kind] for kind in known), " or ".join(words[kind] for kind in known), name, value)


def _is_number(value: object) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """The size, sparsity and architecture of one sparse autoencoder.

    Raises:
        ConfigError: a field has a value that is not allowed.
    """

    d_model: int
    """Width of the activations."""
    n_features: int
    """Number of features F; a usual choice is 8 * d_model."""
    k: int
    """Active features per token: the exact number (topk), the average (batchtopk, matryoshka) or the target of training
    (jumprelu). It has no effect on standard and gated, which use `l1_coefficient`."""
    arch: str = "batchtopk"
    """A key of `architectures.ARCHITECTURES`; an unknown one is an error when the autoencoder is built."""
    k_aux: int | None = None
    """The number of dead features that reconstruct the residual of one token; None: d_model // 2 (arXiv 2406.04093)."""
    aux_coefficient: float = 1 / 32
    """Weight of the AuxK loss; 0 turns it off."""
    groups: tuple[float, ...] = (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
    """matryoshka: sizes of the nested groups as shares of the features; their sum is 1 (arXiv 2503.17547)."""
    l1_coefficient: float = 0.2
    """standard, gated: weight of the L1 loss in normalised units; the resulting L0 depends on the data."""
    l0_coefficient: float = 1.0
    """jumprelu: weight of (L0 / k - 1)^2."""
    bandwidth: float = 0.05
    """jumprelu: width, in normalised units, of the window around a threshold from which its gradient is estimated."""
    orthogonality_coefficient: float = 0.0
    """Weight of the penalty on decoder rows with a large cosine (arXiv 2509.22033); 0 turns it off."""

    def __post_init__(self) -> None:
        _require_whole(self, "d_model", "n_features")
        rule = f"k is a whole number, 1 <= k <= n_features, and n_features is {self.n_features}"
        _require(type(self.k) is int and 1 <= self.k <= self.n_features, rule, "k", self.k)
        if self.k_aux is not None:
            _require_whole(self, "k_aux")
        for name in ("aux_coefficient", "l1_coefficient", "l0_coefficient", "orthogonality_coefficient"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= 0, "a finite number >= 0", name, value)
        _require(math.isfinite(self.bandwidth) and self.bandwidth > 0, "a number > 0", "bandwidth", self.bandwidth)
        fractions = all(share > 0 for share in self.groups) and math.isclose(sum(self.groups), 1.0, abs_tol=1e-6)
        _require(fractions, f"shares > 0 whose sum is 1, and it is {sum(self.groups):g}", "groups", self.groups)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SAEConfig":
        """The configuration with these fields; a `ConfigError` names unknown and missing keys."""
        checked = dict(_checked_keys(cls, values))
        return cls(**checked | {"groups": tuple(checked.get("groups", cls.groups))})

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self) | {"groups": list(self.groups)}

    @property
    def group_stops(self) -> tuple[int, ...]:
        """The first feature after each nested group, up to `n_features`; a group without a feature is left out."""
        stops = {round(share * self.n_features) for share in accumulate(self.groups)} - {0}
        return tuple(sorted(stops | {self.n_features}))

    @property
    def n_aux(self) -> int:
        """The largest number of dead features that AuxK uses for one token."""
        return max(1, self.d_model // 2) if self.k_aux is None else self.k_aux


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The length, learning rate and dead-feature window of one training run.

    Raises:
        ConfigError: a field has a value that is not allowed.
    """

    n_steps: int
    """Total number of optimizer steps."""
    batch_size: int = 4096
    """Tokens per step; a shorter last batch is accepted."""
    lr: float | None = None
    """Peak learning rate; None: `peak_lr`, which depends on the number of features."""
    warmup_fraction: float = 0.05
    """Share of the steps over which the learning rate rises linearly from 0."""
    decay_fraction: float = 0.3
    """Share of the steps at the end over which the learning rate falls linearly to 0."""
    sparsity_warmup_fraction: float = 0.1
    """Share of the steps over which the weight of an L1 or L0 loss rises linearly to its coefficient."""
    dead_window_tokens: int | None = None
    """A feature that has not fired for this many tokens is dead; None: a 20th of all tokens of the run, at most
    10 million."""
    theta_decay: float = 0.99
    """Decay per step of the running mean of the threshold; calibration replaces that mean at the end of training."""
    encoder_precision: str = "f32"
    """Precision in which the pre-activations of all features are ranked, "f32", "bf16" or "int8". The values of the
    selected features and all gradients are float32 in each case, and float32 also ranks where the device has no fast
    product in the other precision (`ranking.ranking_on`), or with int8 another architecture than batchtopk and
    matryoshka."""
    seed: int = 0
    """Seed of the initial weights."""

    def __post_init__(self) -> None:
        _require_whole(self, "n_steps", "batch_size")
        _require(
            self.encoder_precision in PRECISIONS,
            f"one of {', '.join(PRECISIONS)}",
            "encoder_precision",
            self.encoder_precision,
        )
        _require(
            self.lr is None or (math.isfinite(self.lr) and self.lr > 0), "a finite number > 0, or None", "lr", self.lr
        )
        _require_share(self, "warmup_fraction", "decay_fraction", "sparsity_warmup_fraction")
        total = self.warmup_fraction + self.decay_fraction
        _require(total <= 1, "warm-up and decay together take at most the whole run", "warmup + decay", total)
        if self.dead_window_tokens is not None:
            _require_whole(self, "dead_window_tokens")
        _require(0 <= self.theta_decay < 1, "a number in [0, 1)", "theta_decay", self.theta_decay)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """The configuration with these fields; a `ConfigError` names unknown and missing keys."""
        return cls(**_checked_keys(cls, values))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)

    @property
    def dead_window(self) -> int:
        """The number of tokens without firing after which a feature is dead; it scales with the length of the run."""
        if self.dead_window_tokens is not None:
            return self.dead_window_tokens
        return min(MAX_DEAD_WINDOW, max(self.batch_size, self.n_steps * self.batch_size // 20))

    def peak_lr(self, n_features: int) -> float:
        """The peak learning rate: `lr`, or 5e-3 up to 1024 features and proportional to n_features^-1/2 beyond.

        The exponent is that of arXiv 2406.04093; its constant (8e-4 at 1024 features) is for billions of tokens. On
        activations of the mini model (F 1024, k 16, 2 million tokens) 8e-4, 5e-3 and 2e-2 leave fvu .057, .023, .019
        and dead fractions 0, 0, .04.
        """
        return 5e-3 / math.sqrt(max(1.0, n_features / 1024)) if self.lr is None else self.lr

    def sparsity_at(self, step: int) -> float:
        """The factor on the sparsity losses at `step` (0 to `n_steps` - 1): it rises linearly to 1 and stays there."""
        return min(1.0, (step + 1) / max(1, round(self.sparsity_warmup_fraction * self.n_steps)))

    def lr_at(self, step: int, n_features: int) -> float:
        """The learning rate at `step` (0 to `n_steps` - 1): a linear rise, a plateau and a linear fall."""
        rise = min(1.0, (step + 1) / max(1, round(self.warmup_fraction * self.n_steps)))
        fall = min(1.0, (self.n_steps - step) / max(1, round(self.decay_fraction * self.n_steps)))
        return self.peak_lr(n_features) * min(rise, fall)
