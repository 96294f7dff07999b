"""The options of training a sparse autoencoder."""

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from pipelines.config.options import Options, Positive, PositiveFloat, as_tuple

Arch = Literal["batchtopk", "matryoshka", "topk", "jumprelu", "gated", "standard"]


class TrainOptions(Options):
    """Fit a sparse autoencoder to stored activations, as a Ray Train job."""

    activations: str | None = None
    """Activations run to train on; default: the newest."""
    arch: Annotated[tuple[Arch, ...], pydantic.BeforeValidator(as_tuple)] = Field(default=("batchtopk",), min_length=1)
    """Architecture of the autoencoder: batchtopk, matryoshka, topk, jumprelu, gated or standard. May be repeated, as k
    and l1_coefficient may: all combinations are trained on one read of the activations, each as a run of its own."""
    n_features: int | None = Field(default=None, ge=1)
    """Number of features F; default: 8 times the model's width."""
    k: Annotated[tuple[Positive, ...], pydantic.BeforeValidator(as_tuple)] = Field(default=(16,), min_length=1)
    """Active features per token, a whole number; without effect on gated and standard. May be repeated."""
    l1_coefficient: Annotated[tuple[PositiveFloat, ...], pydantic.BeforeValidator(as_tuple)] = ()
    """Weight of the L1 loss of gated and standard, which decides how many features are active; default: 0.2. May be
    repeated."""
    groups: tuple[PositiveFloat, ...] = ()
    """matryoshka: share of the features in each nested group, repeated from the first on; they add up to 1. Default:
    1/16, 1/16, 1/8, 1/4, 1/2."""
    encoder_precision: Literal["f32", "bf16"] = "f32"
    """Product that ranks the features of a token: f32, or bf16, which is about twice as fast a step and leaves values
    and gradients in f32."""
    n_steps: int = Field(default=3000, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=2048, ge=1)
    """Tokens per step."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate; default: 5e-3, less for more than 1,024 features."""
    warmup_fraction: float | None = Field(default=None, ge=0, le=1)
    """Share of the steps over which the learning rate rises; default: 0.05."""
    decay_fraction: float | None = Field(default=None, ge=0, le=1)
    """Share of the steps, at the end, over which it falls to 0; default: 0.3."""
    sparsity_warmup_fraction: float | None = Field(default=None, ge=0, le=1)
    """Share of the steps over which the sparsity loss of jumprelu, gated and standard sets in; default: 0.1."""
    dead_window_tokens: int | None = Field(default=None, ge=1)
    """Tokens without firing after which a feature counts as dead; default: a 20th of all tokens of the run."""
    seed: int = Field(default=0, ge=0)
    """Seed of the weights and of the shuffle."""
    checkpoint_steps: int = Field(default=500, ge=1)
    """Steps between two checkpoints."""
    recovery_cells: int = Field(default=32, ge=0)
    """Cells of `select` on which to measure what the model loses when x_hat replaces its activations; 0: none."""
    num_workers: int = Field(default=1, ge=0)
    """Ray Train workers, which share each step's tokens; 0 runs the same loop in the driver's process (starts 20 s
    sooner)."""
    num_cpus: int = Field(default=1, ge=1)
    """CPU cores of each worker; more than one pays on cores that nothing else uses."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs of each worker."""
    name: str | None = None
    """Name in the model registry; default: sae-MODEL-SITE."""
