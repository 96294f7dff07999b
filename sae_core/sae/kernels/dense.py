"""The dense oracle: both products as matrix products over all features, gradients by plain autograd.

A step costs 10 B d F floating point operations. It is what the fast kernels are tested against, and what runs on a
device that has none of its own.
"""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from sae_core.sae.codes import SparseCodes


def encode(
    x: Float[Tensor, "token d_model"],
    W_enc: Float[Tensor, "feature d_model"],
    b_enc: Float[Tensor, " feature"],
    codes: SparseCodes,
) -> Float[Tensor, " nnz"]:
    """Entries of x W_enc^T + b_enc at the places of `codes`."""
    return functional.linear(x, W_enc, b_enc)[codes.row, codes.col.long()]


def decode(codes: SparseCodes, W_dec: Float[Tensor, "feature d_model"]) -> Float[Tensor, "token d_model"]:
    """Codes times decoder."""
    return codes.to_dense() @ W_dec
