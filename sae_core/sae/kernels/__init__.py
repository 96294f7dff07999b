"""The two sparse products of an autoencoder, which take most of the time of a dense implementation, for each device.

`encode` attaches gradients to selected pre-activations, and `decode` multiplies a sparse code by the decoder. A
`Kernel` is a record of the two, and the door is `kernel_for(device)`. Every kernel equals `DENSE` (plain autograd) in
values and gradients; the tests check this. A new device needs three sparse primitives
(`sparse_products.SparseProducts`) and an entry in `KERNELS`.
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
    entries of `codes`, differentiable in x, W_enc and b_enc. `codes.value` has to hold these values already, unless its
    type is coarser than that of x."""
    decode: Callable[[SparseCodes, Tensor], Tensor]
    """(codes, W_dec [feature d_model]) -> codes W_dec [token d_model], differentiable in `codes.value` and W_dec."""


DENSE = Kernel(encode=dense.encode, decode=dense.decode)
CPU = Kernel(encode=cpu.PRODUCTS.encode, decode=cpu.PRODUCTS.decode)


@cache
def triton_kernel() -> Kernel:
    """The kernel of CUDA devices.

    Raises:
        ConfigError: the package triton is missing; there is no fallback, as the dense kernel would fill the memory.
    """
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
"""A function that gives the kernel, for each type of device that has its own."""


def kernel_for(device: torch.device) -> Kernel:
    """The kernel for the type of a device, or the dense one, which runs on every device."""
    return KERNELS.get(device.type, lambda: DENSE)()
