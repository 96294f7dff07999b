"""The two products of a sparse autoencoder and their gradients, made of sparse primitives that each read a code once.

A sparse decoder under plain autograd saves nothing, because the backward pass of the encoder stays dense. Both products
are therefore autograd functions of
    spmm    [token feature] code x [feature d] -> [token d]
    spmm_t  transposed code x [token d] -> [feature d]
    sddmm   a b^T at the entries of the code -> [nnz]
    sum_t   sum of the code over tokens -> [feature]
A device provides sums of weighted rows (of which spmm and spmm_t are made), sddmm and sum_t; the gradients are the same
for all devices and are computed here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from sae_core.sae.codes import SparseCodes


@dataclass(frozen=True, kw_only=True)
class SparseProducts:
    """The primitives of one device; they are not differentiated, and all their tensors are contiguous."""

    weighted_bags: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """(index [nnz], offsets [n_bags + 1], weight [nnz], table [rows d]) -> [n_bags d]: bag i is the sum over
    offsets[i] <= n < offsets[i + 1] of weight[n] times row index[n] of the table."""
    sddmm: Callable[[Tensor, Tensor, SparseCodes], Tensor]
    """(left [token d], right [feature d], codes) -> [nnz]: inner products of rows at the entries of the codes."""
    sum_t: Callable[[SparseCodes], Tensor]
    """(codes) -> [feature]: sum of the values of each feature over tokens."""

    def spmm(self, codes: SparseCodes, table: Float[Tensor, "feature d_model"]) -> Float[Tensor, "token d_model"]:
        """For each token, the sum over its features of value times row of `table`."""
        return self.weighted_bags(codes.col, codes.crow, codes.value, table)

    def spmm_t(self, codes: SparseCodes, table: Float[Tensor, "token d_model"]) -> Float[Tensor, "feature d_model"]:
        """For each feature, the sum over its tokens of value times row of `table`."""
        order, offsets = codes.by_feature
        return self.weighted_bags(codes.row[order], offsets, codes.value[order], table)

    def encode(
        self,
        x: Float[Tensor, "token d_model"],
        W_enc: Float[Tensor, "feature d_model"],
        b_enc: Float[Tensor, " feature"],
        codes: SparseCodes,
    ) -> Float[Tensor, " nnz"]:
        """The values of x W_enc^T + b_enc at the entries of `codes`, with gradients.

        They are taken from `codes.value`, and computed only if that has another type than x.
        """
        values: Tensor = _Encode.apply(x, W_enc, b_enc, codes, self)  # type: ignore[no-untyped-call]
        return values

    def decode(self, codes: SparseCodes, W_dec: Float[Tensor, "feature d_model"]) -> Float[Tensor, "token d_model"]:
        """The product of codes and decoder."""
        x_hat: Tensor = _Decode.apply(codes.value, W_dec, codes, self)  # type: ignore[no-untyped-call]
        return x_hat


class _Encode(Function):
    """v_n = x_t . w_f + b_f at entry n = (t, f); dw_f = sum_n dv_n x_t, db_f = sum_n dv_n, dx_t = sum_n dv_n w_f."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, codes: SparseCodes, products: SparseProducts
    ) -> Tensor:
        ctx.codes, ctx.products = codes.with_value(codes.value.detach()), products
        x, W_enc = x.contiguous(), W_enc.contiguous()
        ctx.save_for_backward(x, W_enc)
        if codes.value.dtype == x.dtype:
            return codes.value.detach().clone()
        return products.sddmm(x, W_enc, codes) + b_enc[codes.col]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_value: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc = ctx.saved_tensors
        codes, products = ctx.codes.with_value(d_value.contiguous()), ctx.products
        need_x, need_w, need_b, *_ = ctx.needs_input_grad
        return (
            products.spmm(codes, W_enc) if need_x else None,
            products.spmm_t(codes, x) if need_w else None,
            products.sum_t(codes) if need_b else None,
            None,
            None,
        )


class _Decode(Function):
    """x_hat_t = sum_n v_n w_f over entries n = (t, f); dv_n = dx_hat_t . w_f, dw_f = sum_n v_n dx_hat_t."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, W_dec: Tensor, codes: SparseCodes, products: SparseProducts) -> Tensor:
        value, W_dec = value.contiguous(), W_dec.contiguous()
        ctx.codes, ctx.products = codes.with_value(value.detach()), products
        ctx.save_for_backward(value, W_dec)
        return products.spmm(ctx.codes, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_x_hat: Tensor) -> tuple[Tensor | None, ...]:
        _, W_dec = ctx.saved_tensors
        products, d_x_hat = ctx.products, d_x_hat.contiguous()
        need_value, need_w, *_ = ctx.needs_input_grad
        return (
            products.sddmm(d_x_hat, W_dec, ctx.codes) if need_value else None,
            products.spmm_t(ctx.codes, d_x_hat) if need_w else None,
            None,
            None,
        )
