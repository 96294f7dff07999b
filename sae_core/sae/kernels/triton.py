"""Sparse products on a GPU, forward and backward: the cost is proportional to the nonzeros, without a dense code.

The primitives of `sparse_products`, as two Triton kernels:
    spmm, spmm_t, sum_t  weighted sums of rows, one program for each bag and block of d; a bag is a token, or a feature
                         after one stable sort
    sddmm                one program for each block of entries, which loops over d
Neither uses atomics, so both give the same bits each time. Sums are in float32 (float64 for float64), and each element
of a tile of 32 nonzeros x 128 coordinates has its own sum until the end, so that no load waits for another. One
program processes a whole bag: a feature that fires on every token takes one iteration for every 32 tokens. Addresses
have 64 bits. The kernels have not been run on a GPU yet, so there are no timings; they were checked in Triton's
interpreter and compiled for compute capability 9.0.

Importing this module needs the package triton; `kernel_for` imports it for the first CUDA device.

Tillet, Kung, Cox 2019, "Triton: an intermediate language and compiler for tiled neural network computations".
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, Int64
from torch import Tensor

from sae_core.sae.codes import SparseCodes
from sae_core.sae.kernels.sparse_products import SparseProducts

N_BLOCK = 32  # nonzeros of a tile
D_BLOCK = 128  # coordinates of a tile, at most


def sddmm(
    left: Float[Tensor, "token d_model"], right: Float[Tensor, "feature d_model"], codes: SparseCodes
) -> Float[Tensor, " nnz"]:
    """The inner products of rows of `left` and `right` at the entries of `codes`."""
    values, d_model = left.new_empty(codes.nnz), left.shape[1]
    if codes.nnz:
        grid = (triton.cdiv(codes.nnz, N_BLOCK),)
        with torch.cuda.device_of(left):  # type: ignore[no-untyped-call]
            _inner_products[grid](
                values, left, right, codes.row, codes.col, codes.nnz, d_model, **_tile(d_model, left.dtype)
            )
    return values


def sum_t(codes: SparseCodes) -> Float[Tensor, " feature"]:
    """The sum of the values of each feature over tokens; the order of sums in `index_add` would change each time."""
    order, offsets = codes.by_feature
    ones = codes.value.new_ones(codes.n_tokens, 1)
    return weighted_bags(codes.row[order], offsets, codes.value[order], ones).squeeze(1)


def weighted_bags(
    index: Int[Tensor, " nnz"],
    offsets: Int64[Tensor, " n_bags_plus_1"],
    weight: Float[Tensor, " nnz"],
    table: Float[Tensor, "rows d_model"],
) -> Float[Tensor, "n_bags d_model"]:
    """For each bag, the sum over its entries of weight times row of `table`."""
    n_bags, d_model = offsets.numel() - 1, table.shape[1]
    if index.numel() == 0:
        return table.new_zeros(n_bags, d_model)
    sums, tile = table.new_empty(n_bags, d_model), _tile(d_model, table.dtype)
    grid = (n_bags, triton.cdiv(d_model, tile["D"]))
    with torch.cuda.device_of(table):  # type: ignore[no-untyped-call]
        _bag_sums[grid](sums, table, index, weight, offsets, d_model, **tile)
    return sums


def _tile(d_model: int, dtype: torch.dtype) -> dict[str, Any]:
    """The compile-time constants of a kernel."""
    sum_type = tl.float64 if dtype == torch.float64 else tl.float32
    return {"SUM": sum_type, "N": N_BLOCK, "D": min(D_BLOCK, triton.next_power_of_2(d_model))}


@triton.jit
@no_type_check  # these are programs of another language, whose arguments are pointers
def _bag_sums(sums, table, index, weight, offsets, d_model, SUM: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    bag = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * D + tl.arange(0, D)
    stop = tl.load(offsets + bag + 1)
    total = tl.zeros((N, D), dtype=SUM)
    for start in range(tl.load(offsets + bag), stop, N):
        n = start + tl.arange(0, N)
        row = tl.load(index + n, mask=n < stop, other=0).to(tl.int64)
        scale = tl.load(weight + n, mask=n < stop, other=0.0).to(SUM)
        inside = (n < stop)[:, None] & (d < d_model)[None, :]
        total += scale[:, None] * tl.load(table + row[:, None] * d_model + d[None, :], mask=inside, other=0.0).to(SUM)
    tl.store(sums + bag * d_model + d, tl.sum(total, axis=0), mask=d < d_model)


@triton.jit
@no_type_check
def _inner_products(values, left, right, rows, cols, nnz, d_model, SUM: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    row = tl.load(rows + n, mask=n < nnz, other=0).to(tl.int64)
    col = tl.load(cols + n, mask=n < nnz, other=0).to(tl.int64)
    total = tl.zeros((N, D), dtype=SUM)
    for start in range(0, d_model, D):
        d = start + tl.arange(0, D)
        inside = (n < nnz)[:, None] & (d < d_model)[None, :]
        a = tl.load(left + row[:, None] * d_model + d[None, :], mask=inside, other=0.0)
        b = tl.load(right + col[:, None] * d_model + d[None, :], mask=inside, other=0.0)
        total += a.to(SUM) * b.to(SUM)
    tl.store(values + n, tl.sum(total, axis=1), mask=n < nnz)


PRODUCTS = SparseProducts(weighted_bags=weighted_bags, sddmm=sddmm, sum_t=sum_t)
