"""The transformer encoder block that every model here shares, with the settings in which the families differ.

    norm_place "post"      h = N1(x + A(x));   y = N2(h + M(h))
    norm_place "pre"       h = x + A(N1 x);    y = h + M(N2 h)
    norm_place "carried"   h = N1 x + A(N1 x); y = N2 h + M(N2 h)       the norm's output carries on, x itself does not

A is the attention, M the feed-forward part W2 act(W1 x), or W2 (act(W_gate x) * W1 x) if it is gated; N is a LayerNorm
or an RMSNorm. The attention site is A's output and the mlp site M's, both before the residual sum; the layer site is y.

The block and the loop over blocks are our own, because torch's stock `nn.TransformerEncoder` hands NestedTensors to
hooks and zeroes padded outputs. The block is equal to `nn.TransformerEncoderLayer` (post-norm and pre-norm) to 1e-5
(tested). Attention is `scaled_dot_product_attention`: it needs no flash-attn package and gives the same numbers on CPU
and GPU. Only a cap of the scores needs the scores themselves, [head query key] of one cell at a time: 270 MB for 16
heads and 2,048 positions in float32. Parameter names are those of scGPT's flash-attention checkpoints
(`self_attn.Wqkv`); query, key and value are stacked in this order, as in torch's `in_proj_weight`.

Vaswani et al. 2017, arXiv:1706.03762 (post-norm); Xiong et al. 2020, arXiv:2002.04745 (pre-norm); Zhang and Sennrich
2019, arXiv:1910.07467 (RMSNorm); Shazeer 2020, arXiv:2002.05202 (gated feed-forward parts).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from sae_core.errors import ConfigError
from sae_core.scfm.sites import Site, SiteHook

NormPlace = Literal["post", "pre", "carried"]
Norm = Literal["layer", "rms"]
Activation = Literal["relu", "gelu", "silu"]
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


class SelfAttention(nn.Module):
    """Multi-head self-attention with query, key and value projections in one matrix.

    Attributes:
        softcap: scores s become softcap tanh(s / softcap); None leaves them.
        is_causal: a position attends to itself and to those before it alone.
    """

    def __init__(
        self, *, d_model: int, n_heads: int, bias: bool = True, softcap: float | None = None, is_causal: bool = False
    ) -> None:
        super().__init__()
        if n_heads < 1 or d_model % n_heads:
            raise ConfigError(f"n_heads was {n_heads} for d_model {d_model}; allowed: a divisor of d_model")
        self.d_model, self.n_heads, self.softcap, self.is_causal = d_model, n_heads, softcap, is_causal
        self.Wqkv = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "row position d_model"],
        *,
        key_mask: Bool[Tensor, "row key"] | Bool[Tensor, "row position key"] | None = None,
        key_bias: Float[Tensor, "row key"] | Float[Tensor, "row position key"] | None = None,
        n_keys: int | None = None,
        places: Int64[Tensor, "row place"] | None = None,
    ) -> Float[Tensor, "row position d_model"] | Float[Tensor, "row place d_model"]:
        """softmax(cap(q k^T / sqrt(d_head) + bias of the key)) v, over the keys where `key_mask` is true.

        `key_mask` is one of all positions of a row, or has a line of its own for each.
        `n_keys`: only the first `n_keys` positions are keys; the positions after them attend and are never attended to.
        `places`: the positions of each row whose output is wanted; None: all.
        The bias of a key is one for all positions, or that of each. A position that may attend to no key gets 0 where
        scores are capped, and NaN elsewhere.
        """
        n_rows, n_positions, d_model = x.shape
        w, b = self.Wqkv.weight, self.Wqkv.bias
        if n_keys is None and places is None:
            q, k, v = self.Wqkv(x).chunk(3, dim=-1)
        else:
            of_query, of_key = (None, None) if b is None else (b[:d_model], b[d_model:])
            q = F.linear(at_places(x, places), w[:d_model], of_query)
            k, v = F.linear(x[:, :n_keys], w[d_model:], of_key).chunk(2, dim=-1)
        q, k, v = (t.view(n_rows, t.shape[1], self.n_heads, -1).transpose(1, 2) for t in (q, k, v))
        # the lines of the queries
        key_mask, key_bias = (t if t is None or t.ndim == 2 else at_places(t, places) for t in (key_mask, key_bias))
        mask = None if key_mask is None else key_mask[:, None, None] if key_mask.ndim == 2 else key_mask[:, None]
        if self.is_causal:
            at = torch.arange(n_positions, device=x.device)[None] if places is None else places
            before = (torch.arange(k.shape[2], device=x.device) <= at[:, :, None])[:, None]
            mask = before if mask is None else mask & before
        if self.softcap is not None:
            mixed = torch.cat([self._capped(q, k, v, mask, key_bias, row) for row in range(n_rows)])
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self._biased(q, mask, key_bias))
        out: Tensor = self.out_proj(mixed.transpose(1, 2).reshape(n_rows, -1, d_model))
        return out

    def _biased(self, q: Tensor, mask: Tensor | None, key_bias: Tensor | None) -> Tensor | None:
        if key_bias is None:
            return mask
        bias = (key_bias[:, None, None, :] if key_bias.ndim == 2 else key_bias[:, None]).to(q.dtype)
        return bias if mask is None else bias.masked_fill(~mask, -torch.inf)

    def _capped(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, key_bias: Tensor | None, row: int
    ) -> Float[Tensor, "1 head position d_head"]:
        """Attention of one cell with its scores in memory."""
        assert self.softcap is not None
        scores = q[row] @ k[row].transpose(1, 2) / q.shape[-1] ** 0.5
        if key_bias is not None:
            scores = scores + key_bias[row]
        scores = self.softcap * torch.tanh(scores / self.softcap)
        if mask is not None:
            # of all rows, or of each
            allowed = mask[min(row, len(mask) - 1)]
            # a query without any key attends to nothing; softmax alone would give NaN
            scores = scores.masked_fill(~allowed, -torch.inf).softmax(-1).masked_fill(~allowed, 0.0)
        else:
            scores = scores.softmax(-1)
        return (scores.to(v.dtype) @ v[row])[None]


def stack_query_key_value(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in which `self_attn.{query,key,value}` of each block are its `self_attn.Wqkv`.

    An incomplete triple stays, so that `load_weights` names it.
    """
    stacked = dict(weights)
    for key in [key for key in weights if ".self_attn.query." in key]:
        names = [key.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(name in stacked for name in names):
            stacked[key.replace(".query.", ".Wqkv.")] = torch.cat([stacked.pop(name) for name in names])
    return stacked


class EncoderBlock(nn.Module):
    """One block (module docstring); `hook` receives, and may replace, the activations at its three sites."""

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        d_hidden: int,
        eps: float = 1e-5,
        norm_place: NormPlace = "post",
        norm: Norm = "layer",
        activation: Activation = "relu",
        is_gated: bool = False,
        attention_bias: bool = True,
        mlp_bias: bool = True,
        softcap: float | None = None,
        is_causal: bool = False,
    ) -> None:
        super().__init__()
        self.norm_place, self.activation = norm_place, activation
        self.self_attn = SelfAttention(
            d_model=d_model, n_heads=n_heads, bias=attention_bias, softcap=softcap, is_causal=is_causal
        )
        self.linear1 = nn.Linear(d_model, d_hidden, bias=mlp_bias)
        self.gate = nn.Linear(d_model, d_hidden, bias=mlp_bias) if is_gated else None
        self.linear2 = nn.Linear(d_hidden, d_model, bias=mlp_bias)
        made = nn.LayerNorm if norm == "layer" else nn.RMSNorm
        self.norm1, self.norm2 = made(d_model, eps=eps), made(d_model, eps=eps)

    def forward(
        self,
        x: Float[Tensor, "row position d_model"],
        *,
        index: int,
        hook: SiteHook | None = None,
        key_mask: Bool[Tensor, "row key"] | Bool[Tensor, "row position key"] | None = None,
        key_bias: Float[Tensor, "row key"] | Float[Tensor, "row position key"] | None = None,
        n_keys: int | None = None,
        places: Int64[Tensor, "row place"] | None = None,
    ) -> Float[Tensor, "row position d_model"] | Float[Tensor, "row place d_model"]:
        """Output of block `index` for input `x`; masks and `places` are those of `SelfAttention`."""
        hook = hook or _pass

        def attention(of: Tensor) -> Tensor:
            mixed = self.self_attn(of, key_mask=key_mask, key_bias=key_bias, n_keys=n_keys, places=places)
            return hook(Site(kind="attention", index=index), mixed)

        def mlp(of: Tensor) -> Tensor:
            return hook(Site(kind="mlp", index=index), self._feed_forward(of))

        if self.norm_place == "post":
            h = self.norm1(at_places(x, places) + attention(x))
            y = self.norm2(h + mlp(h))
        elif self.norm_place == "pre":
            h = at_places(x, places) + attention(self.norm1(x))
            y = h + mlp(self.norm2(h))
        else:
            carried = self.norm1(x)
            carried = self.norm2(at_places(carried, places) + attention(carried))
            y = carried + mlp(carried)
        return hook(Site(kind="layer", index=index), y)

    def _feed_forward(self, x: Tensor) -> Tensor:
        act = _ACTIVATIONS[self.activation]
        hidden = act(self.linear1(x)) if self.gate is None else act(self.gate(x)) * self.linear1(x)
        out: Tensor = self.linear2(hidden)
        return out


def at_places(
    x: Float[Tensor, "row position d"] | Bool[Tensor, "row position d"], places: Int64[Tensor, "row place"] | None
) -> Tensor:
    """The vectors at some positions of each row [row place d]; all of them if `places` is None."""
    return x if places is None else x[torch.arange(len(x), device=x.device)[:, None], places]


def _pass(_: Site, x: Tensor) -> Tensor:
    return x
