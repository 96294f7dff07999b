"""scFoundation's decoder, a Performer over all genes; only the pretraining loss needs it.

    x + Attention(LN(x));  x + W2 gelu(W1 LN(x));    final norm
    Attention: softmax(q k^T) approximated by random features phi: phi(q) (phi(k)^T v) / (phi(q) . sum phi(k))

Its cost is linear in the number of genes, so it can attend to all 19,264 of them at once. The random features are part
of the checkpoint (`projection_matrix`), so the result is deterministic. Module names are those of the checkpoint. At
full size a cell takes about 20 s on one core.

Choromanski et al. 2021, Performers, arXiv:2009.14794 (FAVOR+, equation 5 and section 2.4).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

_EPS = 1e-4


class _RandomFeatures(nn.Module):
    def __init__(self, d_head: int) -> None:
        super().__init__()
        self.register_buffer("projection_matrix", torch.zeros(int(d_head * math.log(d_head)), d_head))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        phi_q, phi_k = self._phi(q, of_query=True), self._phi(k, of_query=False)
        norm = 1 / torch.einsum("hnf,hf->hn", phi_q, phi_k.sum(1))
        out: Tensor = torch.einsum("hfe,hnf,hn->hne", phi_k.transpose(1, 2) @ v, phi_q, norm)
        return out

    def _phi(self, x: Tensor, *, of_query: bool) -> Tensor:
        projection: Tensor = self.get_buffer("projection_matrix").to(x.dtype)
        x = x * x.shape[-1] ** -0.25
        along = x @ projection.T
        # a constant per query and one for all keys cancel in the quotient; these keep exp from overflowing
        top = along.amax(-1, keepdim=True) if of_query else along.amax()
        features: Tensor = torch.exp(along - (x**2).sum(-1, keepdim=True) / 2 - top) + _EPS
        return features * float(projection.shape[0] ** -0.5)


class _Attention(nn.Module):
    def __init__(self, *, d_model: int, n_heads: int, d_head: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.fast_attention = _RandomFeatures(d_head)
        self.to_q, self.to_k, self.to_v = (nn.Linear(d_model, n_heads * d_head) for _ in range(3))
        self.to_out = nn.Linear(n_heads * d_head, d_model)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (to(x).view(len(x), self.n_heads, -1).transpose(0, 1) for to in (self.to_q, self.to_k, self.to_v))
        out: Tensor = self.to_out(self.fast_attention(q, k, v).transpose(0, 1).flatten(1))
        return out


class _FeedForward(nn.Module):
    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.gelu(self.w1(x)))
        return out


class _PreNorm(nn.Module):
    def __init__(self, d_model: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(d_model), fn

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fn(self.norm(x))
        return out


class _Inner(nn.Module):
    """A level of the checkpoint's module names (chunking), which does nothing here."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fn(x)
        return out


class _Layers(nn.Module):
    def __init__(self, n_layers: int, *, d_model: int, n_heads: int, d_head: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    _PreNorm(d_model, _Attention(d_model=d_model, n_heads=n_heads, d_head=d_head)),
                    _PreNorm(d_model, _Inner(_FeedForward(d_model))),
                ]
            )
            for _ in range(n_layers)
        )


class _Net(nn.Module):
    def __init__(self, layers: _Layers) -> None:
        super().__init__()
        self.net = layers
        self.register_buffer("calls_since_last_redraw", torch.tensor(0))


class Performer(nn.Module):
    """Decoder blocks for one cell at a time; a batch would need gigabytes (19,266 x 266 features per head and cell)."""

    def __init__(self, *, n_layers: int, d_model: int, n_heads: int, d_head: int) -> None:
        super().__init__()
        self.performer = _Net(_Layers(n_layers, d_model=d_model, n_heads=n_heads, d_head=d_head))
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x: Float[Tensor, "gene d_model"]) -> Float[Tensor, "gene d_model"]:
        """Output of the final norm for all genes of one cell."""
        for pair in self.performer.net.layers:
            assert isinstance(pair, nn.ModuleList)
            for part in pair:
                x = x + part(x)
        out: Tensor = self.norm(x)
        return out
