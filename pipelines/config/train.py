"""The options of training a sparse autoencoder."""

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from pipelines.config.options import MovedDataOptions, Positive, PositiveFloat, as_tuple

Arch = Literal["batchtopk", "matryoshka", "topk", "jumprelu", "gated", "standard"]

MAX_NAME = 250


def check_registered_name(name: str | None) -> str | None:
    """Return a name that the model registry takes; ValueError for any other."""
    if name is None:
        return None
    is_plain = name.isprintable() and not {"/", ":"} & set(name) and not name.startswith(".")
    if is_plain and name.strip() and len(name) <= MAX_NAME:
        return name
    raise ValueError(
        f"allowed in the model registry: 1 to {MAX_NAME} printable characters without / and :, of which the first is "
        "no dot; e.g. --name sae-mine"
    )


class TrainOptions(MovedDataOptions):
    """Fit a sparse autoencoder to stored activations with Ray Train."""

    activations: str | None = None
    """Activations run to train on; default: the newest."""
    arch: Annotated[tuple[Arch, ...], pydantic.BeforeValidator(as_tuple)] = Field(default=("batchtopk",), min_length=1)
    """Architecture of the autoencoder: batchtopk, matryoshka, topk, jumprelu, gated or standard. May be repeated, like
    k and l1_coefficient: all combinations are trained in one pass over the activations, each as its own run."""
    n_features: int | None = Field(default=None, ge=1)
    """Number of features; default: 8 times the width of the model."""
    k: Annotated[tuple[Positive, ...], pydantic.BeforeValidator(as_tuple)] = Field(default=(16,), min_length=1)
    """Number of active features per token; it has no effect on gated and standard. May be repeated."""
    l1_coefficient: Annotated[tuple[PositiveFloat, ...], pydantic.BeforeValidator(as_tuple)] = ()
    """Weight of the L1 loss of gated and standard, which sets how many features are active; default: 0.2. May be
    repeated."""
    orthogonality_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the penalty on features whose decoder rows have a large cosine; default: 0, which trains without."""
    groups: tuple[PositiveFloat, ...] = ()
    """Share of the features in each nested group of matryoshka, given once for each group; the shares add up to 1.
    Default: 1/16, 1/16, 1/8, 1/4, 1/2."""
    encoder_precision: Literal["f32", "bf16", "int8"] = "f32"
    """Precision of the product that ranks the features of a token: f32, bf16 or int8, which leave values and gradients
    in f32. bf16 makes a step about twice as fast on a GPU or a CPU with AMX, and int8 makes a step of batchtopk or
    matryoshka faster on a CPU with AVX2; on any other device the product is in f32."""
    n_steps: int = Field(default=3000, ge=1)
    """Number of optimizer steps."""
    batch_size: int = Field(default=2048, ge=1)
    """Number of tokens in a step."""
    lr: float | None = Field(default=None, gt=0)
    """Largest learning rate; default: 5e-3, and less for more than 1,024 features."""
    warmup_fraction: float | None = Field(default=None, ge=0, le=1)
    """Share of the steps, at the start, in which the learning rate rises; default: 0.05."""
    decay_fraction: float | None = Field(default=None, ge=0, le=1)
    """Share of the steps, at the end, in which the learning rate falls to 0; default: 0.3."""
    sparsity_warmup_fraction: float | None = Field(default=None, ge=0, le=1)
    """Share of the steps in which the sparsity loss of jumprelu, gated and standard rises to its weight; default:
    0.1."""
    dead_window_tokens: int | None = Field(default=None, ge=1)
    """Number of tokens without activity after which a feature counts as dead; default: a 20th of all tokens of the
    run."""
    seed: int = Field(default=0, ge=0)
    """Seed of the initial weights and of the order of the tokens."""
    checkpoint_steps: int = Field(default=500, ge=1)
    """Number of steps between two checkpoints."""
    recovery_cells: int = Field(default=32, ge=0)
    """Number of `select` cells on which the loss recovered is measured, with x_hat in place of the activations; 0
    measures nothing."""
    num_workers: int = Field(default=1, ge=0)
    """Number of Ray Train workers, which divide the tokens of each step; 0 trains in the process of the command, which
    saves the start of a worker."""
    num_cpus: int = Field(default=1, ge=1)
    """CPU cores of each worker; more than one is faster only on cores that are otherwise idle."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs of each worker."""
    name: Annotated[str | None, pydantic.AfterValidator(check_registered_name)] = None
    """Name in the model registry; default: sae-MODEL-SITE."""
