"""The two products of a sparse autoencoder that a dense implementation wastes its time on, by device.

`encode` attaches gradients to chosen pre-activations, `decode` multiplies a sparse code with the decoder. A `Kernel`
is a record of the two; every one equals `DENSE` (dense, plain autograd) in values and gradients, which the tests
check. A new device is three sparse primitives (`calculus.SparseProducts`) and a new entry in `KERNELS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from sae_core.errors import ConfigError
from sae_core.sae.codes import SparseCodes
from sae_core.sae.kernels import cpu, dense

__all__ = ["CPU", "DENSE", "KERNELS", "Kernel", "kernel_for", "triton_kernel"]


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One implementation of the two products."""

    encode: Callable[[Tensor, Tensor, Tensor, SparseCodes], Tensor]
    """(x [token d_model], W_enc [feature d_model], b_enc [feature], codes) -> values [nnz] of x W_enc^T + b_enc at the
    places of `codes`, differentiable in x, W_enc and b_enc. `codes.value` holds those values already, unless it is of a
    coarser type than x."""
    decode: Callable[[SparseCodes, Tensor], Tensor]
    """(codes, W_dec [feature d_model]) -> codes W_dec [token d_model], differentiable in `codes.value` and W_dec."""


DENSE = Kernel(encode=dense.encode, decode=dense.decode)
CPU = Kernel(encode=cpu.PRODUCTS.encode, decode=cpu.PRODUCTS.decode)


@cache
def triton_kernel() -> Kernel:
    """The kernel of CUDA devices; `ConfigError` without the package triton, as the dense one would fill the memory."""
    try:
        from sae_core.sae.kernels import triton
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ConfigError(
            "a sparse autoencoder on a CUDA device needs the package triton, which is not installed (the CUDA builds "
            "of torch for Linux bring it along). Install it: pip install triton"
        ) from error
    return Kernel(encode=triton.PRODUCTS.encode, decode=triton.PRODUCTS.decode)


KERNELS: dict[str, Callable[[], Kernel]] = {"cpu": lambda: CPU, "cuda": triton_kernel}
"""What makes the kernel of each type of device that has one of its own."""


def kernel_for(device: torch.device) -> Kernel:
    """The kernel written for a device's type, or the dense reference, which runs on all of them."""
    return KERNELS.get(device.type, lambda: DENSE)()
