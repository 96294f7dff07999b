"""What `FoundationModel` does beyond the conformance suite, which runs for every family (conformance/)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from sae_core.errors import ConfigError
from sae_core.scfm import CachedActivations, ScGPT, Site, Tokens
from sae_core.scfm.batches import plan_batches

if TYPE_CHECKING:
    import scipy.sparse as sp

Tokenize = Callable[..., Tokens]


def test_a_cell_has_the_same_activations_whatever_its_neighbours_and_order(
    tiny: ScGPT, tokenize: Tokenize, counts: sp.csr_matrix
) -> None:
    tokens = tokenize(tiny)
    x = tiny.activations(tokens, ["layer.2"])[Site.parse("layer.2")]
    order = np.random.default_rng(1).permutation(counts.shape[0])
    shuffled_tokens = tokenize(tiny, counts[order])
    shuffled = tiny.activations(shuffled_tokens, ["layer.2"])[Site.parse("layer.2")]
    for row, cell in enumerate(order):
        here = slice(*tokens.offsets[cell : cell + 2])
        there = slice(*shuffled_tokens.offsets[row : row + 2])
        torch.testing.assert_close(shuffled[there], x[here], atol=1e-5, rtol=0)
        alone = tiny.activations(tokenize(tiny, counts[[cell]]), ["layer.2"])[Site.parse("layer.2")]
        torch.testing.assert_close(alone, x[here], atol=1e-5, rtol=0)


def test_activations_equal_a_plain_loop_over_single_cells(tiny: ScGPT, tokenize: Tokenize) -> None:
    tokens = tokenize(tiny)
    found = tiny.activations(tokens, ["embedding", "layer.0", "layer.2"])
    for cell in range(tokens.n_cells):
        here = slice(*tokens.offsets[cell : cell + 2])
        if here.start == here.stop:
            continue
        ids, values = torch.from_numpy(tokens.gene_id[here])[None], torch.from_numpy(tokens.value[here])[None]
        with torch.no_grad():
            x = tiny.encoder(ids) + tiny.value_encoder(values)
            torch.testing.assert_close(found[Site.parse("embedding")][here], x[0], atol=1e-5, rtol=0)
            for i, block in enumerate(tiny.blocks):
                x = block(x, index=i)
                if (site := Site(kind="layer", index=i)) in found:
                    torch.testing.assert_close(found[site][here], x[0], atol=1e-5, rtol=0)


def test_a_patch_of_one_cell_leaves_the_others_alone(tiny: ScGPT, tokenize: Tokenize) -> None:
    tokens = tokenize(tiny)
    plain, patched = (
        tiny.embed(tokens, patches=patches)
        for patches in (None, {"layer.0": lambda x, info: torch.where((info.cell == 5)[:, None], x * 2, x)})
    )
    changed = (plain != patched).any(1) & ~plain.isnan().any(1)
    assert changed.nonzero().flatten().tolist() == [5]


def test_a_patch_that_changes_the_shape_is_refused(tiny: ScGPT, tokenize: Tokenize) -> None:
    with pytest.raises(ConfigError, match=r"layer\.0.*\(1, 16\)"):
        tiny.embed(tokenize(tiny), patches={"layer.0": lambda x, info: x[:1]})


@pytest.mark.parametrize("name", ["embedding", "layer.0", "layer.2"])
def test_a_run_from_cached_activations_is_bitwise_the_whole_run_with_and_without_a_patch(
    tiny: ScGPT, tokenize: Tokenize, name: str
) -> None:
    tokens = tokenize(tiny)
    cached = CachedActivations(name, tiny.activations(tokens, [name])[Site.parse(name)])
    for patches in ({}, {name: lambda x, _: x + 1.0}):
        whole, rest = (tiny.embed(tokens, patches=patches, cached=start) for start in (None, cached))
        assert torch.equal(whole.nan_to_num(7.0), rest.nan_to_num(7.0))


def test_cached_activations_of_other_tokens_or_after_a_patch_are_refused(tiny: ScGPT, tokenize: Tokenize) -> None:
    tokens = tokenize(tiny)
    x = tiny.activations(tokens, ["layer.1"])[Site.parse("layer.1")]
    with pytest.raises(ConfigError, match=r"\(\d+, 16\).*`activations`"):
        tiny.embed(tokens, cached=CachedActivations("layer.1", x[1:]))
    with pytest.raises(ConfigError, match=r"layer\.0 .*layer\.1; leave out `cached`"):
        tiny.embed(tokens, cached=CachedActivations("layer.1", x), patches={"layer.0": lambda x, _: x})


def test_a_site_inside_a_block_gives_no_cell_embedding(tiny: ScGPT, tokenize: Tokenize) -> None:
    with pytest.raises(ConfigError, match=r"'mlp\.0'"):
        tiny.embed(tokenize(tiny), site="mlp.0")


def test_cls_readout_is_the_unit_vector_of_position_zero(tiny: ScGPT, tokenize: Tokenize) -> None:
    tokens = tokenize(tiny)
    x = tiny.activations(tokens, ["layer.1"])[Site.parse("layer.1")][torch.from_numpy(tokens.is_special)]
    embedded = tiny.embed(tokens, readout="cls", site="layer.1")
    filled = ~embedded.isnan().any(1)
    torch.testing.assert_close(embedded[filled], x / x.norm(dim=1, keepdim=True))


def test_batches_hold_every_cell_with_tokens_once_and_waste_little() -> None:
    lengths = np.random.default_rng(0).integers(0, 900, 500)
    batches = plan_batches(lengths, 4000)
    assert sorted(np.concatenate(batches).tolist()) == np.flatnonzero(lengths).tolist()
    for cells in batches:
        assert len(cells) * lengths[cells].max() <= 4000
        assert lengths[cells].max() <= 1.25 * lengths[cells].min() + 4
    with pytest.raises(ConfigError, match=r"max_batch_tokens.*0"):
        plan_batches(lengths, 0)
