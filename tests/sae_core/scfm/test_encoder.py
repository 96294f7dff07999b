from __future__ import annotations

import pytest
import torch
from torch import nn

from sae_core.errors import ConfigError
from sae_core.scfm.encoder import EncoderBlock, SelfAttention


def block_and_oracle() -> tuple[EncoderBlock, nn.TransformerEncoderLayer]:
    generator = torch.Generator().manual_seed(0)
    block = EncoderBlock(d_model=24, n_heads=4, d_hidden=40)
    for parameter in block.parameters():
        parameter.data.normal_(0.0, 0.3, generator=generator)
    oracle = nn.TransformerEncoderLayer(24, 4, dim_feedforward=40, dropout=0.0, activation="relu", batch_first=True)
    state = {key.replace("self_attn.Wqkv.", "self_attn.in_proj_"): value for key, value in block.state_dict().items()}
    oracle.load_state_dict(state)
    # training mode keeps torch from its fused path, which handles padding in another way
    return block, oracle.train()


@pytest.mark.parametrize("padded", [False, True])
def test_block_equals_torchs_post_norm_layer(padded: bool) -> None:
    block, oracle = block_and_oracle()
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


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 for d_model 16"):
        SelfAttention(d_model=16, n_heads=3)
