"""An architecture is a record: what is chosen in training and at inference, what is minimised, what is forbidden.

| arch | training | inference | loss | paper |
|---|---|---|---|---|
| batchtopk | k * B largest of the batch | threshold, calibrated to E[L0] = k | mse + AuxK / 32 | arXiv 2412.06410 |
| topk | k largest of each token | the same | mse + AuxK / 32 | arXiv 2406.04093 |

At inference a token's code never depends on the tokens beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sae_core.errors import ConfigError
from sae_core.sae.codes import SparseCodes
from sae_core.sae.constraints import UNIT_NORM, Constraint
from sae_core.sae.objectives import Objective, reconstruction_with_auxk
from sae_core.sae.selectors import Selector, above_threshold, batch_topk, token_topk


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The separate pieces that make one kind of sparse autoencoder."""

    select: Selector
    """Chooses the code of a training batch."""
    infer: Callable[[Tensor, int, float], SparseCodes]
    """(pre [token feature], k, theta) -> codes, each token by itself."""
    calibrated: bool
    """Whether `infer` uses theta, which is then calibrated at the end of training."""
    objective: Objective
    constraint: Constraint = UNIT_NORM


ARCHITECTURES = {
    "batchtopk": Architecture(
        select=batch_topk,
        infer=lambda pre, k, theta: above_threshold(pre, theta),
        calibrated=True,
        objective=reconstruction_with_auxk,
    ),
    "topk": Architecture(
        select=token_topk,
        infer=lambda pre, k, theta: token_topk(pre, k),
        calibrated=False,
        objective=reconstruction_with_auxk,
    ),
}


def architecture(name: str) -> Architecture:
    """The record of an architecture; `ConfigError` lists the known ones."""
    if name not in ARCHITECTURES:
        raise ConfigError(f"arch = {name!r} is not known; choose one of {', '.join(sorted(ARCHITECTURES))}.")
    return ARCHITECTURES[name]
