from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sae_core.errors import ConfigError
from sae_core.scfm.encoder import EncoderBlock, SelfAttention


def random_block(**settings: Any) -> EncoderBlock:
    generator = torch.Generator().manual_seed(0)
    block = EncoderBlock(d_model=24, n_heads=4, d_hidden=40, **settings).requires_grad_(False)
    for parameter in block.parameters():
        parameter.data.normal_(0.0, 0.3, generator=generator)
    return block


def block_and_oracle(
    *, norm_first: bool = False, activation: Any = "relu"
) -> tuple[EncoderBlock, nn.TransformerEncoderLayer]:
    block = random_block(norm_place="pre" if norm_first else "post", activation=activation)
    oracle = nn.TransformerEncoderLayer(
        24, 4, dim_feedforward=40, dropout=0.0, activation=activation, batch_first=True, norm_first=norm_first
    )
    state = {key.replace("self_attn.Wqkv.", "self_attn.in_proj_"): value for key, value in block.state_dict().items()}
    oracle.load_state_dict(state)
    # training mode keeps torch from its fused path, which handles padding in another way
    return block, oracle.train()


@pytest.mark.parametrize(
    ("norm_first", "activation"), [(False, "relu"), (False, "gelu"), (True, "relu"), (True, "gelu")]
)
@pytest.mark.parametrize("padded", [False, True])
def test_block_equals_torchs_layer(norm_first: bool, activation: str, padded: bool) -> None:
    block, oracle = block_and_oracle(norm_first=norm_first, activation=activation)
    x = torch.randn(5, 9, 24, generator=torch.Generator().manual_seed(1))
    real = torch.arange(9) < torch.tensor([9, 4, 1, 9, 6])[:, None] if padded else torch.ones(5, 9, dtype=torch.bool)
    out = block(x, index=0, key_mask=real if padded else None)
    expected = oracle(x, src_key_padding_mask=~real if padded else None)
    torch.testing.assert_close(out[real], expected[real], atol=1e-5, rtol=1e-5)


def test_positions_after_n_keys_attend_and_are_never_attended_to() -> None:
    block, _ = block_and_oracle()
    x = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(2))
    out = block(x, index=0, n_keys=5)
    alone = block(x[:, :5], index=0)
    torch.testing.assert_close(out[:, :5], alone, atol=1e-6, rtol=1e-6)
    one_query = block(torch.cat([x[:, :5], x[:, 7:]], dim=1), index=0, n_keys=5)
    torch.testing.assert_close(out[:, 7], one_query[:, 5], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("norm_place", ["post", "pre", "carried"])
@pytest.mark.parametrize("attention", [{}, {"is_causal": True}, {"softcap": 2.0}, {"softcap": 2.0, "is_causal": True}])
@pytest.mark.parametrize("lines", [False, True])
def test_the_output_at_some_places_is_that_of_the_whole_block(norm_place: str, attention: Any, lines: bool) -> None:
    block = random_block(norm_place=norm_place)
    block.self_attn.softcap, block.self_attn.is_causal = attention.get("softcap"), attention.get("is_causal", False)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 7, 24, generator=generator)
    shape = (3, 7, 7) if lines else (3, 7)
    mask, bias = torch.rand(shape, generator=generator) < 0.7, torch.randn(shape, generator=generator)
    # a query without a key would be NaN in both
    mask[..., 0] = True
    places = torch.tensor([[6, 2, 3], [0, 5, 0], [4, 4, 1]])
    for masks in ({}, {"key_mask": mask}, {"key_bias": bias}, {"key_mask": mask, "key_bias": bias}):
        whole, some = (block(x, index=0, places=at, **masks) for at in (None, places))
        torch.testing.assert_close(some, torch.stack([whole[i, at] for i, at in enumerate(places)]))
    keys = block(x, index=0, n_keys=5), block(x, index=0, n_keys=5, places=places)
    torch.testing.assert_close(keys[1], torch.stack([keys[0][i, at] for i, at in enumerate(places)]))


def test_a_mask_may_have_a_line_of_its_own_for_each_position() -> None:
    block, oracle = block_and_oracle()
    x = torch.randn(3, 6, 24, generator=torch.Generator().manual_seed(2))
    hidden = torch.tensor([[0, 0, 1, 0, 1, 0], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    allowed = ~hidden[:, None] | torch.eye(6, dtype=torch.bool)
    expected = oracle(x, src_mask=~allowed.repeat_interleave(4, 0))
    torch.testing.assert_close(block(x, index=0, key_mask=allowed), expected, atol=1e-5, rtol=1e-5)
    rows = torch.ones(3, 6, dtype=torch.bool)
    same = block(x, index=0, key_mask=rows), block(x, index=0, key_mask=rows[:, None].expand(3, 6, 6))
    torch.testing.assert_close(*same)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 for d_model 16"):
        SelfAttention(d_model=16, n_heads=3)


def spelled_out(block: EncoderBlock, x: Tensor, *, bias: Tensor, allowed: Tensor, softcap: float) -> Tensor:
    """Mixed values of every head before the output projection, query by query."""
    w, att = block.self_attn.Wqkv, block.self_attn
    q, k, v = (t.unflatten(-1, (att.n_heads, -1)) for t in F.linear(x, w.weight, w.bias).chunk(3, -1))
    out = torch.zeros_like(q)
    for row in range(len(x)):
        for head in range(att.n_heads):
            for query in range(x.shape[1]):
                keys = allowed[row, query].nonzero()[:, 0]
                score = (k[row, keys, head] @ q[row, query, head]) / q.shape[-1] ** 0.5 + bias[row, keys]
                weight = (softcap * torch.tanh(score / softcap)).softmax(0)
                out[row, query, head] = weight @ v[row, keys, head]
    return att.out_proj(out.flatten(2))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_bias_of_each_query_and_key_is_that_of_the_keys_where_all_queries_have_one(softcap: float | None) -> None:
    block = random_block(softcap=softcap, is_causal=True)
    x = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(3, 7, generator=torch.Generator().manual_seed(2)) * 3
    found, expected = (block.self_attn(x, key_bias=b) for b in (bias[:, None].expand(3, 7, 7), bias))
    torch.testing.assert_close(found, expected)
    # without its own bias, a query attends as if its own key had none
    later = bias[:, None] * torch.ones(7, 7).tril(-1)
    found = block.self_attn(x, key_bias=later)
    for n in range(7):
        alone = bias[:, : n + 1].clone()
        alone[:, n] = 0
        torch.testing.assert_close(found[:, n], block.self_attn(x[:, : n + 1], key_bias=alone)[:, n])


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_causal_attention_takes_a_bias_of_the_keys_before_the_cap_and_a_query_without_keys_gets_nothing(
    softcap: float | None,
) -> None:
    block = random_block(softcap=softcap, is_causal=True, attention_bias=False)
    x = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(3, 7, generator=torch.Generator().manual_seed(2)) * 3
    key = torch.ones(3, 7, dtype=torch.bool)
    key[1, 5:] = False
    if softcap is not None:
        key[2, 0] = False
    allowed = key[:, None, :] & torch.ones(7, 7, dtype=torch.bool).tril()
    found = block.self_attn(x, key_mask=key, key_bias=bias)
    expected = spelled_out(block, x, bias=bias, allowed=allowed, softcap=softcap or 1e6)
    torch.testing.assert_close(found, expected, atol=1e-5 if softcap else 1e-4, rtol=1e-4)
    assert softcap is None or not found[2, 0].any()


def test_a_block_carries_the_norm_or_the_sum_on_and_gates_its_feed_forward_part() -> None:
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
    carried = random_block(norm_place="carried", activation="gelu", attention_bias=False, mlp_bias=False)
    assert not [name for name, _ in carried.named_parameters() if name.endswith("bias") and "norm" not in name]
    h = F.layer_norm(x, [24], carried.norm1.weight, carried.norm1.bias)
    z = F.layer_norm(h + carried.self_attn(h), [24], carried.norm2.weight, carried.norm2.bias)
    expected = z + F.linear(F.gelu(F.linear(z, carried.linear1.weight)), carried.linear2.weight)
    torch.testing.assert_close(carried(x, index=0), expected)

    gated = random_block(norm_place="pre", norm="rms", activation="silu", is_gated=True, mlp_bias=False, eps=1e-5)
    assert gated.gate is not None

    def rms(t: Tensor, weight: Tensor) -> Tensor:
        return t / (t.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    h = x + gated.self_attn(rms(x, gated.norm1.weight))
    n = rms(h, gated.norm2.weight)
    opened = F.silu(n @ gated.gate.weight.T)
    torch.testing.assert_close(gated(x, index=0), h + (opened * (n @ gated.linear1.weight.T)) @ gated.linear2.weight.T)


@pytest.mark.parametrize("norm_place", ["post", "pre", "carried"])
def test_hooks_see_the_parts_before_the_residual_sum_and_the_output_and_may_replace_them(norm_place: Any) -> None:
    block = random_block(norm_place=norm_place)
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
    seen = {}

    def nothing(site: Any, value: Tensor) -> Tensor:
        seen[str(site)] = value
        return value if site.kind == "layer" else torch.zeros_like(value)

    out = block(x, index=3, hook=nothing)
    n1, n2 = block.norm1, block.norm2
    expected = {"post": n2(n1(x)), "pre": x, "carried": n2(n1(x))}[norm_place]
    assert list(seen) == ["attention.3", "mlp.3", "layer.3"]
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(seen["layer.3"], out)
