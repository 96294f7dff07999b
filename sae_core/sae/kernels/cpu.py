"""Sparse products on a CPU, forward and backward: the cost is proportional to the nonzeros, not to the features.

The primitives of `sparse_products`, as functions of torch:
    spmm    `embedding_bag` with a bag for each token
    spmm_t  `embedding_bag` with a bag for each feature, after one stable sort
    sddmm   `torch.sparse.sampled_addmm`
    sum_t   `index_add`, which is sequential on a CPU and therefore gives the same bits each time
At B 4096, d 512, F 8192, k 32 on 2 cores the first three take 1.8, 5.6 and 3.5 ms, where `index_add` instead of spmm_t
takes 167 ms and a gather instead of sddmm 243 ms. The one dense product that is left, x W_enc^T, takes 183 ms. The
sparse products are faster than dense ones for codes up to an eighth full and take about twice as long for codes half
full (B 1024, d 512, F 4096), as Standard and Gated have before their penalty has grown; there is no dense branch.
"""

import warnings
from functools import cache

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor
from torch.nn import functional

from sae_core.sae.codes import SparseCodes
from sae_core.sae.kernels.sparse_products import SparseProducts


def sddmm(
    left: Float[Tensor, "token d_model"], right: Float[Tensor, "feature d_model"], codes: SparseCodes
) -> Float[Tensor, " nnz"]:
    """The inner products of rows of `left` and `right` at the entries of `codes`."""
    if codes.nnz == 0:
        return left.new_zeros(0)
    _silence_csr_warning()
    places = torch.sparse_csr_tensor(
        codes.crow.to(codes.col.dtype),
        codes.col,
        left.new_zeros(codes.nnz),
        size=(codes.n_tokens, codes.n_features),
        check_invariants=False,
    )
    values: Tensor = torch.sparse.sampled_addmm(places, left, right.T, beta=0.0).values()
    return values


def sum_t(codes: SparseCodes) -> Float[Tensor, " feature"]:
    """The sum of the values of each feature over tokens."""
    return codes.value.new_zeros(codes.n_features).index_add_(0, codes.col, codes.value)


def weighted_bags(
    index: Int[Tensor, " nnz"],
    offsets: Int64[Tensor, " n_bags_plus_1"],
    weight: Float[Tensor, " nnz"],
    table: Float[Tensor, "rows d_model"],
) -> Float[Tensor, "n_bags d_model"]:
    """For each bag, the sum over its entries of weight times row of `table`."""
    if index.numel() == 0:
        return table.new_zeros(offsets.numel() - 1, table.shape[1])
    return functional.embedding_bag(
        index, table, offsets.to(index.dtype), mode="sum", per_sample_weights=weight, include_last_offset=True
    )


@cache
def _silence_csr_warning() -> None:
    """Silence torch's warning, once a process, that the CSR type is in beta; here it only holds positions."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse", category=UserWarning)
        zero = torch.zeros(1, dtype=torch.int64)
        torch.sparse_csr_tensor(torch.tensor([0, 1]), zero, torch.zeros(1), size=(1, 1), check_invariants=False)


PRODUCTS = SparseProducts(weighted_bags=weighted_bags, sddmm=sddmm, sum_t=sum_t)
