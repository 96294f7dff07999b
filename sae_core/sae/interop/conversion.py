"""What the formats of other libraries share: the checks of tensors, the equations of the conversion, writing files.

Ours is x_hat = z W_dec + b_dec with z = pre where pre > max(theta, 0), pre = W_enc x + b_enc, rows of W_dec of length 1
(or the k largest positive pre). Other formats differ by an affine map of each feature, so the converted autoencoder is
the same function up to rounding. The conversion is computed in float64 and stored in float32:
    input centred, pre = W_enc (x - b_dec) + b_enc    b_enc' = b_enc - W_enc b_dec
    decoder row of length n                           W_dec / n, and W_enc, b_enc, theta, z times n
    gate W_gate x + b_gate > 0, magnitude exp(r_mag) W_gate x + b_mag
                                                      W_enc = exp(r_mag) W_gate, theta = b_mag - exp(r_mag) b_gate
An autoencoder that saw c x instead of x in training has biases and thresholds in units of c x: b_enc, b_dec and theta
are divided by c (`input_scale`); selection commutes with a positive factor.

Scaling features by different factors changes which entries of a token are the k largest, so a topk autoencoder needs
decoder rows of equal length, or has to rank entries times the length of their decoder row. Whatever has no exact
counterpart here is an error.

Measured with sae-lens 6.54.12, eai-sparsify 1.3.3 and dictionary-learning 0.1.0, with every architecture written here
and read there and the reverse, random weights and activations: of 559,266 active codes none was active on one side
only. Values of up to 65 and reconstructions agree to 2e-5 (float32), those written without centring to the last bit.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.errors import CheckpointError, ConfigError
from sae_core.sae.architectures import architecture
from sae_core.sae.autoencoder import SparseAutoencoder
from sae_core.sae.checkpoint import write_atomically
from sae_core.sae.config import SAEConfig
from sae_core.sae.objectives import Weights

UNIT_TOLERANCE = 1e-5  # a length this close to 1 counts as 1; the difference is rounding in float32
CONFIG_KEY = "scsae"  # key of the JSON that holds our own configuration
ORIGIN_KEY = "scsae_origin"  # key of the JSON that holds our own `Origin`
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class TensorFormat:
    """The tensors of one architecture in one format, and their conversion to `Weights` and back.

    `to_weights` and `from_weights` leave the centring of the input and the lengths of decoder rows as they are.
    `from_weights` is None for a class that the format uses during training only; such a class is read, not written.
    """

    arch: str
    shapes: Mapping[str, str]
    """The axes of each tensor, such as "feature d_model"."""
    optional: Mapping[str, str] = field(default_factory=dict)
    """Tensors that may be absent."""
    to_weights: Callable[[Tensors], Weights]
    from_weights: Callable[[Weights, SAEConfig], Tensors] | None = None
    centred: bool = False
    """Whether b_dec is subtracted from the input, where the JSON of the format does not state it."""
    states_k: bool = False
    """Whether the JSON of the format states k."""
    can_hold: Callable[[Weights], bool] = lambda _: True
    """Whether the format can hold these weights of its architecture."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The model and the site whose activations an autoencoder reads, as its folder states them; None where it does not.

    Raises:
        ConfigError: a value is neither a text nor None.
    """

    model: str | None = None
    site: str | None = None
    """In the words of the library, such as "blocks.2.hook_resid_post"; in ours where the folder was written here."""
    model_digest: str | None = None
    """Digest of the model's weights; only a folder that was written here states it."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{name} = {value!r} is not allowed: a text, or nothing.")

    def to_dict(self) -> dict[str, str]:
        """What is stated, as JSON values."""
        return {name: value for name, value in vars(self).items() if value is not None}


class ForeignSAE(NamedTuple):
    """An autoencoder of another library, which takes raw activations here, and what its folder says about it."""

    sae: SparseAutoencoder
    k_is_stated: bool
    """Whether the folder states k; where it does not, the configuration has k = 1."""
    origin: Origin
    input: str
    """Why raw activations are what it takes, for people."""


class StatedConfig(NamedTuple):
    """What a folder states about the configuration; None where it states nothing."""

    k: int | None = None
    group_stops: Sequence[int] | None = None
    own: Any = None
    """Our own configuration, if the folder was written here."""

    @property
    def has_k(self) -> bool:
        """Whether k is stated."""
        return self.k is not None or self.own is not None


def checked_tensors(folder: Path, tensors: Tensors, tensor_format: TensorFormat) -> dict[str, Tensor]:
    """The tensors in float64.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape or not finite; the message names it.
    """
    known = {**tensor_format.shapes, **tensor_format.optional}
    problems = [f"{name} is missing" for name in tensor_format.shapes if name not in tensors]
    problems += [f"{name} is unexpected" for name in tensors if name not in known]
    sizes: dict[str, int] = {}
    for name in known:
        axes, shape = known[name].split(), tuple(tensors[name].shape) if name in tensors else None
        if shape is None:
            continue
        if len(axes) != len(shape) or any(sizes.setdefault(axis, n) != n for axis, n in zip(axes, shape, strict=True)):
            problems.append(f"{name} is {shape} and should be [{known[name]}] with {sizes}")
        elif not bool(torch.isfinite(tensors[name]).all()):
            problems.append(f"{name} holds values that are not finite")
    if problems:
        wanted = ", ".join(f"{name} [{axes}]" for name, axes in tensor_format.shapes.items())
        raise CheckpointError(f"{folder}: {'; '.join(problems)}. Allowed for this architecture: {wanted}.")
    return {name: tensor.double() for name, tensor in tensors.items()}


def unsupported(folder: Path, what: str, found: object, allowed: str) -> CheckpointError:
    """The error for a value that has no exact counterpart here."""
    return CheckpointError(f"{folder}: {what} is {found!r}, which has no exact counterpart; allowed: {allowed}.")


def json_object(folder: Path, values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The object `name` of the JSON, empty if it is missing; a `CheckpointError` if it is not an object."""
    found = values.get(name) or {}
    if not isinstance(found, dict):
        raise unsupported(folder, name, found, "a JSON object")
    return found


def own_origin(folder: Path, values: Mapping[str, Any]) -> Origin | None:
    """The origin that a folder which was written here states; None for any other folder.

    Raises:
        CheckpointError: the entry is not what was written.
    """
    if ORIGIN_KEY not in values:
        return None
    found = json_object(folder, values, ORIGIN_KEY)
    try:
        return Origin(**found)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{folder} has an entry {ORIGIN_KEY!r} that cannot be read: {error}") from error


def first_text(*values: object) -> str | None:
    """The first value that is a text which can be printed and is not empty; None if there is none."""
    return next((value for value in values if isinstance(value, str) and value and value.isprintable()), None)


def flag(folder: Path, values: Mapping[str, Any], name: str, default: bool) -> bool:
    """A true or false of the JSON; a `CheckpointError` if it is neither."""
    found = values.get(name, default)
    if not isinstance(found, bool):
        raise unsupported(folder, name, found, "true or false")
    return found


def format_named(folder: Path, formats: Mapping[str, TensorFormat], what: str, found: object) -> TensorFormat:
    """The record of an architecture; a `CheckpointError` lists the known names."""
    if not isinstance(found, str) or found not in formats:
        raise unsupported(folder, what, found, ", ".join(formats))
    return formats[found]


def format_for(formats: Mapping[str, TensorFormat], arch: str, weights: Weights) -> str:
    """The name under which an architecture is written: its counterpart, or jumprelu if that cannot hold the weights."""
    written = [name for name, tensor_format in formats.items() if tensor_format.from_weights is not None]
    native = [name for name in written if formats[name].arch == arch and formats[name].can_hold(weights)]
    return native[0] if native else next(name for name in written if formats[name].arch == "jumprelu")


def has_no_threshold(weights: Weights) -> bool:
    """Whether every positive pre-activation is active."""
    return bool((weights.theta <= 0).all())


def has_one_threshold(weights: Weights) -> bool:
    """Whether all features have the same threshold >= 0; a negative one means that it was never fitted."""
    return bool((weights.theta == weights.theta[0]).all()) and bool(weights.theta[0] >= 0)


def is_whole_number(found: object) -> TypeGuard[float]:
    """Whether a value is a whole number >= 1; 32.0, as JSON may hold it, is one."""
    return isinstance(found, int | float) and not isinstance(found, bool) and found >= 1 and found % 1 == 0


def whole_number(folder: Path, what: str, found: object) -> int:
    """The value as a whole number >= 1; a `CheckpointError` if it is not one."""
    if not is_whole_number(found):
        raise unsupported(folder, what, found, "a whole number >= 1")
    return int(found)


def check_agreement(folder: Path, **values: tuple[object, object]) -> None:
    """Raise a `CheckpointError` if a value of the JSON (first; None: not stated) differs from the tensors (second)."""
    for name, (said, held) in values.items():
        if said is not None and said != held:
            raise CheckpointError(f"{folder}: {name} is {said!r} in the JSON and {held!r} in the tensors.")


def gated_weights(t: Tensors, W_gate: Tensor, b_gate: Tensor, b_mag: Tensor, W_dec: Tensor, b_dec: Tensor) -> Weights:
    """A gate with tied magnitude as one encoder with a threshold."""
    stretch = t["r_mag"].exp()
    return Weights(stretch.unsqueeze(1) * W_gate, W_dec, b_mag, b_dec, b_mag - stretch * b_gate)


def shift_b_enc(weights: Weights, sign: int) -> Weights:
    """The weights with another b_enc: to stop (-1) or to start (+1) subtracting b_dec from the input."""
    return weights._replace(b_enc=weights.b_enc + sign * (weights.W_enc @ weights.b_dec))


def build_autoencoder(
    folder: Path,
    weights: Weights,
    *,
    arch: str,
    stated: StatedConfig,
    precision: torch.dtype = torch.float32,
    ranks_lengths: bool = False,
    input_scale: float | None = None,
) -> SparseAutoencoder:
    """The autoencoder of weights whose input is not centred, with unit decoder rows and without gradients.

    `precision` is that of the stored decoder. `ranks_lengths` says that pre-activations are ranked, or compared with
    theta, after multiplication by the length of their decoder row. `input_scale` is the number by which activations
    were multiplied before training (None: 1).

    Raises:
        ConfigError: `input_scale` is not a finite number > 0.
    """
    unit = 1.0 if input_scale is None else input_scale
    if not (math.isfinite(unit) and unit > 0):
        raise ConfigError(f"input_scale = {unit!r} is not allowed: a finite number > 0.")
    config = _config(folder, arch, weights.W_dec, stated)
    per_token = architecture(arch).infer is architecture("topk").infer
    length = _lengths(folder, weights.W_dec, precision, one=per_token and not ranks_lengths)
    column = length.unsqueeze(1)
    theta = weights.theta if ranks_lengths else length * weights.theta
    folded = Weights(
        column * weights.W_enc,
        weights.W_dec / column,
        length * weights.b_enc / unit,
        weights.b_dec / unit,
        theta / unit,
    )
    sae = SparseAutoencoder(config)
    sae.load_state_dict(sae.state_dict() | {name: value.float() for name, value in folded._asdict().items()})
    return sae.requires_grad_(False)


def _lengths(
    folder: Path, W_dec: Float[Tensor, "feature d_model"], precision: torch.dtype, *, one: bool
) -> Float[Tensor, " feature"]:
    """The length of each decoder row, or the mean length if `one` is required; 1 where the difference is rounding."""
    length, tolerance = torch.linalg.vector_norm(W_dec, dim=1), UNIT_TOLERANCE
    low, high = float(length.min()), float(length.max())
    if low == 0:
        raise unsupported(folder, "the length of the shortest decoder row", 0.0, "a direction for each feature")
    if one:
        tolerance = max(UNIT_TOLERANCE, torch.finfo(precision).eps)
        if high / low - 1 > tolerance:
            raise unsupported(
                folder,
                "the lengths of the decoder's rows",
                (low, high),
                "one length for all, as the k largest entries are selected before multiplication by these lengths",
            )
        length = length.mean().expand_as(length)
    return torch.where((length - 1).abs() <= tolerance, 1.0, length)


def _config(folder: Path, arch: str, W_dec: Tensor, stated: StatedConfig) -> SAEConfig:
    n_features, d_model = W_dec.shape
    groups = SAEConfig.groups
    try:
        if stated.group_stops is not None:
            groups = tuple((b - a) / n_features for a, b in pairwise([0, *stated.group_stops]))
        config = SAEConfig(d_model=d_model, n_features=n_features, k=stated.k or 1, arch=arch, groups=groups)
        if stated.own is None:
            return config
        if not isinstance(stated.own, dict):
            raise unsupported(folder, f"the entry {CONFIG_KEY!r} of the JSON", stated.own, "an object, or no entry")
        own = SAEConfig.from_dict(stated.own)
        same = architecture(own.arch).infer is architecture(arch).infer
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder} does not hold a valid configuration: {error}") from error
    k = own.k if stated.k is None else stated.k
    if not same or (own.d_model, own.n_features, own.k) != (d_model, n_features, k):
        raise unsupported(
            folder, f"the entry {CONFIG_KEY!r} of the JSON", own, f"what the folder holds, {config}; or no entry"
        )
    return own


def folded_weights(sae: SparseAutoencoder) -> Weights:
    """The folded weights in float64 on the CPU."""
    return Weights(*(weight.detach().double().cpu() for weight in sae.folded().weights))


def own_entries(sae: SparseAutoencoder, origin: Origin | None) -> dict[str, Any]:
    """The entries of the JSON from which a folder is read back as it was written."""
    stated = {} if origin is None else origin.to_dict()
    return {CONFIG_KEY: sae.config.to_dict(), **({ORIGIN_KEY: stated} if stated else {})}


def as_float32(tensors: Tensors) -> dict[str, Tensor]:
    """The tensors to write: floats as float32, contiguous, and no two sharing memory."""
    return {
        name: (tensor.float() if tensor.is_floating_point() else tensor).clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def write_files(folder: Path, weights: str, data: bytes, header: str, values: Mapping[str, Any]) -> None:
    """Write both files of a folder, the JSON last.

    Raises:
        ConfigError: the values are not plain JSON; nothing has been written.
    """
    try:
        text = json.dumps(values, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the values of {folder / header} are not plain JSON: {error}.") from error
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / weights, data)
    write_atomically(folder / header, text.encode())
