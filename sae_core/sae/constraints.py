"""What a step may not do to the decoder: a direction has no length.

Without it decoder rows can grow while codes shrink, and a code's value would mean nothing across features. A
constraint acts twice: on the gradient, so that Adam's moments hold no component that is projected away afterwards,
and on the weights after the step.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


def remove_parallel(grad: Float[Tensor, "feature d_model"], W_dec: Float[Tensor, "feature d_model"]) -> None:
    """Gradient g <- g - (g . w) w for each unit row w, in place: what is left turns the row and does not stretch it."""
    grad.addcmul_((grad * W_dec).sum(dim=1, keepdim=True), W_dec, value=-1)


def normalise_rows(W_dec: Float[Tensor, "feature d_model"]) -> None:
    """Rows w <- w / ||w||, in place."""
    W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True))


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """What is done to the decoder's gradient before a step and to the decoder after it."""

    before_step: Callable[[Tensor, Tensor], None]
    after_step: Callable[[Tensor], None]


UNIT_NORM = Constraint(before_step=remove_parallel, after_step=normalise_rows)
