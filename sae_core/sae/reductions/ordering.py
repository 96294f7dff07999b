"""Operations that take another form on a CPU than on a GPU, with the same results to the bit.

A GPU sorts integers by radix, a CPU is faster where it need not sort, or where numpy sorts with vector instructions.
Measured on one thread of an AMD EPYC with AVX2:

    sorting 4 M int32 keys               numpy 52 ms     torch.sort 464 ms
    merging two sorted runs, 12 M int32  numpy 99 ms     torch.sort 1,217 ms
    the 256th largest of 9 x 8192        numpy .2 ms     torch.topk .8 ms
    a float64 sum of 262 k by key        in place .4 ms  by sorting 30 ms
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int, Int64, Shaped
from torch import Tensor


def to_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    """The tensor in main memory, as an array."""
    return tensor.cpu().numpy()


def sort_keys(keys: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The keys, ascending."""
    if keys.device.type == "cpu":
        return torch.from_numpy(np.sort(keys.numpy()))
    return torch.sort(keys).values


def merge_order(keys: Int[Tensor, " n"]) -> Int64[Tensor, " n"]:
    """The stable order of keys that are a few sorted runs, one after another."""
    if keys.device.type == "cpu":
        return torch.from_numpy(np.argsort(keys.numpy(), kind="stable"))
    return torch.sort(keys, stable=True).indices


def nth_largest(rows: Float[Tensor, "row column"], n: int) -> Float[Tensor, "row 1"]:
    """The `n`-th largest entry of each row, 1 <= n <= n_columns."""
    if rows.device.type == "cpu":
        place = rows.shape[1] - n
        return torch.from_numpy(np.partition(rows.numpy(), place, axis=1)[:, place : place + 1])
    return rows.topk(n, dim=1).values[:, -1:]


def add_in_order(
    total: Float[Tensor, " n_keys"], key: Int64[Tensor, " n"], value: Float[Tensor, " n"]
) -> Float[Tensor, " n_keys"]:
    """Add each value to `total[key]`, one after another in the order given, and return `total`.

    `total` is float64. The order makes the sums the same to the bit on every device and however entries are cut into
    calls.
    """
    if total.device.type == "cpu":
        # careful: in order because torch walks a one-dimensional scatter on one thread; a test holds it to that
        return total.scatter_add_(0, key, value.double())
    return add_in_order_by_sorting(total, key, value)


def add_in_order_by_sorting(
    total: Float[Tensor, " n_keys"], key: Int64[Tensor, " n"], value: Float[Tensor, " n"]
) -> Float[Tensor, " n_keys"]:
    """`add_in_order` without atomic sums: each key is a segment, which starts with its present total."""
    started = total.nonzero().squeeze(1)
    keys, order = torch.sort(torch.cat([started, key]), stable=True)
    found, lengths = torch.unique_consecutive(keys, return_counts=True)
    values = torch.cat([total[started], value.double()])[order]
    # careful: with a second dimension one GPU thread adds a segment from its first entry to its last; without it, the
    # order of the sum depends on the segment's length and place
    total[found] = torch.segment_reduce(values.unsqueeze(1), "sum", lengths=lengths, unsafe=True).squeeze(1)
    return total


def run_starts(keys: Shaped[Tensor, " n"]) -> Int64[Tensor, " n_runs"]:
    """Where each run of equal entries starts."""
    if keys.numel() == 0:
        return torch.zeros(0, dtype=torch.int64, device=keys.device)
    changes = keys[1:] != keys[:-1]
    if keys.device.type == "cpu":
        places = torch.from_numpy(np.flatnonzero(changes.numpy()))
    else:
        places = changes.nonzero().squeeze(1)
    return torch.cat([places.new_zeros(1), places + 1])
