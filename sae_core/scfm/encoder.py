"""The post-norm transformer encoder block that every model here shares.

    a = x + attention(x);  h = norm1(a);  y = norm2(h + W2 relu(W1 h))

The block and the loop over blocks are our own, because torch's stock `nn.TransformerEncoder` hands NestedTensors to
hooks and zeroes padded outputs. The block is equal to `nn.TransformerEncoderLayer(norm_first=False)` with ReLU to 1e-5
(tested). Attention is `scaled_dot_product_attention`: it needs no flash-attn package and gives the same numbers on CPU
and GPU. Parameter names are those of scGPT's flash-attention checkpoints (`self_attn.Wqkv`); query, key and value are
stacked in this order, as in torch's `in_proj_weight`.

Paper: Vaswani et al. 2017, arXiv:1706.03762 (post-norm).
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sae_core.errors import ConfigError
from sae_core.scfm.sites import Site, SiteHook


class SelfAttention(nn.Module):
    """Multi-head self-attention with query, key and value projections in one matrix."""

    def __init__(self, *, d_model: int, n_heads: int) -> None:
        super().__init__()
        if n_heads < 1 or d_model % n_heads:
            raise ConfigError(f"n_heads was {n_heads} for d_model {d_model}; allowed: a divisor of d_model")
        self.d_model, self.n_heads = d_model, n_heads
        self.Wqkv = nn.Linear(d_model, 3 * d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(
        self,
        x: Float[Tensor, "row position d_model"],
        *,
        key_mask: Bool[Tensor, "row key"] | None = None,
        n_keys: int | None = None,
    ) -> Float[Tensor, "row position d_model"]:
        """softmax(q k^T / sqrt(d_head)) v, over the keys where `key_mask` is true.

        `n_keys`: only the first `n_keys` positions are keys; the positions after them attend and are never attended to.
        """
        n_rows, n_positions, d_model = x.shape
        w, b = self.Wqkv.weight, self.Wqkv.bias
        if n_keys is None:
            q, k, v = self.Wqkv(x).chunk(3, dim=-1)
        else:
            q = F.linear(x, w[:d_model], b[:d_model])
            k, v = F.linear(x[:, :n_keys], w[d_model:], b[d_model:]).chunk(2, dim=-1)
        q, k, v = (t.view(n_rows, t.shape[1], self.n_heads, -1).transpose(1, 2) for t in (q, k, v))
        mask = None if key_mask is None else key_mask[:, None, None, :]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).reshape(n_rows, n_positions, d_model))
        return out


class EncoderBlock(nn.Module):
    """One post-norm block (module docstring); `hook` receives, and may replace, the activations at its three sites."""

    def __init__(self, *, d_model: int, n_heads: int, d_hidden: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.self_attn = SelfAttention(d_model=d_model, n_heads=n_heads)
        self.linear1 = nn.Linear(d_model, d_hidden)
        self.linear2 = nn.Linear(d_hidden, d_model)
        self.norm1 = nn.LayerNorm(d_model, eps=eps)
        self.norm2 = nn.LayerNorm(d_model, eps=eps)

    def forward(
        self,
        x: Float[Tensor, "row position d_model"],
        *,
        index: int,
        hook: SiteHook | None = None,
        key_mask: Bool[Tensor, "row key"] | None = None,
        n_keys: int | None = None,
    ) -> Float[Tensor, "row position d_model"]:
        """Output of block `index` for input `x`."""
        hook = hook or _pass
        attended = hook(Site(kind="attention", index=index), self.self_attn(x, key_mask=key_mask, n_keys=n_keys))
        h = self.norm1(x + attended)
        mlp = hook(Site(kind="mlp", index=index), self.linear2(F.relu(self.linear1(h))))
        return hook(Site(kind="layer", index=index), self.norm2(h + mlp))


def _pass(_: Site, x: Tensor) -> Tensor:
    return x
