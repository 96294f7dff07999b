"""The dense kernel: both products as matrix products over all features, with gradients by plain autograd.

A step costs 10 B d F floating point operations. The other kernels are tested against it, and it runs on devices
without a kernel of their own.
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
    """The values of x W_enc^T + b_enc at the entries of `codes`."""
    return functional.linear(x, W_enc, b_enc)[codes.row, codes.col.long()]


def decode(codes: SparseCodes, W_dec: Float[Tensor, "feature d_model"]) -> Float[Tensor, "token d_model"]:
    """The product of codes and decoder."""
    return codes.to_dense() @ W_dec
